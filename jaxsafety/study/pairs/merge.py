"""``analyze merge``: a walk along an update, ``W + alpha * part(dW)``, written as a checkpoint, a tensor at a time.

Matrices that take a decomposition are kept beside the directory until it is whole: after a kill none is computed twice.
"""

import hashlib
import itertools
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsafety import tree
from jaxsafety.config.fields import check, static
from jaxsafety.config.names import check_name
from jaxsafety.edits import rank_part, scaled, space_part
from jaxsafety.engine import programs
from jaxsafety.formats import hf
from jaxsafety.formats.hf_names import is_transposed
from jaxsafety.linalg import update_spaces
from jaxsafety.rundir import atomic, progress, signals
from jaxsafety.study.pairs.opened import Pair, fingerprint

Part = Literal[scaled.Part, "null_space"]
# The paths that a part moves.
_MOVES: dict[str, str] = {**scaled.PATTERNS, "null_space": tree.MLP_MATRICES}
_MATRIX = "blocks/mlp/up"  # where a matrix stands, whichever it is, in a tree of its own

_SLICE = 2**24  # values of a tensor that are merged at once


@dataclass(frozen=True)
class MergeConfig:
    """Which part of an update is taken how often.

    Attributes:
        alpha: 0 is the base, 1 the tuned model (of that part), above 1 extrapolates.
        part: of :mod:`jaxsafety.edits.scaled`, such as ``whole`` or ``mlp``, the MLPs' matrices and biases alone; or
            ``null_space``, of the MLPs' matrices what is written into the null space of the base.
        energy: for ``null_space``: share of a base matrix's energy that counts as its range, in (0, 1].
        rank: singular directions that are kept of the part in every matrix of a layer, the strongest; None for all.
            What is no such matrix is taken whole.
        dtype: type to store the model in; None for that of the tuned model's embeddings.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.2 (``whole``; the other parts are ours).
    """

    alpha: float = static()
    part: Part = "whole"
    energy: float = static(0.9, above=0, at_most=1)
    rank: int | None = static(None, at_least=1)
    dtype: hf.ParamsDtype | None = None

    def __post_init__(self):
        check(self)
        if self.dtype is not None:
            check_name("dtype", self.dtype, get_args(hf.ParamsDtype))


def write(pair: Pair, directory: Path, config: MergeConfig) -> None:
    """Writes the merged model with the tuned one's configuration and tokenizer; nothing is there until all of it is.

    ``directory`` must not exist or be empty.

    Raises:
        ValueError: a value is not finite, ``directory`` holds something, or a matrix does not fit into memory.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; nothing is left but hidden parts, from which the same call goes on.
    """
    # ``.`` and ``/`` have no name of their own to be renamed to once all is written.
    if not directory.name:
        raise ValueError(f"{directory} cannot be made whole at once: choose a new directory to write to (--out)")
    stored = config.dtype or pair.tuned.tensors["embed", None].dtype.name
    parts = _parts(pair, directory, config, stored)
    merge, done = merger(pair, config, dtype=stored, parts=parts), itertools.count(1)
    with progress.track(len(pair.tuned.tensors), label="analyze merge") as update:

        def read(path: str, layer: int | None) -> np.ndarray:
            signals.check(f"before {path}" if layer is None else f"before {path} of layer {layer}")
            merged = merge(path, layer)
            update(next(done), {})
            return merged

        try:
            hf.write_checkpoint(directory, read, config=pair.tuned.config, dtype=stored, source=pair.tuned.directory)
        except ValueError:
            # The same call would fail again.
            shutil.rmtree(parts, ignore_errors=True)
            raise
    shutil.rmtree(parts, ignore_errors=True)


def _parts(pair: Pair, directory: Path, config: MergeConfig, dtype: str) -> Path:
    """Where the matrices of this very merge are kept until it is finished."""
    told = repr((fingerprint(pair.base), fingerprint(pair.tuned), config, dtype))
    return directory.absolute().with_name(f".{directory.name}.parts-{hashlib.sha256(told.encode()).hexdigest()[:16]}")


