"""Adapters of PEFT, opened: what each of their tensors changes, checked against the model that they are of.

Files hold factors ``A`` ``[r, in]`` and ``B`` ``[out, r]`` of a matrix ``[out, in]``; of embeddings ``[v, d]`` they are
``[r, v]`` and ``[d, r]``. A product counts ``alpha / r`` times, or ``alpha / sqrt(r)`` times. Whole tensors, of
``modules_to_save`` and biases, stand for those of the model. PEFT adapts embeddings and the head by themselves, so that
a model whose head is its embeddings becomes one whose head is not, unless both are adapted alike.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxsafety.config.names import nearest
from jaxsafety.formats import hf_names, safetensors_file
from jaxsafety.formats.hf_names import HEAD, Slot
from jaxsafety.formats.peft_config import Settings, read_settings
from jaxsafety.formats.safetensors_file import Tensor
from jaxsafety.models.llama import LlamaConfig

TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PICKLE = "adapter_model.bin"
EMBED = hf_names.TABLE["embed"][0]
# Names of factors behind those of their modules, of matrices and of embeddings.
FACTORS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}
_FACTOR = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one tensor.

    Attributes:
        whole: what stands for the model's own; None where that stays.
        factors: ``A`` and ``B`` as stored; None where nothing is added.
        scale: how often their product counts.
    """

    whole: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0

    def added(self, name: str) -> Float[np.ndarray, "m n"] | None:
        """Returns what is added to the tensor of that name, as that is stored, in float32; None for nothing."""
        if self.factors is None:
            return None
        a, b = map(values, self.factors)
        product = np.float32(self.scale) * (b @ a)
        return product.T if name == EMBED else product


@dataclass(frozen=True)
class Adapter:
    """An adapter whose tensors all fit a model.

    Attributes:
        settings: what it says of itself.
        config: the model with it.
        changes: by Hugging Face's names of tensors; others stay.
    """

    settings: Settings
    config: LlamaConfig
    changes: Mapping[str, Change]


def open_adapter(directory: Path, config: LlamaConfig) -> Adapter:
    """Opens an adapter of a model and checks all of it but the values.

    Raises:
        FileNotFoundError: the directory, or a file of it, is missing.
        ValueError: settings that are not followed here; weights in another format; a tensor of no module of the model,
            without its other factor, or of a shape or rank that does not fit. Both sides are named.
    """
    settings = read_settings(directory)
    # With a head of its own, if it has one or not: an adapter may give it one.
    expected = {slot.name: slot for slot in hf_names.slots(replace(config, tied=False))}
    wholes, factors = _sorted(_tensors(directory), expected)
    for module in settings.copies:
        if not any(replace(settings, copies=(module,)).is_copy(module_of(name)) for name in wholes):
            raise ValueError(f"{directory / TENSORS_FILE} holds no {module}, which modules_to_save names: expected it")
    config = _of_vocabulary(config, wholes)
    expected = {slot.name: slot for slot in hf_names.slots(replace(config, tied=False))}
    for name, tensor in wholes.items():
        _check_shape(tensor, expected[name].shape)
    changes = {name: _change(expected[name], wholes.get(name), factors.get(name), settings)
               for name in expected if name in wholes or name in factors}  # fmt: skip
    if not changes:
        raise ValueError(f"{directory / TENSORS_FILE} holds no tensors: expected those of an adapter")
    return Adapter(settings, replace(config, tied=config.tied and _stays_tied(changes, settings)), changes)


def _tensors(directory: Path) -> dict[str, Tensor]:
    file = directory / TENSORS_FILE
    if not file.is_file() and (directory / _PICKLE).exists():
        raise ValueError(
            f"{directory} holds a pickled adapter ({_PICKLE}), which could run code when it is read: expected "
            f"{TENSORS_FILE}; convert it with PEFT's save_pretrained(path, safe_serialization=True)"
        )
    return safetensors_file.read_header(file)


