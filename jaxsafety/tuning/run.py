"""A checkpoint tuned in a run directory: from the newest state there to the last step, and then written as a model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from jaxsafety import checkpoint, loop, memory, progress, runlog, sharding, signals, tree
from jaxsafety.interop import hf
from jaxsafety.interop.hf_names import leaf_shapes
from jaxsafety.tuning import export, program
from jaxsafety.tuning.examples import Encoded
from jaxsafety.tuning.options import TuningConfig
from jaxsafety.types import Batch, Params, PreferenceBatch, ReferencedBatch, TrainState

MODEL = "model"
# Steps of a dispatch.
_CHUNK_STEPS = 10
# Seconds between two saves of the state; it may be larger than the model.
_SAVE_EVERY_S = 60.0
_AXIS = "fsdp"


@dataclass(frozen=True)
class Plan:
    """What a run holds and takes on one device, in bytes, known from shapes alone.

    Attributes:
        parameters: of the model.
        trained: of them, or beside them, those that are tuned.
        frozen_bytes: weights that stay as they are.
        state_bytes: what is tuned, with the optimiser's state.
        data_bytes: the examples.
        step_bytes: what XLA plans for the steps beside these.
        free_bytes: of the device.
    """

    parameters: int
    trained: int
    frozen_bytes: int
    state_bytes: int
    data_bytes: int
    step_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class _Shapes:
    """Shapes with their places on the devices."""

    state: TrainState
    frozen: Params
    data: Any
    steps: jax.ShapeDtypeStruct


def plan(opened: hf.Checkpoint, encoded: Encoded, config: TuningConfig) -> Plan:
    """Returns what a run would need; nothing is loaded.

    Raises:
        ValueError: a batch larger than the data.
    """
    shapes = _shapes(opened, encoded, config)
    _, need = loop.planned(
        _chunk(opened, config, shapes), shapes.state, shapes.frozen, shapes.data, shapes.steps, donate=(0,)
    )
    held = [memory.size(part) for part in (shapes.frozen, shapes.state, shapes.data)]
    total = sum(int(np.prod(shape)) for shape in leaf_shapes(opened.config).values())
    return Plan(total, tree.count(shapes.state.params), *held, need - sum(held), memory.free())


def write(opened: hf.Checkpoint, encoded: Encoded, directory: Path, config: TuningConfig) -> Path:
    """Tunes a checkpoint to the last step, from the newest state in ``directory``, and writes the model.

    Args:
        opened: the model to begin with.
        encoded: the examples.
        directory: the run directory, held by the caller.
        config: as it is recorded there.

    Returns:
        The directory of the tuned model.

    Raises:
        ValueError: it does not fit into memory, a tensor is not finite, or a saved state is damaged.
        FloatingPointError: the loss or a gradient has become infinite or NaN.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; the state is saved.
    """
    if (directory / MODEL).is_dir():
        return directory / MODEL
    shapes = _shapes(opened, encoded, config)
    what = f"tuning with {config.batch_size // config.accumulate} sequences at a time"
    chunk = loop.fitted(
        _chunk(opened, config, shapes),
        shapes.state, shapes.frozen, shapes.data, shapes.steps, donate=(0,), what=what,
    )  # fmt: skip
    state, frozen, done = _begin(opened, shapes, directory, config)
    data = _data(opened, encoded, state, frozen, directory, config)
    state = _train(chunk, state, frozen, data, directory, config, done=done)
    export.write(opened, state.params, directory / MODEL, config)
    return directory / MODEL


def _chunk(opened: hf.Checkpoint, config: TuningConfig, shapes: _Shapes) -> program.Chunk:
    """The program of a chunk, whose state comes out where it went in."""
    run, places = program.chunk(opened.config, config, batches=_batches(config)), _places(shapes.state)
    if places is None:
        return run

    def placed(*given: Any) -> tuple[TrainState, Any]:
        state, metrics = run(*given)
        return jax.lax.with_sharding_constraint(state, places), metrics

    return placed


def _train(
    chunk: Callable[..., Any],
    state: TrainState,
    frozen: Params,
    data: Any,
    directory: Path,
    config: TuningConfig,
    *,
    done: int,
) -> TrainState:
    label, saved, last = f"tune {config.method}", done, time.monotonic()
    runlog.truncate_metrics(directory, stage="tune", method=config.method, after_step=done)
    with progress.track(config.steps, label=label, start=done) as update:
        while done < config.steps:
            steps = min(_CHUNK_STEPS - done % _CHUNK_STEPS, config.steps - done)
            state, metrics = chunk(state, frozen, data, jax.device_put(jnp.int32(steps), _everywhere()))
            done += steps
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if numbers["finite"] < 1:
                raise FloatingPointError(
                    f"the loss or its gradient is not finite between steps {done - steps} and {done}: expected a "
                    f"lower learning rate than {config.peak_lr:g}"
                )
            labels = {"stage": "tune", "method": config.method, "lr": config.peak_lr, "seed": config.seed, "step": done}
            runlog.append_metrics(directory, [labels | numbers])
            if done == config.steps or signals.asked() or time.monotonic() - last > _SAVE_EVERY_S:
                checkpoint.save(directory / "checkpoints", state, step=done, keep=1)
                saved, last = done, time.monotonic()
            update(done, {name: numbers[name] for name in ("loss", "grad_norm")})
            if saved == done and done < config.steps:
                signals.check(f"after step {done} of {label}")
    return state


def _begin(
    opened: hf.Checkpoint, shapes: _Shapes, directory: Path, config: TuningConfig
) -> tuple[TrainState, Params, int]:
    """The newest state there, or the first, with the weights that stay as they are."""
    full = config.lora_rank is None
    step = checkpoint.latest(directory / "checkpoints")
    params = {}
    if not full or step is None:
        hf_dtype: hf.ParamsDtype = "float32" if full else config.dtype
        _, params = hf.load(opened.directory, dtype=hf_dtype, shardings=_rule() if _mesh() else None)
    if step is not None:
        state, step = checkpoint.load(directory / "checkpoints", shapes.state)
        return state, {} if full else params, step
    state = program.start(params, config)[0]
    if shardings := _places(shapes.state):
        state = jax.device_put(state, shardings)
    return state, {} if full else params, 0


def _data(
    opened: hf.Checkpoint, encoded: Encoded, state: TrainState, frozen: Params, directory: Path, config: TuningConfig
) -> Any:
    """The examples on the devices; for DPO with the log-probs of the model that training began with."""
    batch: Any = encoded.batch
    if config.method == "dpo":
        batch = ReferencedBatch(batch, *_references(opened, batch, state, frozen, directory, config))
    return jax.device_put(batch, _everywhere())


def _references(
    opened: hf.Checkpoint,
    batch: PreferenceBatch,
    state: TrainState,
    frozen: Params,
    directory: Path,
    config: TuningConfig,
) -> list[np.ndarray]:
    """Log-probs of both answers before the first step, read once and kept."""
    sides, folder = (batch.chosen, batch.rejected), directory / "references"
    like = [jax.ShapeDtypeStruct(side.tokens.shape, jnp.float32) for side in sides]
    if checkpoint.latest(folder) is None:
        read = partial(_logprobs, opened, state=state, frozen=frozen, config=config)
        checkpoint.save(folder, [read(side) for side in sides], step=0)
    return jax.device_get(checkpoint.load(folder, like)[0])


def _logprobs(
    opened: hf.Checkpoint, side: Batch, *, state: TrainState, frozen: Params, config: TuningConfig
) -> np.ndarray:
    count, size = len(side.tokens), config.batch_size // config.accumulate
    run = program.logprobs(opened.config, config, batches=_batches(config))
    given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), side)
    placed = _placed(given)
    compiled = loop.fitted(run, state.params, frozen, placed, what=f"reading {size} sequences")
    found = []
    with progress.track(count, label="reference of dpo") as update:
        for start in range(0, count, size):
            # The last batch is filled with the first examples: one shape, one program.
            rows = np.arange(start, start + size) % count
            part = jax.device_put(jax.tree.map(lambda leaf, rows=rows: leaf[rows], side), _everywhere())
            found.append(np.asarray(compiled(state.params, frozen, part))[: count - start])
            update(min(start + size, count), {})
            signals.check(f"after {min(start + size, count)} of {count} answers of the reference")
    return np.concatenate(found)


def _shapes(opened: hf.Checkpoint, encoded: Encoded, config: TuningConfig) -> _Shapes:
    dtype = "float32" if config.lora_rank is None else config.dtype
    flat = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, shape in leaf_shapes(opened.config).items()}
    state, frozen = jax.eval_shape(partial(program.start, config=config), tree.unflatten(flat))
    data: Any = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), encoded.batch)
    if config.method == "dpo":
        logprobs = (jax.ShapeDtypeStruct(side.tokens.shape, jnp.float32) for side in (data.chosen, data.rejected))
        data = ReferencedBatch(data, *logprobs)
    state, frozen = (
        jax.tree.map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_place(path, leaf.shape)), part
        )
        for part in (state, frozen)
    )
    return _Shapes(state, frozen, _placed(data), _placed(jax.ShapeDtypeStruct((), jnp.int32)))


def _mesh() -> jax.sharding.Mesh | None:
    """All devices of this process along one axis; None if there is only one."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), (_AXIS,), axis_types=(AxisType.Auto,)) if len(devices) > 1 else None


def _rule() -> Callable[[str, tuple[int, ...]], NamedSharding]:
    mesh = _mesh()
    return sharding.fsdp(mesh, axis=_AXIS)


def _place(path: Any, shape: tuple[int, ...]) -> Sharding | None:
    """Where a leaf of the state goes: with the parameter whose path its own ends with, else everywhere."""
    if _mesh() is None:
        return None
    name = sharding.parameter_path(jax.tree_util.keystr(path, simple=True, separator="/"))
    return _everywhere() if name is None else _rule()(name, shape)


def _places(shapes: Any) -> Any:
    return None if _mesh() is None else jax.tree.map(lambda leaf: leaf.sharding, shapes)


def _everywhere() -> Sharding | None:
    mesh = _mesh()
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def _placed(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_everywhere()), shapes)


def _batches(config: TuningConfig) -> Sharding | None:
    """Sequences go to the devices in equal parts, if there are enough of them."""
    mesh, rows = _mesh(), config.batch_size // config.accumulate
    if mesh is None or rows % mesh.size:
        return None
    return NamedSharding(mesh, PartitionSpec(_AXIS, None))
