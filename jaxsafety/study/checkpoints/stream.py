"""A model run over prompts layer by layer: a layer's weights are read, all prompts go through it, the next is read.

Between layers there are the prompts' residual streams alone, and these lie on disk, a file a batch: memory is that of
one layer, of one batch and of what is read of every prompt. A run that was killed goes on behind its last whole layer.
"""

from __future__ import annotations

import shutil
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
from jaxsafety.study.checkpoints import features
from jaxsafety.study.checkpoints.batches import Batch
from jaxsafety.types import Params


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


# [b, t, d] of the batch in a place.
Streams = Callable[[int], Float[np.ndarray, "b t d"]]
# By site: [p, n, d] or [p, n, f], n over all prompts.
Seen = dict[str, Float[np.ndarray, "p n _"]]


def layers(side: Side, *, state: Path) -> Iterator[tuple[int, Seen]]:
    """Yields layer by layer what a model's MLPs see of every prompt: at its last token, and in the mean of its answer.

    ``state`` is the folder where the streams lie, before a layer and behind it; those there are gone on from, and it is
    removed at the end. The caller has what it was given of a layer when it comes back for the next: until then that
    layer would come again.

    Raises:
        ValueError: the streams there are damaged, a tensor is not finite, or a layer does not fit into memory.
        OSError: a file cannot be read or written.
    """
    first, depth = _whole(state), side.config.layers
    streams = _saved(state, first) if first else embedded(side)
    for layer in range(first, depth):
        behind = None if layer + 1 == depth else state / f"{layer + 1}.unfinished"
        yield layer, _through(side, layer, streams, behind=behind)
        if behind is not None:
            behind.replace(behind.with_suffix(""))
            shutil.rmtree(state / str(layer), ignore_errors=True)
            streams = _saved(state, layer + 1)
    shutil.rmtree(state, ignore_errors=True)


def embedded(side: Side) -> Streams:
    """Returns what gives a batch as it enters the first layer; of the table only the rows that are needed are read."""
    needed = np.unique(np.concatenate([batch.tokens.ravel() for batch in side.batches]))
    rows = (side.checkpoint.leaf("embed", index=(slice(row, row + 1),), dtype="float32") for row in needed.tolist())
    table = np.concatenate(list(rows)) * np.float32(side.config.embed_scale)
    return lambda place: table[np.searchsorted(needed, side.batches[place].tokens)]


def layer_weights(checkpoint: hf.Checkpoint, layer: int, *, dtype: hf.ParamsDtype) -> Params:
    """Returns the weights of one layer, as the leaves below ``blocks`` without their leading axis."""
    flat = {
        path.removeprefix("blocks/"): checkpoint.leaf(path, index=(slice(layer, layer + 1),), dtype=dtype)[0]
        for path, place in checkpoint.tensors
        if place == layer
    }
    return hf.unflatten(flat)


def _through(side: Side, layer: int, streams: Streams, *, behind: Path | None) -> Seen:
    """Takes the streams through a layer; ``behind`` is where they are put, None behind the last one."""
    if behind is not None:
        shutil.rmtree(behind, ignore_errors=True)
    weights = jax.device_put(layer_weights(side.checkpoint, layer, dtype=side.compute_dtype))
    count = sum(len(batch.rows) for batch in side.batches)
    seen: Seen = {}
    for place, batch in enumerate(side.batches):
        given = (weights, streams(place), batch.mask, chosen(batch), np.asarray(layer, np.int32))
        leaves, structure = jax.tree.flatten(given)
        shapes = tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)
        out, picked = jax.device_get(_program(side.config, shapes, structure)(*given))
        if behind is not None:
            _save(behind, place, out)
        for site, values in picked.items():
            into = seen.setdefault(site, np.empty((len(values), count, values.shape[-1]), np.float32))
            into[:, batch.rows] = values
    return seen


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


def _file(folder: Path, place: int) -> Path:
    return folder / f"{place}.npy"


def _save(folder: Path, place: int, x: np.ndarray) -> None:
    try:
        # Not before: a layer that does not fit into memory leaves nothing.
        folder.mkdir(parents=True, exist_ok=True)
        np.save(_file(folder, place), x)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"cannot write {folder} ({error.strerror}): free some space there and start again") from error


def _whole(state: Path) -> int:
    """The last layer before which all streams are saved; 0 without any."""
    return max((int(path.name) for path in state.glob("*") if path.name.isdigit()), default=0)


def _saved(state: Path, layer: int) -> Streams:
    def load(place: int) -> np.ndarray:
        try:
            with _file(state / str(layer), place).open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{state} is damaged: remove it and start again") from error

    return load
