"""A checkpoint tuned in a run directory: from the newest state there to the last step, and then written as a model."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety import tree
from jaxsafety.engine import memory, programs
from jaxsafety.formats import hf
from jaxsafety.formats.hf_names import leaf_shapes
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import checkpoint, metrics_file, progress, signals
from jaxsafety.study.tuning import export, program, references
from jaxsafety.study.tuning import places as placing
from jaxsafety.study.tuning.examples import Encoded
from jaxsafety.study.tuning.options import TuningConfig
from jaxsafety.study.tuning.places import Places
from jaxsafety.types import Metrics, Params, TrainState

MODEL = "model"
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


class _Shapes(NamedTuple):
    """Shapes of what a chunk takes, with their places on the devices."""

    state: TrainState
    frozen: Params
    data: Any
    steps: jax.ShapeDtypeStruct


def plan(model: LlamaConfig, encoded: Encoded, config: TuningConfig, *, places: Places) -> Plan:
    """Returns what a run would need; nothing is loaded.

    Raises:
        ValueError: a batch larger than the data.
    """
    shapes = _shapes(model, encoded, config, places)
    _, need = programs.planned(_chunk(model, config, shapes, places), *shapes, donate=(0,))
    held = [memory.size(part) for part in (shapes.frozen, shapes.state, shapes.data)]
    total = sum(math.prod(shape) for shape in leaf_shapes(model).values())
    return Plan(total, tree.count(shapes.state.params), *held, need - sum(held), memory.available())


def write(opened: hf.Checkpoint, encoded: Encoded, directory: Path, config: TuningConfig, *, places: Places) -> Path:
    """Tunes a checkpoint to the last step, from the newest state in ``directory``, and returns where the model is.

    The run directory is held by the caller, and ``config`` recorded there.

    Raises:
        ValueError: it does not fit into memory, a tensor is not finite, or a saved state is damaged.
        FloatingPointError: the loss or a gradient has become infinite or NaN.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; the state is saved.
    """
    if (directory / MODEL).is_dir():
        return directory / MODEL
    model = opened.config
    shapes = _shapes(model, encoded, config, places)
    what = f"tuning with {config.batch_size // config.accumulate} sequences at a time"
    chunk = programs.fitted(_chunk(model, config, shapes, places), *shapes, donate=(0,), what=what)
    state, frozen = _begin(opened, shapes, directory, config, places)
    data = encoded.batch
    if config.load().reference is not None:
        data = references.referenced(data, state, frozen, directory, model=model, config=config, places=places)
    data = jax.device_put(data, places.everywhere)

    def advance(state: TrainState, steps: int) -> tuple[TrainState, Metrics]:
        return chunk(state, frozen, data, jax.device_put(jnp.int32(steps), places.everywhere))

    state = _train(advance, state, directory, config)
    export.write(opened, state.params, directory / MODEL, config)
    return directory / MODEL


def _train(
    advance: Callable[[TrainState, int], tuple[TrainState, Metrics]],
    state: TrainState,
    directory: Path,
    config: TuningConfig,
) -> TrainState:
    label, done, saved = f"tune {config.method}", int(state.step), time.monotonic()
    metrics_file.truncate_metrics(directory, of=[{"stage": "tune", "method": config.method}], after_step=done)
    with progress.track(config.steps, label=label, start=done) as update:
        while done < config.steps:
            steps = min(config.chunk_steps, config.steps - done)
            state, metrics = advance(state, steps)
            done += steps
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if numbers["finite"] < 1:
                raise FloatingPointError(
                    f"the loss or its gradient is not finite between steps {done - steps} and {done}: expected a "
                    f"lower learning rate than {config.lr:g}"
                )
            labels = {"stage": "tune", "method": config.method, "lr": config.lr, "seed": config.seed, "step": done}
            metrics_file.append_metrics(directory, [labels | numbers])
            # Asked once: what comes after the save is seen a chunk later.
            stopping = bool(signals.asked())
            if done == config.steps or stopping or time.monotonic() - saved > _SAVE_EVERY_S:
                checkpoint.save(directory / "checkpoints", state, step=done, keep=1)
                saved = time.monotonic()
            update(done, {name: numbers[name] for name in ("loss", "grad_norm")})
            if stopping and done < config.steps:
                signals.check(f"after step {done} of {label}")
    return state


def _begin(
    opened: hf.Checkpoint, shapes: _Shapes, directory: Path, config: TuningConfig, places: Places
) -> tuple[TrainState, Params]:
    """The newest state there, or the first, with the weights that stay as they are."""
    full, folder = config.lora_rank is None, directory / "checkpoints"
    resumes, params = checkpoint.latest(folder) is not None, {}
    if not (full and resumes):
        _, params = hf.load(opened.directory, dtype="float32" if full else config.dtype, shardings=places.rule)
    if resumes:
        return checkpoint.load(folder, shapes.state)[0], params
    state, frozen = program.start(params, config)
    return (state if places.mesh is None else jax.device_put(state, placing.of(shapes.state))), frozen


def _chunk(model: LlamaConfig, config: TuningConfig, shapes: _Shapes, places: Places) -> program.Chunk:
    """The program of a chunk, whose state comes out where it went in."""
    run = program.chunk(model, config, batches=places.sequences(config.batch_size // config.accumulate))
    if places.mesh is None:
        return run

    def placed(state: TrainState, frozen: Params, data: Any, steps: Int[Array, ""]) -> tuple[TrainState, Metrics]:
        state, metrics = run(state, frozen, data, steps)
        return jax.lax.with_sharding_constraint(state, placing.of(shapes.state)), metrics

    return placed


def _shapes(model: LlamaConfig, encoded: Encoded, config: TuningConfig, places: Places) -> _Shapes:
    dtype = jnp.dtype("float32" if config.lora_rank is None else config.dtype)
    flat = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in leaf_shapes(model).items()}
    state, frozen = jax.eval_shape(partial(program.start, config=config), tree.unflatten(flat))
    data = encoded.batch
    if config.load().reference is not None:
        data = data.replace(reference=references.shapes(data, state, frozen, model=model, config=config))
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    return _Shapes(places.split(state), places.split(frozen), places.copied(data), places.copied(steps))
