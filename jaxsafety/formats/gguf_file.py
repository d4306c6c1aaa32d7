"""A GGUF file, opened: what it says of its model, and its tensors, each dequantised when it is asked for.

The ``gguf`` package reads the format and all its kinds of quantisation; the file is mapped into memory, so that what is
held is one tensor. Names and shapes are those of llama.cpp; shapes are given here in the order of Hugging Face's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
# What a damaged file makes of the package that reads it.
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class GGUF:
    """A file whose tensors all lie in it.

    Attributes:
        file: where it is.
        values: its metadata by llama.cpp's names; arrays are lists.
        tensors: of the ``gguf`` package, by name.
    """

    file: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, ``[out, in]`` of a matrix."""
        return tuple(self.tensors[name].shape.tolist()[::-1])

    def tensor(self, name: str) -> Float[np.ndarray, "..."]:
        """Returns a tensor as float32, ``[out, in]`` of a matrix.

        Raises:
            ValueError: it is quantised in a way that the package does not know.
        """
        import gguf

        own = self.tensors[name]
        try:
            return gguf.dequantize(own.data, own.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.file}: {name} is stored as {own.tensor_type.name}, which the installed gguf cannot dequantise: "
                "expected a newer gguf, or the file in another quantisation"
            ) from error


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by how it begins or, where it is not there, by its suffix."""
    if not path.is_file():
        return path.suffix == SUFFIX and not path.exists()
    with path.open("rb") as content:
        return content.read(len(_MAGIC)) == _MAGIC or path.suffix == SUFFIX


def open_gguf(file: Path) -> GGUF:
    """Opens a GGUF file.

    Raises:
        ImportError: the extra ``gguf`` is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is none, is damaged or cut off, or is one of several parts.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install '.[gguf]' in a checkout") from error
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: expected a GGUF file")
    with file.open("rb") as content:
        if content.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{file} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
    try:
        reader = gguf.GGUFReader(file)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except _DAMAGE as error:
        raise ValueError(f"{file} is damaged, cut off, or of a version that gguf does not know: {error}") from error
    if (parts := values.get("split.count") or 1) > 1:
        raise ValueError(f"{file} is one of {parts} parts: join them with `llama-gguf-split --merge`")
    return GGUF(file, values, {tensor.name: tensor for tensor in reader.tensors})
