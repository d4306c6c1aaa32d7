"""Hugging Face checkpoints of decoders like Llama to and from stacked parameters, one tensor at a time.

``load`` and ``save`` are for whole models; ``open_checkpoint`` reads single matrices, and ``write_checkpoint`` takes
them one by one. Nothing here imports torch, transformers or the safetensors library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Sharding

from jaxsafety.entry.annotations import checked
from jaxsafety.formats.hf_checkpoint import Checkpoint, check_tied, open_checkpoint
from jaxsafety.formats.hf_config import ParamsDtype, read_config
from jaxsafety.formats.hf_names import leaf_shapes
from jaxsafety.formats.hf_tensors import TensorFiles, open_tensors
from jaxsafety.formats.hf_write import save, write_checkpoint
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.tree import flatten, unflatten
from jaxsafety.types import Params

__all__ = [
    "Checkpoint",
    "ParamsDtype",
    "TensorFiles",
    "load",
    "open_checkpoint",
    "open_tensors",
    "read_config",
    "save",
    "write_checkpoint",
]

ShardingRule = Callable[[str, tuple[int, ...]], Sharding]


@checked
def load(
    directory: Path,
    *,
    dtype: ParamsDtype,
    shardings: ShardingRule | Params | None = None,
    ignored: tuple[str, ...] = (),
) -> tuple[LlamaConfig, Params]:
    """Loads a model from safetensors, after checking that its files hold it exactly.

    Host memory peaks at the model in ``dtype``, whatever type it is stored in, where it stays on the host, and at its
    largest leaf where it goes to accelerators. ``shardings`` says where each leaf goes: a tree of shardings, or a rule
    from its path and shape, such as :func:`jaxsafety.engine.sharding.fsdp`; None is the default device. Each process
    reads what its devices hold. For ``ignored`` see :func:`read_config`.

    Returns:
        The model's configuration and parameters: matrices ``[in, out]``, below ``blocks`` with a leading ``l``.

    Raises:
        FileNotFoundError: the directory or a file of it is missing.
        ValueError: the checkpoint is not one that :func:`open_checkpoint` opens, holds values that are not finite, or
            ``shardings`` has other paths than the model.
    """
    checkpoint = open_checkpoint(directory, ignored=ignored)
    shapes = leaf_shapes(checkpoint.config)
    placed = _placements(shapes, shardings)
    check_tied(checkpoint)
    flat = {path: _place(checkpoint, path, shape, dtype, placed[path]) for path, shape in shapes.items()}
    return checkpoint.config, unflatten(flat)


def _placements(
    shapes: dict[str, tuple[int, ...]], shardings: ShardingRule | Params | None
) -> dict[str, Sharding | None]:
    if shardings is None:
        return dict.fromkeys(shapes)
    if callable(shardings):
        return {path: shardings(path, shape) for path, shape in shapes.items()}
    placed = flatten(shardings)
    for path in sorted(placed.keys() ^ shapes.keys()):
        there, absent = ("shardings", "the model") if path in placed else ("the model", "shardings")
        raise ValueError(f"{path} is in {there} but not in {absent}: expected a sharding for every parameter")
    return placed


def _place(
    checkpoint: Checkpoint, path: str, shape: tuple[int, ...], dtype: ParamsDtype, sharding: Sharding | None
) -> jax.Array:
    if sharding is None:
        leaf = jax.device_put(checkpoint.leaf(path, dtype=dtype))
    else:
        leaf = jax.make_array_from_callback(
            shape, sharding, lambda index: checkpoint.leaf(path, index=index, dtype=dtype)
        )
    # Transfers run behind: without this the host would hold every leaf at once.
    return leaf.block_until_ready()
