"""The stages of a recipe: pretrain -> tune -> evaluate -> analyze -> report, each from run directory to run directory.

Every stage can be killed and started again; a finished one is not repeated. Lanes that agree in all but traced scalars
and all seeds of them are one program, whatever models they begin with; see :mod:`jaxsafety.recipe.graph`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxsafety import keys, tree
from jaxsafety.config.names import check_name
from jaxsafety.config.told import told_of
from jaxsafety.engine import hosts, legs, programs, sweep
from jaxsafety.engine.legs import Leg
from jaxsafety.engine.programs import Grid
from jaxsafety.formats.hf_config import CONFIG_FILE
from jaxsafety.formats.peft_config import ADAPTER_FILE
from jaxsafety.formats.sources import Source
from jaxsafety.keys import Stream
from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Edited, Given, Reused
from jaxsafety.recipe.schema import Recipe, as_dict
from jaxsafety.rundir import layout, opening
from jaxsafety.study import lanes
from jaxsafety.types import Opened, Params, Strategy


class Trained(NamedTuple):
    """Parameters ``[h, s, ...]`` of finished lanes, and ``[h, s]`` whether each lives."""

    params: Params
    finite: Bool[Array, "h s"]


@dataclass(frozen=True)
class Study:
    """A recipe made ready to run.

    Its subject is opened, None where models are files, and the strategy resolved; ``directory`` is the run's. Where
    models are files ``sources`` are those that are given, by what names them.
    """

    recipe: Recipe
    subject: Opened | None
    strategy: Strategy
    directory: Path
    sources: Mapping[str, Source] = field(default_factory=dict)

    def leg(self, lane: Lane) -> Leg:
        """The leg of one lane."""
        chunk = 1 if lane.training is None else lane.training.chunk_steps
        return Leg(
            self.directory, lane.stage, lane.name, lane.label, lane.point, lane.lr, lane.steps, chunk,
            lane.snapshot_steps,
        )  # fmt: skip

    def model(self, lane: Lane, seed: int) -> Path:
        """Where models are files: the directory of one seed of a lane."""
        if isinstance(lane.how, Given):
            return self.located(lane.how.named(seed))
        return self.directory / layout.MODELS / lane.name / f"seed_{seed}"

    def adapter(self, lane: Lane, seed: int) -> Path:
        """Where models are files: the directory of the adapter that one seed of a lane is trained as."""
        return self.directory / layout.ADAPTERS / lane.name / f"seed_{seed}"

    def exported(self, lane: Lane) -> str:
        """Where models are files: what is written of a lane, ``merged``, ``adapter`` or ``both``."""
        adapted = lane.training is not None and lane.training.parametrisation.kind == "lora"
        return self.recipe.subject.options.export if adapted else "merged"

    def is_written(self, lane: Lane, seed: int) -> bool:
        """Where models are files: whether one seed of a lane is there."""
        if self.exported(lane) == "adapter":
            return (self.adapter(lane, seed) / ADAPTER_FILE).is_file()
        return (self.model(lane, seed) / CONFIG_FILE).is_file()

    def located(self, named: str) -> Path:
        """The directory of a model that is given, by what names it."""
        return self.sources[named].directory if named in self.sources else Path(named)

    @property
    def about(self) -> Any:
        """The subject's fields, where models are files, with the directory of its tokenizer."""
        own = self.recipe.subject.options
        return own if own.tokenizer is None else replace(own, tokenizer=self.located(str(own.tokenizer)))

    def is_made(self, lane: Lane) -> bool:
        """Whether a lane is there, of all seeds."""
        if not self.recipe.subject.of_files:
            return legs.is_finished(self.leg(lane))
        return hosts.decide(lambda: all(self.is_written(lane, seed) for seed in self.recipe.seeds))

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

    @property
    def places(self) -> Array:
        """Places of the seeds, ``[s]``, for :meth:`of_seed`."""
        return jnp.arange(len(self.recipe.seeds))

    def of_seed(self, place: Array | int) -> Opened:
        """The subject as the seed in one place finds it; the place may be traced."""
        find = self.subject.of_seeds
        return self.subject if find is None else find(self.recipe.seeds)(place)


