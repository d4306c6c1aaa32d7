"""A model run over prompts layer by layer: a layer's weights are read, all prompts go through it, the next is read.

Between layers there are the prompts' residual streams alone, so memory is that of one layer and of the prompts. The
streams are saved now and then, and a run that was killed goes on from the last ones.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsafety.engine import programs
from jaxsafety.formats import hf
from jaxsafety.models.layers import ComputeDtype
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import atomic
from jaxsafety.study.checkpoints import features
from jaxsafety.study.checkpoints.batches import Batch
from jaxsafety.types import Params

# Seconds between two saves of the streams; they may be larger than a layer.
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Side:
    """One model, the prompts that it reads, maybe with its answers, and the type of its weights and of its products."""

    checkpoint: hf.Checkpoint
    batches: tuple[Batch, ...]
    compute_dtype: ComputeDtype

    @property
    def config(self) -> LlamaConfig:
        """The model, computing in that type."""
        return replace(self.checkpoint.config, compute_dtype=self.compute_dtype)


# [b, t, d] of every batch.
Streams = list[np.ndarray]
# By site: [p, n, d] or [p, n, f], n over all prompts.
Seen = dict[str, Float[np.ndarray, "p n _"]]


def layers(side: Side, *, state: Path) -> Iterator[tuple[int, Seen]]:
    """Yields layer by layer what a model's MLPs see of every prompt: at its last token, and in the mean of its answer.

    ``state`` is where the streams are saved; those there are gone on from, and removed at the end. The streams behind a
    layer are saved after the caller comes back for the next.

    Raises:
        ValueError: the saved streams are damaged, a tensor is not finite, or a layer does not fit into memory.
        OSError: a file cannot be read or written.
    """
    first, streams = _resume(state, side)
    saved = time.monotonic()
    for layer in range(first, side.config.layers):
        streams, seen = _through(side, layer, streams)
        yield layer, seen
        if time.monotonic() - saved > _SAVE_EVERY_S:
            _save(state, layer + 1, streams)
            saved = time.monotonic()
    state.unlink(missing_ok=True)


def embeddings(side: Side) -> list[Float[np.ndarray, "b t d"]]:
    """Returns the embeddings of every batch; of the table only the rows that are needed are read."""
    needed = np.unique(np.concatenate([batch.tokens.ravel() for batch in side.batches]))
    rows = (side.checkpoint.leaf("embed", index=(slice(row, row + 1),), dtype="float32") for row in needed.tolist())
    table = np.concatenate(list(rows))
    return [table[np.searchsorted(needed, batch.tokens)] for batch in side.batches]


def layer_weights(checkpoint: hf.Checkpoint, layer: int, *, dtype: hf.ParamsDtype) -> Params:
    """Returns the weights of one layer, as the leaves below ``blocks`` without their leading axis."""
    flat = {
        path.removeprefix("blocks/"): checkpoint.leaf(path, index=(slice(layer, layer + 1),), dtype=dtype)[0]
        for path, place in checkpoint.tensors
        if place == layer
    }
    return hf.unflatten(flat)


def _through(side: Side, layer: int, streams: Streams) -> tuple[Streams, Seen]:
    """Takes the streams through a layer."""
    weights = jax.device_put(layer_weights(side.checkpoint, layer, dtype=side.compute_dtype))
    count = sum(len(batch.rows) for batch in side.batches)
    after, seen = [], {}
    for batch, x in zip(side.batches, streams, strict=True):
        given = (weights, x, batch.mask, chosen(batch))
        leaves, structure = jax.tree.flatten(given)
        shapes = tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)
        out, picked = jax.device_get(_program(side.config, shapes, structure)(*given))
        after.append(out)
        for site, values in picked.items():
            into = seen.setdefault(site, np.empty((len(values), count, values.shape[-1]), np.float32))
            into[:, batch.rows] = values
    return after, seen


@cache
def _program(config: LlamaConfig, shapes: tuple[Any, ...], structure: Any) -> Callable[..., Any]:
    """A layer over prompts, compiled once for all layers and models of a shape."""
    given = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    batch, tokens, _ = given[1].shape
    what = f"a layer over {batch} prompts of {tokens} tokens"
    with jax.default_matmul_precision("highest"):
        return programs.fitted(partial(features.layer, config=config), *given, what=what)


def chosen(batch: Batch) -> Float[np.ndarray, "p b t"]:
    """Returns the weights of the places that are read: the last token of the prompt, and the answer's mean if any."""
    places = np.arange(batch.tokens.shape[1])[None]
    last = places == batch.prompt_lengths[:, None] - 1
    answer = batch.mask & (places >= batch.prompt_lengths[:, None])
    kinds = [last, answer] if answer.any() else [last]
    return np.stack([kind / np.maximum(kind.sum(1, keepdims=True), 1) for kind in kinds]).astype(np.float32)


def _save(state: Path, layer: int, streams: Streams) -> None:
    arrays = {f"stream{place}": x for place, x in enumerate(streams)}
    unfinished = state.with_suffix(".unfinished")
    state.parent.mkdir(parents=True, exist_ok=True)
    try:
        with unfinished.open("wb") as file:
            np.savez(file, layer=layer, **arrays)
        atomic.sync(unfinished)
        unfinished.replace(state)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"cannot write {state} ({error.strerror}): free some space there and start again") from error


def _resume(state: Path, side: Side) -> tuple[int, Streams]:
    if not state.exists():
        return 0, embeddings(side)
    try:
        with state.open("rb") as file, np.load(file) as saved:
            return int(saved["layer"]), [saved[f"stream{place}"] for place in range(len(side.batches))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{state} is damaged: remove it and start again") from error
