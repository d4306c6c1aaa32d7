"""A model and an adapter of PEFT's to one checkpoint directory, tensor by tensor in float32."""

from pathlib import Path

import numpy as np

from jaxsafety.formats import hf_names, hf_write
from jaxsafety.formats.hf_checkpoint import Checkpoint, check_tied, open_checkpoint
from jaxsafety.formats.hf_config import ParamsDtype
from jaxsafety.formats.hf_names import HEAD, Slot
from jaxsafety.formats.peft import EMBED, Adapter, Change, module_of, open_adapter, values


def write(base: Path, adapter: Path, directory: Path, *, dtype: ParamsDtype | None = None) -> None:
    """Writes a model with its adapter merged in, ``W + scale B A`` in float32, as a checkpoint directory.

    Memory is that of the largest tensor and its change. ``directory`` must not exist or be empty; ``dtype`` is what
    weights are stored in, None for the type of the base's. The adapter's tokenizer goes with it if it has one.

    Raises:
        FileNotFoundError: there is no such model or adapter.
        ValueError: one of them cannot be read, they do not fit, or a tensor is not finite.
        OSError: the directory cannot be written; nothing is left there.
    """
    checkpoint = open_checkpoint(base)
    check_tied(checkpoint)
    own = open_adapter(adapter, checkpoint.config)
    slots = {(slot.path, slot.layer): slot for slot in hf_names.slots(own.config)}

    def read(path: str, layer: int | None) -> np.ndarray:
        found = _merged(checkpoint, own, slots[path, layer])
        return found.T if hf_names.is_transposed(path) else found

    hf_write.write_checkpoint(
        directory, read, config=own.config, dtype=dtype or checkpoint.tensors["embed", None].dtype.name, source=base,
        tokenizer=adapter if has_tokenizer(adapter) else None,
    )  # fmt: skip


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer lies in an adapter's directory, as trainers put it there."""
    return (directory / "tokenizer.json").is_file()


def _merged(checkpoint: Checkpoint, own: Adapter, slot: Slot) -> np.ndarray:
    """One tensor of the model with its adapter, as it is stored, in float32."""
    change = own.changes.get(slot.name, Change())
    added = change.added(slot.name)
    whole = change.whole
    if slot.name == HEAD and whole is None and checkpoint.config.tied and not own.settings.is_copy(module_of(EMBED)):
        whole = own.changes.get(EMBED, Change()).whole
    found = _stored(checkpoint, slot) if whole is None else values(whole)
    if found.shape != slot.shape:
        raise ValueError(
            f"{slot.name} is {list(found.shape)} in {checkpoint.directory}, expected {list(slot.shape)} by the "
            f"embeddings in {own.settings.file.parent}"
        )
    return found if added is None else found + added


def _stored(checkpoint: Checkpoint, slot: Slot) -> np.ndarray:
    if slot.path == "unembed" and checkpoint.config.tied:
        return checkpoint.leaf("embed", dtype="float32")
    if slot.layer is None:
        found = checkpoint.leaf(slot.path, dtype="float32")
    else:
        found = checkpoint.leaf(slot.path, index=(slice(slot.layer, slot.layer + 1),), dtype="float32")[0]
    return found.T if hf_names.is_transposed(slot.path) else found