def prepare(recipe: Recipe, directory: Path) -> Study:
    """Opens the subject and resolves the strategy; the first thing to touch a device. Raises ValueError."""
    opened = recipe.subject.load().open(recipe.subject.options)
    base = jax.eval_shape(lambda: lanes.init_params(opened, key=keys.root(0)))
    for label, node in recipe.edits.items():
        with told_of(f"edits.{label}", module=type(node.options).__module__):
            node.points(base)
    for lane in recipe.lanes:
        if lane.training is not None and lane.parent is not None:
            _check_part(lane, base)
        if isinstance(lane.how, Edited) and (points := lane.how.load().points):
            with told_of(f"models.{lane.label}", module=type(lane.how.options).__module__):
                points(lane.how.options, base)
    study = Study(recipe, opened, sweep.resolve(recipe.strategy, seeds=len(recipe.seeds)), directory)
    study.of_seed(0)  # every seed's own data, which there may be none of
    for lane in recipe.lanes:
        if isinstance(lane.how, Reused) and not legs.is_finished(study.leg(lane)):
            source(study, lane)
    return study


def param_shapes(study: Study, *lanes_: int) -> Params:
    """Returns the shapes of the parameters of a model, behind axes of these sizes."""
    one = jax.eval_shape(lambda: lanes.init_params(study.subject, key=keys.root(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lanes_, *leaf.shape), leaf.dtype), one)


def per_seed(study: Study, run: Callable[[Array, Array], Any]) -> Any:
    """Returns ``run(root key, place)`` of every seed, ``[s, ...]``, placed as the strategy wants it."""
    grid = study.grid(1)
    lanes_out = programs.program(lambda _, seed, __: run(*seed), grid=grid, quick=True)(
        grid.zeros(), (study.roots, study.places), jnp.zeros(1)
    )
    return programs.at_once(lambda found: tree.lane(found, 0), lanes_out)


def draw_prompts(study: Study, condition: Any, *, stream: Stream, late_probability: float) -> Any:
    """Draws the prompts ``[s, n, b, ...]`` of a condition for every seed; see :func:`jaxsafety.study.lanes.prompts`.

    The stages that ask for the same condition share a compiled program, since stream and probability are inputs.
    """
    grid = study.grid(1)
    streams = jax.vmap(lambda root: keys.stream(root, stream))(study.roots)

    def draw(_: Any, seed: tuple[Array, Array], __: Any, late: Array) -> Any:
        key, place = seed
        given = {"condition": condition, "key": key, "late_probability": late}
        return lanes.prompts(study.of_seed(place), study.recipe.evaluate, **given)

    drawn = programs.program(draw, grid=grid, quick=True)(
        grid.zeros(), (streams, study.places), jnp.zeros(1), jnp.float32(late_probability)
    )
    return programs.at_once(lambda found: tree.lane(found, 0), drawn)


def load(study: Study, wanted: Sequence[Lane], *, step: int | None = None) -> Trained:
    """Returns finished lanes ``[h, s, ...]``, one row each, or what they were after a ``step`` with a snapshot.

    A corrupt or missing checkpoint, or snapshot, is a ValueError.
    """
    grid = study.grid(1)
    like = param_shapes(study, len(grid.seeds))
    by_name = {lane.name: lane for lane in wanted}
    rows = {name: Trained(**legs.load(study.leg(lane), like, grid=grid, step=step)) for name, lane in by_name.items()}
    return _stacked([rows[lane.name] for lane in wanted], grid)


def _stacked(rows: Sequence[Trained], grid: Grid) -> Trained:
    """Rows ``[s, ...]`` as ``[h, s, ...]``, on the host where it can be: a program of many rows compiles for long."""
    if jax.process_count() > 1:
        return programs.at_once(lambda *found: tree.stack(found), *rows)
    whole = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(rows))
    return jax.device_put(whole, sweep.seed_sharding(grid.strategy, seeds=len(grid.seeds), axis=1))


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
        return all(map(study.is_made, study.stage_lanes(stage)))
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
    """Returns the steps of every lane by model and name, for :mod:`jaxsafety.rundir.status`.

    Where models are files every seed has its own, and those that are given have nothing to do.
    """
    if not recipe.subject.of_files:
        return {label: {lane.name: lane.steps for lane in recipe.lanes_of(label)} for label in recipe.models}
    found: dict[str, dict[str, int]] = {}
    for lane in recipe.lanes:
        for seed in () if isinstance(lane.how, Given) else recipe.seeds:
            found.setdefault(lane.label, {})[f"{lane.name}/seed_{seed}"] = lane.steps
    return found


