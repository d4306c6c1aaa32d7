"""The stages of a recipe: pretrain -> tune -> evaluate -> report, each from run directory to run directory.

Every stage can be killed and started again; a finished one is not repeated. The learning rates of a method and all its
seeds are one program; methods differ in their loss and are separate programs. Studies that differ in traced scalars
alone can train together: their points follow each other along h.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsafety import keys, tree, world
from jaxsafety.config import fields
from jaxsafety.engine import hosts, loop, programs, sweep
from jaxsafety.engine.loop import Leg
from jaxsafety.engine.programs import Grid
from jaxsafety.keys import Stream
from jaxsafety.recipe.nodes import MethodConfig
from jaxsafety.recipe.schema import PRETRAINED, Recipe
from jaxsafety.rundir import layout
from jaxsafety.study import lanes
from jaxsafety.training import stepping
from jaxsafety.types import HParams, Metrics, Params, Strategy, TrainState, Trial
from jaxsafety.world import Condition, World


@dataclass(frozen=True)
class Study:
    """A recipe made ready to run.

    The world is built and the strategy resolved; ``directory`` is the run's.
    """

    recipe: Recipe
    world: World
    strategy: Strategy
    directory: Path

    @property
    def pretrain_leg(self) -> Leg:
        """The pretraining leg."""
        config = self.recipe.pretrain
        return Leg(self.directory, "pretrain", PRETRAINED, config.steps, config.chunk_steps)

    def tune_leg(self, label: str) -> Leg:
        """The leg of one method."""
        config = self.recipe.tune
        return Leg(self.directory, "tune", label, config.steps, config.chunk_steps, config.snapshot_steps)

    @property
    def pretrain_grid(self) -> Grid:
        """One learning rate, all seeds."""
        return Grid(self.recipe.seeds, (("", self.recipe.pretrain.learning_rate),), self.strategy)

    @property
    def tune_grid(self) -> Grid:
        """All learning rates, all seeds."""
        return Grid(self.recipe.seeds, tuple(self.recipe.tune.learning_rates.items()), self.strategy)

    @property
    def roots(self) -> Array:
        """Root keys of the seeds, ``[s]``."""
        return jax.vmap(keys.root)(jnp.asarray(self.recipe.seeds, jnp.uint32))


def prepare(recipe: Recipe, directory: Path) -> Study:
    """Builds the world and resolves the strategy; the first thing to touch a device. Raises ValueError."""
    built = world.load(recipe.world, grammars=recipe.grammars)
    recipe.model.build(built)
    base = jax.eval_shape(lambda: lanes.init_params(recipe, built, key=keys.root(0)))
    for label, node in recipe.edits.items():
        try:
            node.points(base)
        except ValueError as error:
            raise ValueError(f"edits.{label}: {error}") from error
    return Study(recipe, built, sweep.resolve(recipe.strategy, seeds=len(recipe.seeds)), directory)


def _points(rows: Sequence[tuple[float, MethodConfig]]) -> HParams:
    """The traced scalars ``[h]`` of (peak learning rate, method) rows, whose methods are the same."""

    def column(values: Iterable[float]) -> Array:
        return jnp.asarray(list(values), jnp.float32)

    names = fields.traced_names(rows[0][1].options)
    return HParams(
        peak_lr=column(lr for lr, _ in rows),
        p_unsafe=column(method.p_unsafe for _, method in rows),
        options={name: column(getattr(method.options, name) for _, method in rows) for name in names},
    )


def _rates(grid: Grid) -> HParams:
    """The points of a grid where its learning rates are all that counts."""
    rates = jnp.asarray([lr for _, lr in grid.points], jnp.float32)
    return HParams(peak_lr=rates, p_unsafe=jnp.zeros_like(rates))


def _side_by_side(grids: Sequence[Grid]) -> Grid:
    return replace(grids[0], points=tuple(point for grid in grids for point in grid.points))


def _pretrain_start(*studies: Study) -> TrainState:
    """The stacked states ``[h, s]`` before pretraining, one row a study."""
    study, grid = studies[0], _side_by_side([study.pretrain_grid for study in studies])

    def init(_: Any, key: Array, point: HParams) -> TrainState:
        params = lanes.init_params(study.recipe, study.world, key=key)
        return stepping.init_state(params, lanes.optimizer(study.recipe.pretrain, point))

    return programs.program(init, grid=grid)(lane_dummies(grid), study.roots, _rates(grid))


def _tune_start(base: TrainState, label: str, *studies: Study) -> TrainState:
    """The stacked states ``[h, s]`` before a method, every learning rate from the same pretrained ``base[s]``.

    A seed that diverged in pretraining stays frozen: what is tuned from it is no result.
    """
    study, grid = studies[0], _side_by_side([study.tune_grid for study in studies])
    method = study.recipe.tune.methods[label]

    def init(_: Any, per_seed: tuple[Array, TrainState], point: HParams) -> TrainState:
        key, pretrained = per_seed
        state = lanes.init_tuned(study.recipe, method, pretrained.params, key=key, point=point)
        return state.replace(finite=pretrained.finite)

    points = _tune_points(studies, label)
    return programs.program(init, grid=grid)(lane_dummies(grid), (study.roots, base), points)


def _tune_points(studies: Sequence[Study], label: str) -> HParams:
    return _points([(lr, one.recipe.tune.methods[label]) for one in studies for _, lr in one.tune_grid.points])


def pretrain_shapes(studies: Sequence[Study]) -> TrainState:
    """Returns the shapes ``[h, s, ...]`` of what the pretraining of studies together holds, without computing it."""
    return jax.eval_shape(partial(_pretrain_start, *studies))


def tune_shapes(studies: Sequence[Study], label: str) -> TrainState:
    """Returns the shapes ``[h, s, ...]`` of what tuning a method of studies together holds, without computing it."""
    one = pretrain_shapes(studies[:1])
    base = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), one)
    return jax.eval_shape(lambda base: _tune_start(base, label, *studies), base)


def lane_dummies(grid: Grid) -> Array:
    """Returns ``[h, s]`` zeros, for programs that need no input per lane."""
    return jnp.zeros((len(grid.points), len(grid.seeds)))


def per_seed(study: Study, run: Callable[[Array], Any]) -> Any:
    """Returns ``run(root key)`` of every seed, ``[s, ...]``, placed as the strategy wants it."""
    grid = study.pretrain_grid
    lanes_out = programs.program(lambda _, key, __: run(key), grid=grid)(lane_dummies(grid), study.roots, jnp.zeros(1))
    return programs.at_once(lambda found: tree.lane(found, 0), lanes_out)


def draw_prompts(study: Study, condition: str | Condition, *, stream: Stream, late_probability: float) -> Trial:
    """Draws the prompts ``[s, n, b, ...]`` of a condition for every seed; see :func:`jaxsafety.study.lanes.prompts`.

    The stages that ask for the same condition share a compiled program, since stream and probability are inputs.
    """
    grid = study.pretrain_grid
    streams = jax.vmap(lambda root: keys.stream(root, stream))(study.roots)

    def draw(_: Any, key: Array, __: Any, late: Array) -> Trial:
        return lanes.prompts(study.recipe, study.world, condition=condition, key=key, late_probability=late)

    drawn = programs.program(draw, grid=grid)(lane_dummies(grid), streams, jnp.zeros(1), jnp.float32(late_probability))
    return programs.at_once(lambda found: tree.lane(found, 0), drawn)


def _readout(study: Study) -> tuple[Callable[[Params, Any, Any], Metrics], Any]:
    def read(params: Params, trials: Any, _: Any) -> Metrics:
        return lanes.readout(study.recipe, study.world, params, trials)

    return read, per_seed(study, lambda key: lanes.readout_prompts(study.recipe, study.world, key=key))


def pretrain(study: Study) -> TrainState:
    """Pretrains every seed; returns the final states ``[1, s, ...]``."""
    if loop.is_finished(study.pretrain_leg):
        like = jax.eval_shape(partial(_pretrain_start, study))
        return loop.load(study.pretrain_leg, like, grid=study.pretrain_grid)
    return pretrain_together((study,))


def pretrain_together(studies: Sequence[Study]) -> TrainState:
    """Pretrains unfinished studies of one part of :func:`in_step`, which differ in the learning rate, as one program.

    Returns:
        The final states ``[h, s, ...]``, one row a study.

    Raises:
        FloatingPointError: every lane of every study has diverged.
    """
    study, grid = studies[0], _side_by_side([study.pretrain_grid for study in studies])
    return loop.train(
        lanes.pretrain_chunk(study.recipe, study.world),
        partial(_pretrain_start, *studies),
        readout=_readout(study),
        per_seed=study.roots,
        points=_rates(grid),
        grid=grid,
        legs=[study.pretrain_leg for study in studies],
    )


def in_step(studies: Sequence[Study], leg_of: Callable[[Study], Leg]) -> list[tuple[Study, ...]]:
    """Splits the studies whose leg is unfinished into parts that can train together; see :func:`loop.in_step`."""
    by_leg = {leg_of(study): study for study in studies}
    parts = loop.in_step([leg for leg in by_leg if not loop.is_finished(leg)])
    return [tuple(by_leg[leg] for leg in part) for part in parts]


def pretrained(study: Study) -> TrainState:
    """Returns the finished pretraining states ``[1, s, ...]``, or raises as :func:`check_pretrained`."""
    check_pretrained(study)
    return pretrain(study)


def is_finished(study: Study, stage: str) -> bool:
    """Whether a stage has nothing left to do in the run directory."""
    if stage == "pretrain":
        return loop.is_finished(study.pretrain_leg)
    if stage == "tune":
        return all(loop.is_finished(study.tune_leg(label)) for label in study.recipe.tune.methods)
    return hosts.decide(lambda: layout.finished_files(study.directory, stage))


def check_ready(study: Study, stage: str) -> None:
    """Raises a ValueError unless the stages before ``stage`` are finished."""
    if stage == "tune":
        check_pretrained(study)
    elif stage in ("evaluate", "analyze"):
        check_tuned(study)
    elif stage == "report" and not is_finished(study, "evaluate"):
        raise ValueError(f"no results in {study.directory}: run `jaxsafety evaluate` on it first")


def own_grammars(recipe: Recipe) -> dict[str, str]:
    """Returns the contents of the user's own grammar files, by the name that the run directory keeps them under."""
    return {f"{condition}.pcfg": Path(path).read_text() for condition, path in recipe.grammars.items()}


