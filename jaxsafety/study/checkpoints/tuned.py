"""One seed of one model trained over a checkpoint: from the newest state to the last step, then written as a model."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety import tree
from jaxsafety.engine import memory, programs
from jaxsafety.engine.legs import Leg
from jaxsafety.formats import hf
from jaxsafety.formats.hf_names import leaf_shapes
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import checkpoint, metrics_file, progress, signals
from jaxsafety.study.checkpoints import export, program, references
from jaxsafety.study.checkpoints import places as placing
from jaxsafety.study.checkpoints.examples import Encoded
from jaxsafety.study.checkpoints.job import Job
from jaxsafety.study.checkpoints.places import Places
from jaxsafety.types import Metrics, Params, PreferenceBatch, TrainState

# Seconds between two saves of the state; it may be larger than the model.
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Plan:
    """What a run holds and takes on one device, known from shapes alone.

    ``parameters`` of the model are counted, and the ``trained`` ones of them, or beside them. Bytes are those of the
    weights that stay as they are, of what is tuned with the optimiser's state, of the examples, of what XLA plans for
    the steps beside these, and of the device that are free.
    """

    parameters: int
    trained: int
    frozen_bytes: int
    state_bytes: int
    data_bytes: int
    step_bytes: int
    free_bytes: int


class Adapter(NamedTuple):
    """The directory of an adapter to be, and what names the model that it is of: a directory, or on the Hub."""

    directory: Path
    base: str
    revision: str | None


class Work(NamedTuple):
    """Where one seed of a model is made.

    ``name`` is for progress and messages, ``leg`` the stretch of training that it is of, ``state`` the folder of what a
    killed training goes on from, ``model`` the directory to be, whose weights are stored in ``dtype``, and ``adapter``
    what is written of it beside that, or where ``model`` is None.
    """

    name: str
    leg: Leg
    state: Path
    model: Path | None
    dtype: hf.ParamsDtype
    adapter: Adapter | None = None


class _Shapes(NamedTuple):
    """Shapes of what a chunk takes, with their places on the devices."""

    state: TrainState
    frozen: Params
    data: Any
    own: program.Own
    steps: jax.ShapeDtypeStruct


def plan(model: LlamaConfig, encoded: Encoded, job: Job, *, places: Places) -> Plan:
    """Returns what a run would need; nothing is loaded.

    Raises:
        ValueError: a batch larger than the data.
    """
    shapes = _shapes(model, encoded, job, places)
    _, need = programs.planned(_chunk(model, job, shapes, places), *shapes, donate=(0,))
    held = [memory.size(part) for part in (shapes.frozen, shapes.state, shapes.data)]
    total = sum(math.prod(shape) for shape in leaf_shapes(model).values())
    return Plan(total, tree.count(shapes.state.params), *held, need - sum(held), memory.available())


def write(
    start: hf.Checkpoint, encoded: Encoded, work: Work, job: Job, *, places: Places, reference: hf.Checkpoint
) -> None:
    """Trains a checkpoint to the last step, from the newest state, and writes the model.

    ``reference`` is what the method's reference is read from, which may be ``start``. The run directory is held by the
    caller. Once the model is there nothing else of the training is kept.

    Raises:
        ValueError: it does not fit into memory, a tensor is not finite, or a saved state is damaged.
        FloatingPointError: the loss or a gradient has become infinite or NaN.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; what was done is saved.
    """
    model = start.config
    shapes = _shapes(model, encoded, job, places)
    chunk, own = _compiled(_Program.of(model, job, shapes, places)), program.own(job)
    data, other = encoded.batch, reference.directory != start.directory
    if job.how.asks_reference and other:
        data = _referenced(reference, data, shapes, work, job, places)
    state, frozen = _begin(start, shapes, work, job, places)
    if job.how.asks_reference and not other:
        data = references.referenced(data, state, frozen, work.state, model=model, job=job, places=places)
    data = jax.device_put(data, places.everywhere)

    def advance(state: TrainState, steps: int) -> tuple[TrainState, Metrics]:
        return chunk(state, frozen, data, *jax.device_put((own, jnp.int32(steps)), places.everywhere))

    state = _train(advance, state, work, job)
    # First, as the model says that all is there.
    if work.adapter is not None:
        export.write_adapter(start, state.params, job, **work.adapter._asdict())
    if work.model is not None:
        export.write(start, state.params, work.model, job, dtype=work.dtype)
    shutil.rmtree(work.state, ignore_errors=True)


def _referenced(
    reference: hf.Checkpoint, data: Any, shapes: _Shapes, work: Work, job: Job, places: Places
) -> PreferenceBatch:
    """The examples with what another model than the first says of them, which leaves memory before that is loaded."""
    if references.is_there(work.state):
        return references.kept(data, shapes.state, shapes.frozen, work.state, model=reference.config, job=job)
    state, frozen = _first(reference, shapes, job, places)
    return references.referenced(data, state, frozen, work.state, model=reference.config, job=job, places=places)


def _train(
    advance: Callable[[TrainState, int], tuple[TrainState, Metrics]], state: TrainState, work: Work, job: Job
) -> TrainState:
    how, done, saved = job.how, int(state.step), time.monotonic()
    shared = work.leg.labels | {"seed": job.seed}
    metrics_file.truncate_metrics(work.leg.directory, of=[shared], after_step=done)
    with progress.track(how.steps, label=f"tune {work.name}", start=done) as update:
        while done < how.steps:
            end = work.leg.chunk_end(done)
            state, metrics = advance(state, end - done)
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if numbers["finite"] < 1:
                raise FloatingPointError(
                    f"{work.name}: the loss or its gradient is not finite between steps {done} and {end}: expected a "
                    f"lower learning rate than {how.lr:g}"
                )
            done = end
            metrics_file.append_metrics(work.leg.directory, [shared | {"step": done} | numbers])
            # Asked once: what comes after the save is seen a chunk later.
            stopping = bool(signals.asked())
            if done == how.steps or stopping or time.monotonic() - saved > _SAVE_EVERY_S:
                checkpoint.save(work.state, state, step=done, keep=1)
                saved = time.monotonic()
            update(done, {name: numbers[name] for name in ("loss", "grad_norm")})
            if stopping and done < how.steps:
                signals.check(f"after step {done} of tune {work.name}")
    return state


def _begin(start: hf.Checkpoint, shapes: _Shapes, work: Work, job: Job, places: Places) -> tuple[TrainState, Params]:
    """The newest state there, or the first, with the weights that stay as they are."""
    if checkpoint.latest(work.state) is None:
        return _first(start, shapes, job, places)
    params = {} if job.is_full else _weights(start, job.about.dtype, places)
    return checkpoint.load(work.state, shapes.state)[0], params


def _first(start: hf.Checkpoint, shapes: _Shapes, job: Job, places: Places) -> tuple[TrainState, Params]:
    """The state before the first step from a checkpoint, with the weights that stay as they are."""
    dtype = "float32" if job.is_full else job.about.dtype
    state, frozen = program.start(_weights(start, dtype, places), job)
    return (state if places.mesh is None else jax.device_put(state, placing.of(shapes.state))), frozen


def _weights(start: hf.Checkpoint, dtype: hf.ParamsDtype, places: Places) -> Params:
    return hf.load(start.directory, dtype=dtype, shardings=places.rule, ignored=start.ignored)[1]


@dataclass(frozen=True)
class _Program:
    """A chunk's program: two of the same ``static`` are one, whatever their seeds and traced scalars."""

    static: Hashable
    model: LlamaConfig = field(compare=False)
    job: Job = field(compare=False)
    shapes: _Shapes = field(compare=False)
    places: Places = field(compare=False)

    @classmethod
    def of(cls, model: LlamaConfig, job: Job, shapes: _Shapes, places: Places) -> _Program:
        """The program of a job."""
        leaves, structure = jax.tree.flatten(shapes)
        sizes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        static = (model, job.how.program, job.about.dtype, job.about.recompute, sizes, structure, places.mesh)
        return cls(static, model, job, shapes, places)