def _sorted(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Slot]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Tensors that stand for whole ones of the model, and factors, by the names of what they change."""
    wholes: dict[str, Tensor] = {}
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        own = key.removeprefix(PREFIX)
        if tensor.code not in safetensors_file.DTYPES:
            known = ", ".join(safetensors_file.DTYPES)
            raise ValueError(f"{key} is stored as {tensor.code} in {tensor.file}, expected one of {known}")
        found = _FACTOR.fullmatch(own)
        # Those of embeddings have names of their own.
        if found and found[2] in FACTORS[f"{found[1]}.weight" == EMBED] and f"{found[1]}.weight" in expected:
            factors.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
            continue
        name = own.replace(".base_layer.", ".")
        if not key.startswith(PREFIX) or name not in expected or name in wholes:
            known = [f"{PREFIX}{module_of(one)}.{end}" for one in expected for end in FACTORS[one == EMBED]]
            raise ValueError(f"{tensor.file} holds {key}, which is nothing of the model's{nearest(key, known)}")
        wholes[name] = tensor
    return wholes, factors


def _of_vocabulary(config: LlamaConfig, wholes: Mapping[str, Tensor]) -> LlamaConfig:
    """The model with as many tokens as the embeddings that an adapter brings, where it brings the head's, too."""
    embed = wholes.get(EMBED)
    if embed is None or not embed.shape or (HEAD not in wholes and not config.tied):
        return config
    return replace(config, vocab_size=embed.shape[0])


def _check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.name} is {list(tensor.shape)} in {tensor.file}, expected {list(shape)} by the model it adapts"
        )


def _change(slot: Slot, whole: Tensor | None, factors: Mapping[str, Tensor] | None, settings: Settings) -> Change:
    if factors is None:
        return Change(whole)
    module, embeds = module_of(slot.name), slot.name == EMBED
    names = FACTORS[embeds]
    if lost := next((name for name in names if name not in factors), None):
        there = next(iter(factors.values()))
        raise ValueError(f"{there.file} holds {there.name} without {PREFIX}{module}.{lost}: expected both factors")
    if len(slot.shape) != 2:
        raise ValueError(f"{factors[names[0]].name} in {factors[names[0]].file} is of a vector, expected of a matrix")
    a, b = (factors[name] for name in names)
    out, into = slot.shape[::-1] if embeds else slot.shape
    rank = settings.rank_of(module)
    if a.shape[:1] != (rank,):
        raise ValueError(
            f"{a.name} is {list(a.shape)} in {a.file}, expected rank {rank} first, as {settings.file.name} says of it"
        )
    _check_shape(a, (rank, into))
    _check_shape(b, (out, rank))
    return Change(whole, (a, b), settings.scale(module))


def _stays_tied(changes: Mapping[str, Change], settings: Settings) -> bool:
    """Whether the head of a model is still its embeddings."""
    embed, head = changes.get(EMBED, Change()), changes.get(HEAD)
    if head is None:
        # A tensor that is no module's own is that of both.
        return embed.factors is None and not settings.is_copy(module_of(EMBED))
    if not settings.tying or (embed.factors is None) != (head.factors is None):
        return False
    if embed.factors is None:
        return embed.whole is not None and np.array_equal(values(embed.whole), values(head.whole))
    pairs = zip(embed.factors, reversed(head.factors), strict=True)
    return all(np.array_equal(values(one), values(other).T) for one, other in pairs)


def values(tensor: Tensor) -> Float[np.ndarray, "..."]:
    """Returns a tensor of an adapter as float32, or raises a ValueError if it is not finite, an OSError if cut off."""
    found = np.concatenate([block.astype(np.float32) for _, block in safetensors_file.blocks(tensor)])
    if not np.isfinite(found).all():
        raise ValueError(f"{tensor.name} holds values that are not finite in {tensor.file}: expected numbers only")
    return found


def module_of(name: str) -> str:
    """Returns the name of the module that a tensor of a model is of."""
    return name.rpartition(".")[0]
