"""The stages of a recipe: pretrain -> tune -> evaluate -> report, each from run directory to run directory.

Every stage can be killed and started again; a finished one is not repeated. Lanes that agree in all but traced scalars
and all seeds of them are one program, whatever models they begin with; see :mod:`jaxsafety.recipe.graph`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxsafety import keys, tree, world
from jaxsafety.engine import hosts, loop, programs, sweep
from jaxsafety.engine.loop import Leg
from jaxsafety.engine.programs import Grid
from jaxsafety.keys import Stream
from jaxsafety.recipe import graph
from jaxsafety.recipe.graph import Lane
from jaxsafety.recipe.schema import Recipe
from jaxsafety.rundir import layout
from jaxsafety.study import lanes
from jaxsafety.types import HParams, Metrics, Params, Strategy, TrainState, Trial
from jaxsafety.world import Condition, World


class Trained(NamedTuple):
    """Parameters ``[h, s, ...]`` of finished lanes, and ``[h, s]`` whether each lives."""

    params: Params
    finite: Bool[Array, "h s"]


@dataclass(frozen=True)
class Study:
    """A recipe made ready to run.

    The world is built and the strategy resolved; ``directory`` is the run's.
    """

    recipe: Recipe
    world: World
    strategy: Strategy
    directory: Path

    def leg(self, lane: Lane) -> Leg:
        """The leg of one lane."""
        how = lane.training
        return Leg(
            self.directory, lane.stage, lane.name, lane.label, lane.point, how.lr, how.steps, how.chunk_steps,
            how.snapshot_steps,
        )  # fmt: skip

    def grid(self, rows: int) -> Grid:
        """So many rows of lanes, all seeds."""
        return Grid(self.recipe.seeds, rows, self.strategy)

    def stage_lanes(self, stage: str) -> tuple[Lane, ...]:
        """The lanes that a stage trains."""
        return tuple(lane for lane in self.recipe.lanes if lane.stage == stage)

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


def points(group: Sequence[Lane]) -> HParams:
    """Returns the traced scalars ``[h]`` of the lanes of one program."""

    def column(values: Iterable[float]) -> Array:
        return jnp.asarray(list(values), jnp.float32)

    scalars = [lane.training.scalars for lane in group]
    parts = {
        part: {name: column(one[part][name] for one in scalars) for name in scalars[0][part]} for part in scalars[0]
    }
    return HParams(peak_lr=column(lane.training.lr for lane in group), **parts)


def _start(study: Study, group: Sequence[Lane], parents: Trained | None) -> TrainState:
    """The stacked states ``[h, s]`` before training, from the lanes' ``parents``, or fresh.

    A seed that diverged in a parent stays frozen: what is trained from it is no result.
    """
    training, grid = group[0].training, study.grid(len(group))

    def init(before: Trained | Array, key: Array, point: HParams) -> TrainState:
        if parents is None:
            params = lanes.init_params(study.recipe, study.world, key=key)
            return lanes.init_state(training, params, key=key, point=point)
        state = lanes.init_state(training, before.params, key=key, point=point)
        return state.replace(finite=before.finite)

    return programs.program(init, grid=grid)(grid.zeros() if parents is None else parents, study.roots, points(group))


def shapes(study: Study, group: Sequence[Lane]) -> TrainState:
    """Returns the shapes ``[h, s, ...]`` of what the training of a group holds, without computing it."""
    size = (len(group), len(study.recipe.seeds))
    parents = None
    if group[0].parent is not None:
        parents = Trained(_param_shapes(study, *size), jax.ShapeDtypeStruct(size, bool))
    return jax.eval_shape(lambda parents: _start(study, group, parents), parents)


def _param_shapes(study: Study, *lanes_: int) -> Params:
    one = jax.eval_shape(lambda: lanes.init_params(study.recipe, study.world, key=keys.root(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lanes_, *leaf.shape), leaf.dtype), one)


def per_seed(study: Study, run: Callable[[Array], Any]) -> Any:
    """Returns ``run(root key)`` of every seed, ``[s, ...]``, placed as the strategy wants it."""
    grid = study.grid(1)
    lanes_out = programs.program(lambda _, key, __: run(key), grid=grid)(grid.zeros(), study.roots, jnp.zeros(1))
    return programs.at_once(lambda found: tree.lane(found, 0), lanes_out)


def draw_prompts(study: Study, condition: str | Condition, *, stream: Stream, late_probability: float) -> Trial:
    """Draws the prompts ``[s, n, b, ...]`` of a condition for every seed; see :func:`jaxsafety.study.lanes.prompts`.

    The stages that ask for the same condition share a compiled program, since stream and probability are inputs.
    """
    grid = study.grid(1)
    streams = jax.vmap(lambda root: keys.stream(root, stream))(study.roots)

    def draw(_: Any, key: Array, __: Any, late: Array) -> Trial:
        return lanes.prompts(study.recipe, study.world, condition=condition, key=key, late_probability=late)

    drawn = programs.program(draw, grid=grid)(grid.zeros(), streams, jnp.zeros(1), jnp.float32(late_probability))
    return programs.at_once(lambda found: tree.lane(found, 0), drawn)


def _readout(study: Study) -> loop.Readout:
    def read(params: Params, trials: Any, _: Any) -> Metrics:
        return lanes.readout(study.recipe, study.world, params, trials)

    return read, per_seed(study, lambda key: lanes.readout_prompts(study.recipe, study.world, key=key))


def train(study: Study, stage: str) -> None:
    """Trains the lanes of ``pretrain`` or ``tune`` that are not finished, group by group.

    Raises:
        ValueError: the stage before is not finished; a corrupt or missing checkpoint.
        FloatingPointError: every lane of a model has diverged.
        Stopped: a signal has asked to stop; what was done is saved.
    """
    if stage == "tune":
        check_trained(study, "pretrain")
    for group in graph.groups(study.stage_lanes(stage)):
        by_leg = {study.leg(lane): lane for lane in group}
        for part in loop.in_step(list(by_leg)):
            _train(study, [by_leg[leg] for leg in part])
        loop.forget_optimizers(list(by_leg))
    load_living(study, study.stage_lanes(stage))


def _train(study: Study, group: Sequence[Lane]) -> None:
    """Trains lanes of one group, which have a step in common, as one program."""
    parents = load(study, [lane.parent for lane in group]) if group[0].parent is not None else None
    references = [lane.reference for lane in group]
    same = references == [lane.parent for lane in group]
    given = {} if references[0] is None else (parents if same else load(study, references)).params
    loop.train(
        lanes.train_chunk(study.recipe, study.world, group[0]),
        partial(_start, study, group, parents),
        readout=_readout(study),
        given=given,
        per_seed=study.roots,
        points=points(group),
        grid=study.grid(len(group)),
        legs=[study.leg(lane) for lane in group],
    )


def load(study: Study, wanted: Sequence[Lane], *, step: int | None = None) -> Trained:
    """Returns finished lanes ``[h, s, ...]``, one row each, or what they were after a ``step`` with a snapshot.

    A corrupt or missing checkpoint, or snapshot, is a ValueError.
    """
    grid = study.grid(1)
    like = _param_shapes(study, len(grid.seeds))
    by_name = {lane.name: lane for lane in wanted}
    rows = {name: Trained(**loop.load(study.leg(lane), like, grid=grid, step=step)) for name, lane in by_name.items()}
    places = [list(rows).index(lane.name) for lane in wanted]
    return programs.at_once(lambda *found: tree.stack([found[place] for place in places]), *rows.values())


def load_living(study: Study, wanted: Sequence[Lane]) -> Trained:
    """Returns finished lanes, all of some models; see :func:`load`.

    Raises:
        ValueError: corrupt or missing checkpoint.
        FloatingPointError: every lane of one of the models has diverged.
    """
    found = load(study, wanted)
    alive = {lane.label for lane, lives in zip(wanted, hosts.fetch(found.finite), strict=True) if np.any(lives)}
    for lane in wanted:
        if lane.label not in alive:
            raise FloatingPointError(f"every lane of {lane.stage} {lane.label} diverged: lower its learning rate")
    return found


def is_finished(study: Study, stage: str) -> bool:
    """Whether a stage has nothing left to do in the run directory."""
    if stage in ("pretrain", "tune"):
        return all(loop.is_finished(study.leg(lane)) for lane in study.stage_lanes(stage))
    return hosts.decide(lambda: layout.finished_files(study.directory, stage))


def check_ready(study: Study, stage: str) -> None:
    """Raises a ValueError unless the stages before ``stage`` are finished."""
    if stage == "tune":
        check_trained(study, "pretrain")
    elif stage in ("evaluate", "analyze"):
        check_trained(study)
    elif stage == "report" and not is_finished(study, "evaluate"):
        raise ValueError(f"no results in {study.directory}: run `jaxsafety evaluate` on it first")


def steps(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Returns the steps of every lane by model and name, for :mod:`jaxsafety.rundir.status`."""
    return {label: {lane.name: lane.training.steps for lane in recipe.lanes_of(label)} for label in recipe.models}


def own_grammars(recipe: Recipe) -> dict[str, str]:
    """Returns the contents of the user's own grammar files, by the name that the run directory keeps them under."""
    return {f"{condition}.pcfg": Path(path).read_text() for condition, path in recipe.grammars.items()}


def check_trained(study: Study, *stages: str) -> None:
    """Raises a ValueError unless all models of some stages, or of both, are finished in the run directory."""
    for stage in stages or ("pretrain", "tune"):
        for lane in study.stage_lanes(stage):
            if not loop.is_finished(study.leg(lane)):
                raise ValueError(f"no finished {lane.name} in {study.directory}: run `jaxsafety {stage}` on it first")


def adopt(study: Study, adopted: Sequence[Lane], params: Params) -> None:
    """Records models ``[h, s, ...]`` that were trained elsewhere as those that lanes end with.

    They have a single chunk and no snapshots.
    """
    legs, grid = [study.leg(lane) for lane in adopted], study.grid(len(adopted))
    loop.adopt(params, _readout(study), grid=grid, legs=legs)
