"""PyTorch files of tensors, read as NumPy arrays and as nothing else. The only module that imports torch.

A file that holds anything but tensors is refused, never unpickled: unpickling runs what the file says.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def read(file: Path) -> dict[str, np.ndarray]:
    """Returns the state dict that ``torch.save`` wrote: name to float32 array, whatever type of number is stored.

    Of a zip archive only what is used comes into memory; torch's older format is read, too.

    Raises:
        ImportError: torch is not installed.
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no PyTorch file, is damaged, or holds anything that is not a dense tensor of real numbers.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            'the authors\' checkpoints are PyTorch files, which torch reads: pip install ".[official]" in a checkout'
        ) from error
    if not file.is_file():
        raise FileNotFoundError(f"no file at {file}: expected a checkpoint that torch.save wrote")
    with file.open("rb") as content:
        start = content.read(1)
    is_zip = zipfile.is_zipfile(file)
    try:
        # torch leaves the archive's checksums unread.
        if is_zip and (damaged := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"wrong checksum of {damaged}")
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except Exception as error:  # of damaged bytes torch says many things
        raise ValueError(_unreadable(file, like_torch=is_zip or start == b"\x80")) from error
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{file} holds a {type(found).__name__}, expected the tensors of a model by name")
    return {name: _host(file, name, value) for name, value in found.items()}


def _unreadable(file: Path, *, like_torch: bool) -> str:
    if not like_torch:
        return f"{file} is not a PyTorch file: expected a checkpoint that torch.save wrote"
    return (
        f"{file} is damaged or holds other things than tensors, which could run code when they are read: "
        "expected a model's state dict that torch.save wrote"
    )


def _host(file: Path, name: Any, value: Any) -> np.ndarray:
    import torch

    if not isinstance(name, str):
        raise ValueError(f"{file} has {name!r} among its names, expected text")
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__} in {file}, expected a tensor")
    if value.layout != torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else value.dtype
        raise ValueError(f"{name} is {value.layout}, {kind} in {file}, expected a dense tensor of real numbers")
    return value.detach().to(torch.float32).numpy()
