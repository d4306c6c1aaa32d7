"""What the model that tuning begins with says of all examples: read once, and kept in the run directory."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsafety.engine import programs
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import checkpoint, progress, signals
from jaxsafety.study.checkpoints import program
from jaxsafety.study.checkpoints.job import Job
from jaxsafety.study.checkpoints.places import Places
from jaxsafety.types import Params, PreferenceBatch, TrainState

_FOLDER = "references"


def shapes(batch: PreferenceBatch, state: TrainState, frozen: Params, *, model: LlamaConfig, job: Job) -> Any:
    """Returns the shapes of what the method's reference says of examples ``[n, ...]``; nothing is computed."""
    return jax.eval_shape(program.reference(model, job), state.params, frozen, batch)


def referenced(
    batch: PreferenceBatch,
    state: TrainState,
    frozen: Params,
    directory: Path,
    *,
    model: LlamaConfig,
    job: Job,
    places: Places,
) -> PreferenceBatch:
    """Returns examples ``[n, t]`` with what the model before the first step says of them, as host arrays.

    If nothing is kept in ``directory`` yet, ``state`` is that before the first step. The method of ``job`` has a
    reference.

    Raises:
        ValueError: nothing is kept and the first step is taken, or what is kept is damaged.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop.
    """
    if not is_there(directory):
        if int(state.step):
            raise ValueError(
                f"{directory / _FOLDER} is missing, which training in {directory} went by: expected it as it was, or "
                "another --out"
            )
        arrays = _read(batch, state.params, frozen, model=model, job=job, places=places)
        checkpoint.save(directory / _FOLDER, arrays, step=0)
    return kept(batch, state, frozen, directory, model=model, job=job)


def is_there(directory: Path) -> bool:
    """Whether what a reference says is kept in a directory."""
    return checkpoint.latest(directory / _FOLDER) is not None


def kept(
    batch: PreferenceBatch, state: TrainState, frozen: Params, directory: Path, *, model: LlamaConfig, job: Job
) -> PreferenceBatch:
    """Returns examples with what is kept of them in a directory; ``state`` and ``frozen`` may be shapes.

    Raises:
        ValueError: it is damaged.
    """
    like, structure = jax.tree.flatten(shapes(batch, state, frozen, model=model, job=job))
    found = jax.device_get(checkpoint.load(directory / _FOLDER, like)[0])
    return batch.replace(reference=jax.tree.unflatten(structure, found))


def _read(
    batch: PreferenceBatch, trained: Params, frozen: Params, *, model: LlamaConfig, job: Job, places: Places
) -> list[np.ndarray]:
    """Reads the arrays of all examples, as many at a time as a part of a batch has."""
    size = job.part_size
    part_shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), batch)
    run = program.reference(model, job, batches=places.sequences(size))
    compiled = programs.fitted(run, trained, frozen, places.copied(part_shapes), what=f"reading {size} examples")
    count, found = len(batch.chosen.tokens), []
    with progress.track(count, label=f"reference of {job.how.method}", unit="example") as update:
        for start in range(0, count, size):
            # The last batch is filled with the first examples: one shape, one program.
            rows, end = np.arange(start, start + size) % count, min(start + size, count)
            part: Any = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
            arrays = jax.tree.leaves(compiled(trained, frozen, jax.device_put(part, places.everywhere)))
            found.append([np.asarray(array)[: end - start] for array in arrays])
            update(end, {})
            signals.check(f"after {end} of {count} examples of the reference")
    return [np.concatenate(pieces) for pieces in zip(*found, strict=True)]