def check_pretrained(study: Study) -> None:
    """Raises a ValueError unless pretraining is finished in the run directory."""
    if not loop.is_finished(study.pretrain_leg):
        raise ValueError(f"no finished pretraining in {study.directory}: run `jaxsafety pretrain` on it first")


def tune(study: Study) -> dict[str, TrainState]:
    """Tunes every method from the pretrained models; returns method label to final states ``[h, s, ...]``."""
    base = programs.at_once(lambda states: tree.lane(states, 0), pretrained(study))

    def one(label: str) -> TrainState:
        done = loop.is_finished(study.tune_leg(label))
        return tuned_method(study, label) if done else tune_together((study,), label, base)

    return {label: one(label) for label in study.recipe.tune.methods}


def tuned_method(study: Study, label: str) -> TrainState:
    """Returns the finished states ``[h, s, ...]`` of one method.

    Raises:
        ValueError: corrupt or missing checkpoint.
        FloatingPointError: every lane of it has diverged.
    """
    return loop.load(study.tune_leg(label), tune_shapes((study,), label), grid=study.tune_grid)


def tune_together(studies: Sequence[Study], label: str, base: TrainState) -> TrainState:
    """Tunes a method of unfinished studies of one part of :func:`in_step` from one pretraining, as one program.

    They differ in traced scalars; ``base`` holds the pretrained states ``[s, ...]``.

    Returns:
        The final states ``[h, s, ...]``: the learning rates of the first study, then those of the next.

    Raises:
        FloatingPointError: every lane of every study has diverged.
    """
    study, grid = studies[0], _side_by_side([study.tune_grid for study in studies])
    return loop.train(
        lanes.tune_chunk(study.recipe, study.world, study.recipe.tune.methods[label]),
        partial(_tune_start, base, label, *studies),
        readout=_readout(study),
        per_seed=(study.roots, base.params),
        points=_tune_points(studies, label),
        grid=grid,
        legs=[study.tune_leg(label) for study in studies],
    )


