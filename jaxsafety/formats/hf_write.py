"""Hugging Face checkpoints written: a directory appears under its name only when all of it is on the disk."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafety.config.names import nearest
from jaxsafety.entry.annotations import checked
from jaxsafety.formats import hf_names as names
from jaxsafety.formats import safetensors_file
from jaxsafety.formats.hf_config import CONFIG_FILE, ParamsDtype, config_text, is_fused
from jaxsafety.formats.hf_index import INDEX_FILE, WEIGHTS_FILE
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import atomic, whole
from jaxsafety.tree import flatten
from jaxsafety.types import Params

SHARD_BYTES = 5 * 10**9  # of one file, as transformers cuts them
# What goes with the weights: the tokenizer's files, its chat templates, and the defaults of sampling.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
)
_GENERATION = ("generation_config.json",)


@checked
def save(
    directory: Path,
    params: Params,
    config: LlamaConfig,
    *,
    dtype: ParamsDtype,
    shard_bytes: int = SHARD_BYTES,
    source: Path | None = None,
) -> None:
    """Writes a model as a checkpoint directory that transformers loads; see :func:`write_checkpoint`.

    Raises:
        ValueError: ``params`` do not fit ``config`` (both sides are named), or are not addressable from this process.
    """
    flat = flatten(params)
    _check_fits(flat, names.leaf_shapes(config))

    def read(path: str, layer: int | None) -> Any:
        return flat[path] if layer is None else flat[path][layer]

    write_checkpoint(directory, read, config=config, dtype=dtype, shard_bytes=shard_bytes, source=source)


@checked
def write_checkpoint(
    directory: Path,
    read: Callable[[str, int | None], Any],
    *,
    config: LlamaConfig,
    dtype: ParamsDtype,
    shard_bytes: int = SHARD_BYTES,
    source: Path | None = None,
    tokenizer: Path | None = None,
    ignored: tuple[str, ...] = (),
) -> None:
    """Writes a checkpoint directory from tensors that are made one at a time.

    ``directory`` must not exist or be empty. ``read`` goes from one of our paths and a layer (None outside the layers)
    to that tensor, matrices ``[in, out]``, which is stored in ``dtype``. ``shard_bytes`` are the most that one file may
    hold, if no tensor alone is larger. ``source`` is a checkpoint directory whose tokenizer, unless ``tokenizer`` is
    another's, goes with the model; see also :func:`~jaxsafety.formats.hf_config.config_text`.

    Raises:
        FileNotFoundError: ``source`` is not a checkpoint directory, or see :func:`companions`.
        ValueError: a tensor has another shape than ``config`` says or is not finite in ``dtype``; no model type has
            this configuration; or ``directory`` holds something.
        OSError: it cannot be written; nothing is left there.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: got {shard_bytes}, expected at least 1")
    text = config_text(config, dtype=dtype, source=source, ignored=ignored)
    beside = companions(source, tokenizer=tokenizer)
    with whole.directory(directory) as scratch:
        atomic.atomic_write(scratch / CONFIG_FILE, text)
        copy(beside, scratch)
        slots = names.slots(config, fused=is_fused(scratch))
        _write_weights(scratch, read, slots, dtype=jnp.dtype(dtype), shard_bytes=shard_bytes)


def companions(source: Path | None, *, tokenizer: Path | None = None) -> list[Path]:
    """Returns what goes with a model's weights: the tokenizer's files, of ``source`` or another, and how it generates.

    Raises:
        FileNotFoundError: one of them is a link to nothing.
    """
    places = ((tokenizer or source, _TOKENIZER), (source, _GENERATION))
    files = {file for place, patterns in places if place for pattern in patterns for file in place.glob(pattern)}
    if lost := next((file for file in sorted(files) if not file.exists()), None):
        raise FileNotFoundError(f"{lost} is a link to {lost.readlink()}, which is not there: expected the file")
    return sorted(files)


def copy(files: Sequence[Path], directory: Path) -> None:
    """Copies files, and folders with what is in them, into a directory."""
    for file in files:
        (shutil.copytree if file.is_dir() else shutil.copyfile)(file, directory / file.name)


def _check_fits(flat: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    for path in sorted(flat.keys() ^ shapes.keys()):
        there, absent = ("params", "config") if path in flat else ("config", "params")
        hint = nearest(path, shapes if path in flat else flat)
        raise ValueError(f"{path} is in {there} but not in {absent}: expected the same model{hint}")
    for path, shape in shapes.items():
        if jnp.shape(flat[path]) != shape:
            raise ValueError(f"{path} has shape {jnp.shape(flat[path])} in params and {shape} by config")
        if isinstance(flat[path], jax.Array) and not flat[path].is_fully_addressable:
            raise ValueError(f"{path} lies in part on other processes: expected params gathered by hosts.fetch")


def _write_weights(
    scratch: Path,
    read: Callable[[str, int | None], Any],
    slots: Sequence[names.Slot],
    *,
    dtype: np.dtype,
    shard_bytes: int,
) -> None:
    tensors = {name: list(own) for name, own in itertools.groupby(slots, lambda slot: slot.name)}
    shapes = names.shapes(slots)
    shards = _split(shapes, itemsize=dtype.itemsize, shard_bytes=shard_bytes)
    stem, suffix = WEIGHTS_FILE.split(".")
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [WEIGHTS_FILE]
    for file, shard in zip(files, shards, strict=True):
        values = (_tensor(read, tensors[name], dtype) for name in shard)
        safetensors_file.write(scratch / file, {name: shapes[name] for name in shard}, values, dtype=dtype)
    if len(shards) > 1:
        size = dtype.itemsize * sum(map(math.prod, shapes.values()))
        placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        atomic.atomic_write(scratch / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _split(shapes: Mapping[str, tuple[int, ...]], *, itemsize: int, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = itemsize * math.prod(shape)
        if size > room or not shards:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _tensor(read: Callable[[str, int | None], Any], slots: Sequence[names.Slot], dtype: np.dtype) -> np.ndarray:
    parts = [_stored(read(slot.path, slot.layer), slot, dtype) for slot in slots]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _stored(tensor: Any, slot: names.Slot, dtype: np.dtype) -> np.ndarray:
    values = np.asarray(tensor)
    values = values.T if names.is_transposed(slot.path) else values
    if values.shape != slot.shape:
        raise ValueError(f"{slot.name} would be {list(values.shape)}, expected {list(slot.shape)} by config")
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        values = values.astype(dtype, copy=False)
    if not np.isfinite(values).all():
        where = slot.path if slot.layer is None else f"{slot.path}, layer {slot.layer},"
        raise ValueError(f"{where} is not finite as {dtype}: expected numbers only")
    return values