def own_files(recipe: Recipe) -> dict[str, str]:
    """Returns the contents of the user's files that the subject is made of, by the name that a run keeps them under."""
    return {name: path.read_text() for name, path in getattr(recipe.subject.options, "files", {}).items()}


def subject_told(recipe: Recipe, files: Mapping[str, str]) -> dict[str, Any]:
    """Returns the subject as flat data in which its files count by their content, wherever they lie."""
    told = as_dict(recipe.subject)
    told.pop("grammars", None)
    if "world.yaml" in files:
        del told["world"]
    digests = {f"file {name}": sha256(text.encode()).hexdigest()[:8] for name, text in files.items()}
    return opening.flat({"subject": told}) | digests


def check_trained(study: Study, *stages: str) -> None:
    """Raises a ValueError unless all models of some stages, or of both, are finished in the run directory."""
    for stage in stages or ("pretrain", "tune"):
        for lane in study.stage_lanes(stage):
            if not study.is_made(lane):
                raise ValueError(f"no finished {lane.name} in {study.directory}: run `jaxsafety {stage}` on it first")


def _check_part(lane: Lane, base: Params) -> None:
    """Checks that what is trained of a model is there."""
    part = lane.training.parametrisation
    with told_of(f"models.{lane.label}.parametrisation", module=type(part.options).__module__):
        trees = dict.fromkeys(["parent", *lane.trees], base)
        jax.eval_shape(lambda trees: part.load().init(trees, config=part.options, key=keys.root(0)), trees)


def source(study: Study, lane: Lane) -> tuple[Study, Lane]:
    """The run that a lane is reused from, and the lane there.

    Raises:
        ValueError: no such run or lane, one of another subject, a seed that it has not, or not finished.
    """
    where, directory = f"models.{lane.label}.from", Path(lane.how.run)
    recipe = yaml_file.recorded(directory) if (directory / "config.yaml").is_file() else None
    if recipe is None:
        raise ValueError(f"{where}: no run of a study in {directory}: expected a directory that `jaxsafety run` made")
    by_name = {one.name: one for one in recipe.lanes}
    check_name(f"model in {where}", lane.how.model, by_name)
    kept = {path.name: path.read_text() for path in (directory / layout.FILES).glob("*")}
    own, there = subject_told(study.recipe, own_files(study.recipe)), subject_told(recipe, kept)
    for name in own | there:
        if own.get(name) != there.get(name):
            raise ValueError(
                f"{where}: {name} is {there.get(name)!r} in {directory}, expected {own.get(name)!r} as in this study"
            )
    if missing := sorted(set(study.recipe.seeds) - set(recipe.seeds)):
        raise ValueError(f"{where}: {directory} has the seeds {list(recipe.seeds)}, expected {missing[0]} among them")
    if (there := by_name[lane.how.model].generation) != lane.generation:
        raise ValueError(f"{where}.generation: got {lane.generation}, expected the {there} of {lane.how.model}")
    if lane.parent is not None:
        began, given = by_name[lane.how.model].parent, lane.parent.how
        same = isinstance(given, Reused) and given.run == lane.how.run
        if began is None or not same or given.model != began.name:
            wanted = "none" if began is None else f"a model that is {began.name} of the same run"
            raise ValueError(
                f"{where}.parent: got {lane.parent.name}, expected {wanted}, as {lane.how.model} began with "
                f"{'fresh parameters' if began is None else 'that'}"
            )
    other, found = Study(recipe, study.subject, study.strategy, directory), by_name[lane.how.model]
    if not legs.is_finished(other.leg(found)):
        raise ValueError(f"{where}: {found.name} is not finished in {directory}: run `jaxsafety {found.stage}` there")
    return other, found