def merger(
    pair: Pair, config: MergeConfig, *, dtype: hf.ParamsDtype, parts: Path
) -> Callable[[str, int | None], np.ndarray]:
    """Returns what reads a tensor of both checkpoints and merges it, by our path and layer (None outside of layers).

    Sums are float32; the result is rounded to ``dtype``. What takes a decomposition is kept in ``parts`` and taken from
    there.
    """
    moves, decomposes = _MOVES[config.part], config.part == "null_space" or config.rank is not None

    def merge(path: str, layer: int | None) -> np.ndarray:
        alpha = config.alpha if re.fullmatch(moves, path) else 0.0
        if not (alpha and decomposes and re.fullmatch(tree.MATRICES, path)):
            return _streamed(pair, path, layer, alpha=alpha, dtype=dtype)
        file = parts / f"{layer:03d}-{path.replace('/', '-')}"
        if file.exists():
            return np.frombuffer(file.read_bytes(), jnp.dtype(dtype)).reshape(pair.base.shape(path)[1:])
        base, tuned = (side.matrix(layer, path.removeprefix("blocks/")) for side in (pair.base, pair.tuned))
        merged = _sum(base, _part(base, tuned - base, config), alpha, dtype)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.atomic_write(file, merged.tobytes())
        return merged

    return merge


def _part(base: np.ndarray, delta: np.ndarray, config: MergeConfig) -> np.ndarray:
    """The part of a matrix's update that is added, by the method that resolves it."""
    energy = config.energy if config.part == "null_space" else None
    for method in ("gram", "full"):
        found = np.asarray(_program(base.shape, energy, config.rank, method)(base, delta))
        if not np.isnan(found).any():
            break
    return found


@cache
def _program(
    shape: tuple[int, int], energy: float | None, rank: int | None, method: update_spaces.Method
) -> Callable[..., Any]:
    """The study's edits of one matrix's update: what lies in the null space, its leading directions, or both."""

    def run(base: Array, delta: Array) -> Array:
        before, part = (tree.unflatten({_MATRIX: leaf[None]}) for leaf in (base, delta))
        if energy is not None:
            part = space_part.space_part(before, part, "null_space", energy=energy, keep="only", method=method)
        if rank is not None:
            part = rank_part.rank_part(part, rank=min(rank, *shape), method=method)
        return tree.flatten(part)[_MATRIX][0]

    given = jax.ShapeDtypeStruct(shape, jnp.float32)
    return programs.fitted(run, given, given, what=f"the decomposition of a matrix of {shape[0]} x {shape[1]}")


def _streamed(pair: Pair, path: str, layer: int | None, *, alpha: float, dtype: hf.ParamsDtype) -> np.ndarray:
    """A tensor merged in slices: both sides' embeddings in float32 would be the largest thing in memory by far."""
    lead = () if layer is None else (slice(layer, layer + 1),)
    shape = pair.base.shape(path)[len(lead) :]
    merged = np.empty(shape, jnp.dtype(dtype))
    # Along the axis that leads in the files, or every slice would read all of them.
    axis = len(shape) - 1 if is_transposed(path) else 0
    step = max(1, _SLICE * shape[axis] // math.prod(shape))
    for start in range(0, shape[axis], step):
        part = tuple(slice(start, start + step) if place == axis else slice(None) for place in range(len(shape)))
        base, tuned = (
            side.leaf(path, index=(*lead, *part), dtype="float32")[(0,) * len(lead)] for side in (pair.base, pair.tuned)
        )
        merged[part] = _sum(base, tuned - base, alpha, dtype)
    return merged


def _sum(base: np.ndarray, delta: np.ndarray, alpha: float, dtype: hf.ParamsDtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # what becomes infinite is refused where it is written
        return (base + np.float32(alpha) * delta).astype(jnp.dtype(dtype))
