"""A Hugging Face checkpoint opened, not loaded: where each of its tensors lies, checked against ``config.json``.

Tensors are read one at a time or in part, in pieces of about a megabyte, so that an analysis of one layer needs the
memory of that layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsafety.config.names import check_all, check_name
from jaxsafety.formats import hf_names as names
from jaxsafety.formats import safetensors_file
from jaxsafety.formats.hf_config import ParamsDtype, is_fused, read_config
from jaxsafety.formats.hf_index import find_tensors
from jaxsafety.formats.safetensors_file import Tensor
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.tree import is_stacked

_ALIGNMENT = 64  # bytes; JAX on CPU takes such a buffer as it is and copies any other


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors all fit its configuration.

    ``tensors`` are where they lie, by our path and layer (None outside the layers). ``tied_head`` is the output head of
    a model whose head is its embeddings, if the files hold it a second time. ``ignored`` are attributes of its
    ``config.json`` that were passed over.
    """

    directory: Path
    config: LlamaConfig
    tensors: Mapping[tuple[str, int | None], Tensor]
    tied_head: Tensor | None = None
    ignored: tuple[str, ...] = ()

    def matrix(self, layer: int, name: str, *, dtype: ParamsDtype = "float32") -> Float[np.ndarray, "m n"]:
        """Returns one matrix ``[in, out]`` of one layer, from 0, read from the disk now.

        ``name`` is its path below ``blocks``, such as ``mlp/up`` or ``attn/q``.

        Raises:
            ValueError: no such matrix, or it is not finite, in the file or in ``dtype``.
            OSError: it cannot be read.
        """
        shapes = names.leaf_shapes(self.config)
        matrices = [path for path, shape in shapes.items() if is_stacked(path) and len(shape) == 3]
        check_name("matrix", name, [path.removeprefix("blocks/") for path in matrices])
        if layer not in range(self.config.layers):
            raise ValueError(f"layer: got {layer}, expected 0 to {self.config.layers - 1}")
        return self.leaf(f"blocks/{name}", index=(slice(layer, layer + 1),), dtype=dtype)[0]

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of one of our leaves, stacked over layers where it has them, or raises a ValueError."""
        shapes = names.leaf_shapes(self.config)
        check_name("parameter", path, shapes)
        return shapes[path]

    def leaf(self, path: str, *, index: tuple[slice, ...] = (), dtype: ParamsDtype) -> np.ndarray:
        """Returns a part of one of our leaves, stacked over layers; nothing outside its rows is read.

        ``index`` is a slice of step 1 for each of the first axes. JAX on CPU takes its memory over without a copy.

        Raises:
            ValueError: no such leaf, or it is not finite, in the file or in ``dtype``.
            OSError: it cannot be read.
        """
        parts = itertools.chain(index, itertools.repeat(slice(None)))
        bounds = [part.indices(size)[:2] for part, size in zip(parts, self.shape(path), strict=False)]
        target = _aligned([stop - start for start, stop in bounds], jnp.dtype(dtype))
        if (path, None) in self.tensors:
            _fill(target, self.tensors[path, None], bounds, transposed=names.is_transposed(path))
            return target
        for own, layer in enumerate(range(*bounds[0])):
            _fill(target[own], self.tensors[path, layer], bounds[1:], transposed=names.is_transposed(path))
        return target


def open_checkpoint(directory: Path, *, ignored: Collection[str] = ()) -> Checkpoint:
    """Opens a Hugging Face checkpoint in one or several safetensors files and checks all of it but the values.

    For ``ignored`` see :func:`~jaxsafety.formats.hf_config.read_config`.

    Raises:
        FileNotFoundError: the directory, its ``config.json``, its weights or a file that its index names is missing.
        ValueError: a configuration that is not followed here; weights in another format; a file that is cut off; or a
            tensor that is missing, extra, there twice, misshapen or of another type. Both sides are named.
    """
    config = read_config(directory, ignored=ignored)
    found = find_tensors(directory)
    slots = names.slots(config, fused=is_fused(directory))
    expected = names.shapes(slots)
    tied = found.pop(names.HEAD, None) if config.tied else None
    found = {name: tensor for name, tensor in found.items() if not names.BUFFER.fullmatch(name)}
    check_all(f"the weights in {directory}", found, expected, lacks="lack {}, which config.json asks for",
              holds="hold {}, which it does not ask for")  # fmt: skip
    for tensor in [*found.values(), *([tied] if tied else [])]:
        shape = expected.get(tensor.name, (config.vocab_size, config.width))
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.name} is {list(tensor.shape)} in {tensor.file}, expected {list(shape)} by config.json there"
            )
        if tensor.code not in safetensors_file.DTYPES:
            known = ", ".join(safetensors_file.DTYPES)
            raise ValueError(f"{tensor.name} is stored as {tensor.code} in {tensor.file}, expected one of {known}")
    tensors = {(slot.path, slot.layer): own for slot, own in zip(slots, _parts(found, slots), strict=True)}
    return Checkpoint(directory, config, tensors, tied, tuple(ignored))


def _parts(found: Mapping[str, Tensor], slots: Sequence[names.Slot]) -> Iterator[Tensor]:
    """What each slot has of its tensor: those of one name follow one another."""
    for name, group in itertools.groupby(slots, lambda slot: slot.name):
        first = 0
        for slot in group:
            yield found[name].rows(first, first + slot.shape[0])
            first += slot.shape[0]


def read_tensor(tensor: Tensor, *, rows: int, transposed: bool) -> Float[np.ndarray, "m n"]:
    """Returns the first ``rows`` of a matrix as it is stored, transposed or not, in float32.

    Raises:
        ValueError: it is not finite.
        OSError: it cannot be read.
    """
    bounds = [(0, rows), (0, tensor.shape[1])][:: -1 if transposed else 1]
    target = _aligned([stop for _, stop in bounds], np.dtype(np.float32))
    _fill(target, tensor, bounds, transposed=transposed)
    return target


def check_tied(checkpoint: Checkpoint) -> None:
    """Checks that a head stored beside the embeddings it is tied to equals them.

    Raises:
        ValueError: it differs.
        OSError: one of them cannot be read.
    """
    if checkpoint.tied_head is None:
        return
    embed = checkpoint.tensors["embed", None]
    pairs = zip(_in_rows(checkpoint.tied_head), _in_rows(embed), strict=True)
    if not all(np.array_equal(one.astype(np.float32), other.astype(np.float32)) for one, other in pairs):
        raise ValueError(
            f"{names.HEAD} in {checkpoint.tied_head.file} differs from {embed.name}, but config.json there says "
            "tie_word_embeddings: expected equal ones, or an untied model"
        )


def _in_rows(tensor: Tensor) -> Iterator[np.ndarray]:
    # Pieces differ in rows where types do.
    for _, block in safetensors_file.blocks(tensor):
        yield from block


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _fill(target: np.ndarray, tensor: Tensor, bounds: list[tuple[int, int]], *, transposed: bool) -> None:
    """Reads the part of a tensor that ``bounds``, of our axes, cut out."""
    (start, stop), *columns = bounds[::-1] if transposed else bounds
    target = target.T if transposed else target
    for first, block in safetensors_file.blocks(tensor, start=start, stop=stop):
        part = block[:, slice(*columns[0])] if columns else block
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            values = part.astype(target.dtype, copy=False)
        if not np.isfinite(values).all():
            place = f"in {tensor.file}" if not np.isfinite(part).all() else f"once it is {target.dtype}"
            raise ValueError(f"{tensor.name} holds values that are not finite {place}: expected numbers only")
        target[first - start : first - start + len(block)] = values
