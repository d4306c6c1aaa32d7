"""One seed of a model that is another's with its weights edited: a matrix at a time, written as a checkpoint.

Matrices that take a decomposition are kept until the model is whole: after a kill none is computed twice.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafety import tree
from jaxsafety.config import fields as fields_
from jaxsafety.engine import programs
from jaxsafety.formats import hf
from jaxsafety.formats.hf_names import is_transposed, leaf_shapes
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.recipe.models import Edited
from jaxsafety.rundir import atomic, progress, signals
from jaxsafety.study import lanes
from jaxsafety.types import Edit, Key

_SLICE = 2**24  # values of a tensor that are edited at once

# By role, the checkpoints that an edit takes; ``target`` is what is edited.
Trees = Mapping[str, hf.Checkpoint]


def write(
    trees: Trees, directory: Path, node: Edited, *, dtype: hf.ParamsDtype, parts: Path, key: Key, name: str
) -> None:
    """Writes the edited model with the target's configuration and tokenizer; nothing is there until all of it is.

    ``directory`` must not exist or be empty; ``parts`` is where matrices are kept until it is whole, ``key`` the seed's
    root key, and ``name`` is for progress.

    Raises:
        ValueError: a value is not finite, ``directory`` holds something, or a matrix does not fit into memory.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; the same call goes on from the parts.
    """
    target, done = trees["target"], itertools.count(1)
    edit = editor(trees, node, dtype=dtype, parts=parts, key=key)
    with progress.track(len(target.tensors), label=f"edit {name}", unit="tensor") as update:

        def read(path: str, layer: int | None) -> np.ndarray:
            signals.check(f"before {path}" if layer is None else f"before {path} of layer {layer}")
            found = edit(path, layer)
            update(next(done), {})
            return found

        try:
            hf.write_checkpoint(
                directory, read, config=target.config, dtype=dtype, source=target.directory, ignored=target.ignored
            )
        except ValueError:
            # The same call would fail again.
            shutil.rmtree(parts, ignore_errors=True)
            raise
    shutil.rmtree(parts, ignore_errors=True)


def editor(
    trees: Trees, node: Edited, *, dtype: hf.ParamsDtype, parts: Path, key: Key
) -> Callable[[str, int | None], np.ndarray]:
    """Returns what reads a tensor of all checkpoints and edits it, by our path and layer (None outside of layers).

    The edit is computed in float32 and rounded to ``dtype``. What takes a decomposition is kept in ``parts`` and taken
    from there.
    """
    shapes, decomposes, how = leaf_shapes(trees["target"].config), hasattr(node.options, "method"), node.load()

    def edit(path: str, layer: int | None) -> np.ndarray:
        if not _is_whole(how, path):
            return _streamed(trees, node, path, layer, dtype=dtype, key=key)
        lead = () if layer is None else (slice(layer, layer + 1),)
        file = parts / f"{layer}-{path.replace('/', '-')}"
        if file.exists():
            return np.frombuffer(file.read_bytes(), jnp.dtype(dtype)).reshape(shapes[path][len(lead) :])
        given = {role: side.leaf(path, index=lead, dtype="float32") for role, side in trees.items()}
        # One that draws by layer makes keys of its own from that of the whole model.
        own = key if layer is None or how.draws else jax.random.fold_in(key, layer)
        found = _resolved(trees, node, path, given, key=own, layer=layer or 0)[(0,) * len(lead)]
        found = _rounded(found, dtype)
        if decomposes:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic.atomic_write(file, found.tobytes())
        return found

    return edit


def need(config: LlamaConfig, node: Edited, roles: Sequence[str]) -> tuple[str, int]:
    """Returns the tensor whose edit takes the most of a device, and the bytes of it; nothing is read or computed.

    ``roles`` are those of the checkpoints that the edit takes. The largest of the tensors that are edited whole, and of
    those in slices, stand for the others.
    """
    how, largest = node.load(), {}
    for path, stacked in leaf_shapes(config).items():
        lead, shape = ((1,), stacked[1:]) if tree.is_stacked(path) else ((), stacked)
        whole = _is_whole(how, path)
        if not whole:
            axis, step = _slices(path, shape)
            shape = tuple(min(size, step) if place == axis else size for place, size in enumerate(shape))
        largest[whole] = max(largest.get(whole, (0,)), (math.prod(shape), path, (*lead, *shape)))
    needs = {}
    for _, path, shape in largest.values():
        run, given = _edit_of(_stripped(node), path, _others(config, path), shape, tuple(roles), _scalars(node))
        needs[path] = programs.planned(run, *given)[1]
    return max(needs.items(), key=itemgetter(1))


def _is_whole(how: Edit, path: str) -> bool:
    """Whether a tensor is edited as one, or in slices: there a draw would be the same in each of them."""
    return how.whole or how.draws or bool(re.fullmatch(tree.MATRICES, path))


def _resolved(
    trees: Trees, node: Edited, path: str, given: Mapping[str, np.ndarray], *, key: Key, layer: int
) -> np.ndarray:
    """An edited part of a leaf, by another decomposition where ``gram`` does not resolve it."""
    found = _edited(trees, node, path, given, key=key, layer=layer)
    if getattr(node.options, "method", None) == "gram" and np.isnan(found).any():
        whole = replace(node, options=replace(node.options, method="full"))
        return _edited(trees, whole, path, given, key=key, layer=layer)
    return found


def _edited(
    trees: Trees, node: Edited, path: str, given: Mapping[str, np.ndarray], *, key: Key, layer: int = 0
) -> np.ndarray:
    others, shape = _others(trees["target"].config, path), next(iter(given.values())).shape
    program = _program(_stripped(node), path, others, shape, tuple(given), _scalars(node))
    return np.asarray(program(dict(given), _point(node), key, np.int32(layer)))


def _point(node: Edited) -> dict[str, np.number]:
    return {name: np.int32(one) if isinstance(one, int) else np.float32(one) for name, one in node.point.items()}


def _scalars(node: Edited) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(one.dtype)) for name, one in sorted(_point(node).items()))


def _others(config: LlamaConfig, path: str) -> tuple[tuple[str, int], ...]:
    """The paths beside one, and how many axes they have."""
    return tuple((other, len(shape)) for other, shape in leaf_shapes(config).items() if other != path)


def _stripped(node: Edited) -> Edited:
    """The node without its strengths, which are traced: edits of several strengths are one program."""
    options = fields_.at_point(node.options, dict.fromkeys(node.point))
    return fields_.at_point(node, {"role": "model", "options": options})


@cache
def _program(node: Edited, path: str, others: Any, shape: tuple[int, ...], *how: Any) -> Callable[..., Any]:
    run, given = _edit_of(node, path, others, shape, *how)
    return programs.fitted(run, *given, what=f"the edit of {path} of {shape}")


def _edit_of(
    node: Edited, path: str, others: tuple[tuple[str, int], ...], shape: tuple[int, ...], roles: tuple[str, ...],
    scalars: tuple[tuple[str, str], ...],
) -> tuple[Callable[..., Any], tuple[Any, ...]]:  # fmt: skip
    """The edit of one leaf of this shape, beside which the others, which it does not look at, are single zeros.

    With it come shapes of what it takes.
    """

    def run(given: dict[str, Any], point: dict[str, Any], key: Key, layer: Any) -> Any:
        rest = {other: jnp.zeros((1,) * axes) for other, axes in others}
        trees = {role: tree.unflatten(rest | {path: leaf}) for role, leaf in given.items()}
        return tree.flatten(lanes.edited(node, trees, point=point, key=key, layer=layer))[path]

    like = {role: jax.ShapeDtypeStruct(shape, jnp.float32) for role in roles}
    point = {name: jax.ShapeDtypeStruct((), dtype) for name, dtype in scalars}
    return run, (like, point, jax.random.key(0), np.int32(0))


def _streamed(
    trees: Trees, node: Edited, path: str, layer: int | None, *, dtype: hf.ParamsDtype, key: Key
) -> np.ndarray:
    """A tensor edited in slices: the embeddings of all sides in float32 would be the largest thing in memory by far."""
    lead = () if layer is None else (slice(layer, layer + 1),)
    shape = trees["target"].shape(path)[len(lead) :]
    edited = np.empty(shape, jnp.dtype(dtype))
    axis, step = _slices(path, shape)
    for start in range(0, shape[axis], step):
        part = tuple(slice(start, start + step) if place == axis else slice(None) for place in range(len(shape)))
        given = {role: side.leaf(path, index=(*lead, *part), dtype="float32") for role, side in trees.items()}
        edited[part] = _rounded(_edited(trees, node, path, given, key=key)[(0,) * len(lead)], dtype)
    return edited


def _slices(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The axis of slices, which leads in the files, or every slice would read all of them; and how long each is."""
    axis = len(shape) - 1 if is_transposed(path) else 0
    return axis, max(1, _SLICE * shape[axis] // math.prod(shape))


def _rounded(values: np.ndarray, dtype: hf.ParamsDtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # what becomes infinite is refused where it is written
        return np.asarray(values).astype(jnp.dtype(dtype))
