"""What the model that DPO begins with says of all answers: read once, and kept in the run directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafety.engine import programs
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import checkpoint, progress, signals
from jaxsafety.study.tuning import program
from jaxsafety.study.tuning.options import TuningConfig
from jaxsafety.study.tuning.places import Places
from jaxsafety.types import Batch, Params, PreferenceBatch, ReferencedBatch, TrainState

_FOLDER = "references"


def referenced(
    batch: PreferenceBatch,
    state: TrainState,
    frozen: Params,
    directory: Path,
    *,
    model: LlamaConfig,
    config: TuningConfig,
    places: Places,
) -> ReferencedBatch:
    """Returns pairs with the log-probs of the model before the first step, as host arrays.

    Args:
        batch: ``[n, t]`` of all examples.
        state: what is tuned; if nothing is kept yet, before the first step.
        frozen: the weights that stay as they are.
        directory: the run directory.
        model: the checkpoint's configuration.
        config: of the run.
        places: of its parts.

    Raises:
        ValueError: nothing is kept and the first step is taken, or what is kept is damaged.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop.
    """
    folder, sides = directory / _FOLDER, (batch.chosen, batch.rejected)
    if checkpoint.latest(folder) is None:
        if int(state.step):
            raise ValueError(
                f"{folder} is missing, which training in {directory} went by: expected it as it was, or another --out"
            )
        read = _reader(sides[0], state.params, frozen, model=model, config=config, places=places)
        checkpoint.save(folder, [read(side) for side in sides], step=0)
    like = [jax.ShapeDtypeStruct(side.tokens.shape, jnp.float32) for side in sides]
    return ReferencedBatch(batch, *jax.device_get(checkpoint.load(folder, like)[0]))


def _reader(
    like: Batch, trained: Params, frozen: Params, *, model: LlamaConfig, config: TuningConfig, places: Places
) -> Callable[[Batch], np.ndarray]:
    """Returns what reads the log-probs of all answers of a side; compiled once for both."""
    size = config.batch_size // config.accumulate
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), like)
    run = program.logprobs(model, config, batches=places.sequences(size))
    compiled = programs.fitted(run, trained, frozen, places.copied(shapes), what=f"reading {size} sequences")

    def read(side: Batch) -> np.ndarray:
        count, found = len(side.tokens), []
        with progress.track(count, label="reference of dpo") as update:
            for start in range(0, count, size):
                # The last batch is filled with the first examples: one shape, one program.
                rows, end = np.arange(start, start + size) % count, min(start + size, count)
                part: Any = jax.tree.map(lambda leaf, rows=rows: leaf[rows], side)
                logprobs = compiled(trained, frozen, jax.device_put(part, places.everywhere))
                found.append(np.asarray(logprobs)[: end - start])
                update(end, {})
                signals.check(f"after {end} of {count} answers of the reference")
        return np.concatenate(found)

    return read