@cache
def _compiled(wanted: _Program) -> program.Chunk:
    """The program compiled, once for all seeds and points that it trains."""
    run = _chunk(wanted.model, wanted.job, wanted.shapes, wanted.places)
    what = f"training with {wanted.job.part_size} sequences at a time"
    return programs.fitted(run, *wanted.shapes, donate=(0,), what=what)


def _chunk(model: LlamaConfig, job: Job, shapes: _Shapes, places: Places) -> program.Chunk:
    """The program of a chunk, whose state comes out where it went in."""
    run = program.chunk(model, job, batches=places.sequences(job.part_size))
    if places.mesh is None:
        return run

    def placed(
        state: TrainState, frozen: Params, data: Any, own: program.Own, steps: Int[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        state, metrics = run(state, frozen, data, own, steps)
        return jax.lax.with_sharding_constraint(state, placing.of(shapes.state)), metrics

    return placed


def _shapes(model: LlamaConfig, encoded: Encoded, job: Job, places: Places) -> _Shapes:
    dtype = jnp.dtype("float32" if job.is_full else job.about.dtype)
    flat = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in leaf_shapes(model).items()}
    state, frozen = jax.eval_shape(partial(program.start, job=job), tree.unflatten(flat))
    data = encoded.batch
    if job.how.asks_reference:
        data = data.replace(reference=references.shapes(data, state, frozen, model=model, job=job))
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    own = jax.eval_shape(lambda: program.own(job))
    copied = (places.copied(part) for part in (data, own, steps))
    return _Shapes(places.split(state), places.split(frozen), *copied)
