"""The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes, end to end.

Read and written here and not by the safetensors library, which maps whole files into memory or wants every tensor of a
file at once: this reads any rows of a tensor and writes one tensor after another. Values are in
C order and little-endian, as on every machine that JAX runs on.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
_BLOCK_BYTES = 2**20  # what is read at once: a transposed copy of it stays in the cache
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a file: its bytes from ``start`` to before ``stop``, its shape as stored.

    ``code`` is the format's name of its type, e.g. ``"BF16"``.
    """

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> np.dtype:
        """Its NumPy type."""
        return DTYPES[self.code]

    def rows(self, start: int, stop: int) -> "Tensor":
        """Returns where its rows ``start`` to ``stop`` lie."""
        size = (self.stop - self.start) // max(self.shape[0], 1)
        place = {"start": self.start + size * start, "stop": self.start + size * stop}
        return replace(self, shape=(stop - start, *self.shape[1:]), **place)


def read_header(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name, from its header alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, is cut off, or its tensors overlap or leave gaps.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file: expected a safetensors file")
    size = file.stat().st_size
    with file.open("rb") as content:
        begin = content.read(len(_LFS))
        if begin == _LFS:
            raise ValueError(f"{file} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
        length = int.from_bytes(begin[:_LENGTH_BYTES], "little")
        if len(begin) < _LENGTH_BYTES or length > _MAX_HEADER_BYTES:
            raise ValueError(f"{file} is not a safetensors file: it does not begin with the length of a header")
        content.seek(_LENGTH_BYTES)
        text = content.read(length)
    if len(text) < length:
        raise ValueError(f"{file} is cut off: got {size} bytes, its header alone takes {_LENGTH_BYTES + length}")
    entries = _parse(file, text)
    tensors = {name: _tensor(file, name, entry, data=_LENGTH_BYTES + length) for name, entry in entries.items()}
    _check_layout(file, tensors.values(), begin=_LENGTH_BYTES + length, size=size)
    return tensors


def blocks(tensor: Tensor, *, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the rows ``start`` to ``stop`` of a tensor in pieces of about a megabyte, each with its first row.

    Each piece is in the stored type and valid until the next is asked for.

    Raises:
        ValueError: the file has become shorter than when its header was read.
        OSError: it cannot be read.
    """
    stop = tensor.shape[0] if stop is None else stop
    row_bytes = tensor.dtype.itemsize * math.prod(tensor.shape[1:])
    step = max(1, _BLOCK_BYTES // row_bytes)
    buffer = np.empty((min(step, stop - start), *tensor.shape[1:]), tensor.dtype)
    with tensor.file.open("rb", buffering=0) as content:
        content.seek(tensor.start + start * row_bytes)
        for first in range(start, stop, step):
            block = buffer[: min(step, stop - first)]
            _fill(content, block.reshape(-1).view(np.uint8), tensor)
            yield first, block


def write(file: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[np.ndarray], *, dtype: np.dtype) -> None:
    """Writes a file, one tensor after another, and brings it to the disk.

    It is not atomic: an unfinished file is recognised as cut off. ``shapes`` are the tensors' names and shapes in the
    order of ``tensors``, which are all of ``dtype``, in any memory layout.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-len(text) % 8 + len(text))  # values begin at a multiple of eight bytes
    with file.open("wb") as content:
        content.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for name, tensor in zip(shapes, tensors, strict=True):
            if tensor.shape != shapes[name] or tensor.dtype != dtype:
                raise ValueError(f"{name}: got {tensor.dtype}{list(tensor.shape)}, expected {dtype}{shapes[name]}")
            # The bytes of a transposed view lie in another order than its values.
            content.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        content.flush()
        os.fsync(content.fileno())


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise ValueError(f"{file} holds {twice} twice: expected every tensor once")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file} is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _tensor(file: Path, name: str, entry: Any, *, data: int) -> Tensor:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{file}: the header's entry of {name} is not dtype, shape and data_offsets")
    if code in DTYPES and end - begin != DTYPES[code].itemsize * math.prod(shape):
        raise ValueError(f"{file}: {name} is {code}{list(shape)}, but the header gives it {end - begin} bytes")
    return Tensor(name, file, code, shape, data + begin, data + end)


def _check_layout(file: Path, tensors: Iterable[Tensor], *, begin: int, size: int) -> None:
    end, last = begin, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != end:
            relation = "overlaps" if tensor.start < end else "does not follow"
            raise ValueError(f"{file}: {tensor.name} {relation} {last}: expected tensors end to end")
        end, last = tensor.stop, tensor.name
    if size != end:
        state = "is cut off" if size < end else "is too long"
        raise ValueError(f"{file} {state}: got {size} bytes, expected {end} by its header")


def _fill(content: BinaryIO, target: np.ndarray, tensor: Tensor) -> None:
    done = 0
    while done < target.size:
        count = content.readinto(target[done:])
        if not count:
            raise ValueError(f"{tensor.file} was cut off while {tensor.name} was read: expected {tensor.stop} bytes")
        done += count