def adopt(study: Study, label: str, params: Params) -> None:
    """Records models ``[h, s, ...]`` that were trained elsewhere as those that pretraining, or a method, ends with.

    The study's stages have a single chunk and no snapshots; ``label`` is ``PRETRAINED`` or a method's. The optimiser's
    state is zeros: nothing goes on from it.
    """
    is_base = label == PRETRAINED
    leg, grid = (study.pretrain_leg, study.pretrain_grid) if is_base else (study.tune_leg(label), study.tune_grid)
    like = pretrain_shapes((study,)) if is_base else tune_shapes((study,), label)
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    done, alive = np.full_like(empty.step, leg.steps), np.ones_like(empty.finite)
    loop.adopt(empty.replace(params=params, step=done, finite=alive), _readout(study), grid=grid, leg=leg)


def snapshots(study: Study, *, step: int) -> dict[str, tuple[Params, Array]]:
    """Returns every method's parameters ``[h, s, ...]`` and which lanes lived ``[h, s]`` after ``step`` tuning steps.

    Raises:
        ValueError: there is no such snapshot, or it is damaged.
    """
    return {
        label: loop.load_snapshot(study.tune_leg(label), tune_shapes((study,), label), grid=study.tune_grid, step=step)
        for label in study.recipe.tune.methods
    }


def tuned(study: Study) -> dict[str, TrainState]:
    """Returns the finished states of every method, or raises as :func:`check_tuned`."""
    check_tuned(study)
    return tune(study)


def check_tuned(study: Study) -> None:
    """Raises a ValueError unless pretraining and every method are finished in the run directory."""
    check_pretrained(study)
    for label in study.recipe.tune.methods:
        if not loop.is_finished(study.tune_leg(label)):
            raise ValueError(f"no finished {label} in {study.directory}: run `jaxsafety tune` on it first")
