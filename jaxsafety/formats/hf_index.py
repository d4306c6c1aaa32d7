"""The files that hold a Hugging Face checkpoint's weights: one, or several with an index. Pickles are refused."""

import json
from pathlib import Path

from jaxsafety.config.names import nearest
from jaxsafety.formats import safetensors_file
from jaxsafety.formats.safetensors_file import Tensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
_SHOWN = 3  # files named in one message


def find_tensors(directory: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by Hugging Face's name, from the headers of its files.

    Raises:
        FileNotFoundError: its weights or a file that its index names are missing.
        ValueError: weights in another format, a damaged file, or an index that does not say what its files hold.
    """
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.exists() and index.exists():
        raise ValueError(f"{directory} holds both {WEIGHTS_FILE} and {INDEX_FILE}: expected one, remove the other")
    if index.exists():
        return _sharded(index)
    if not single.exists():
        raise _no_weights(directory)
    return safetensors_file.read_header(single)


def _no_weights(directory: Path) -> Exception:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickles:
        return ValueError(
            f"{directory} holds pickled weights ({pickles[0]}), which could run code when they are read: expected "
            f"{WEIGHTS_FILE}; convert them with transformers' save_pretrained(path, safe_serialization=True)"
        )
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    hint = f", found {', '.join(others[:_SHOWN])}" if others else ""
    return FileNotFoundError(f"{directory} holds no weights: expected {WEIGHTS_FILE} or {INDEX_FILE}{hint}")


def _sharded(index: Path) -> dict[str, Tensor]:
    placed = weight_map(index)
    found: dict[str, Tensor] = {}
    for name in sorted(set(placed.values())):
        file = index.parent / name
        if not file.is_file():
            known = [other.name for other in index.parent.glob("*.safetensors")]
            raise FileNotFoundError(f"{index} names {name}, which is not there{nearest(name, known)}")
        for tensor in safetensors_file.read_header(file).values():
            if tensor.name in found:
                raise ValueError(f"{tensor.name} is in both {found[tensor.name].file} and {file}: expected it once")
            found[tensor.name] = tensor
    for name in sorted(placed.keys() | found.keys()):
        there = found[name].file.name if name in found else "no file"
        if there != placed.get(name):
            raise ValueError(f"{name} is in {there}, but {placed.get(name, 'nowhere')} by {index}")
    return found


def weight_map(index: Path) -> dict[str, str]:
    """Returns the names of the files that an index places tensors in, by tensor; a ValueError says so if it is none."""
    try:
        placed = json.loads(index.read_bytes())["weight_map"]
        valid = all(isinstance(name, str) and Path(name).name == name for name in placed.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid or not placed:
        raise ValueError(f"{index} is not an index: expected a weight_map from tensors to files beside it")
    return placed
