"""How a ``config.json`` says that positions rotate, in the words of transformers 4 and 5, to and from ``Rope``."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsafety.config.names import nearest
from jaxsafety.formats import hf_attributes as attributes
from jaxsafety.models.llama import Rope

_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Scaling by which the context grows beyond ``max_position_embeddings``.
_STRETCHED = ("linear", "dynamic")
# What asks for nothing, whatever the type.
_NEUTRAL = {("factor", 1.0), ("partial_rotary_factor", 1.0)}


def read_rope(file: Path, raw: Mapping[str, Any], *, max_tokens: int, base: float = Rope.base) -> Rope:
    """Returns what ``rope_theta``, ``rope_scaling`` and ``rope_parameters`` of a configuration say together.

    ``max_tokens`` is its ``max_position_embeddings``, ``base`` what it turns by unless it says so; ``file`` is for
    messages.

    Raises:
        ValueError: they contradict each other; another type than default, linear, dynamic, yarn and llama3; a value
            that is missing, not valid, or not read by the type.
    """
    given = _merge(file, raw)
    kind = given.pop("rope_type", "default")
    known = ["default"] if raw.get("model_type") == "phi3" else list(_KEYS)
    if kind not in known:
        expected = "one of " * (len(known) > 1) + ", ".join(known)
        raise ValueError(f"{file}: rope_type is {kind!r}, expected {expected}")
    base = attributes.number(file, given, "rope_theta", default=base)
    given.pop("rope_theta", None)
    for name, value in given.items():
        if name not in _KEYS[kind] and (name, value) not in list(_NEUTRAL):
            hint = nearest(name, _KEYS[kind])
            raise ValueError(f"{file}: {name} is {value!r}, which positions of type {kind} do not read{hint}")
    if kind == "default":
        return Rope(base=base)
    factor = attributes.number(file, given, "factor")
    if kind == "linear":
        return Rope(base=base, scaling="linear", factor=factor)
    if kind == "dynamic":
        original = given.get("original_max_position_embeddings", max_tokens)
        if original != max_tokens:
            raise ValueError(
                f"{file}: original_max_position_embeddings is {original!r}, expected max_position_embeddings "
                f"{max_tokens}: beyond that, and no other number of tokens, transformers changes dynamic positions"
            )
        return Rope(base=base, scaling="dynamic", factor=factor, original_tokens=max_tokens)
    if kind == "yarn":
        return _yarn(file, given, base=base, factor=factor, max_tokens=max_tokens)
    low, high = (attributes.number(file, given, f"{name}_freq_factor") for name in ("low", "high"))
    if low >= high:
        raise ValueError(f"{file}: high_freq_factor is {high}, expected more than low_freq_factor {low}")
    original = attributes.integer(file, given, "original_max_position_embeddings")
    return Rope(base, "llama3", factor, low, high, original)


def _yarn(file: Path, given: Mapping[str, Any], *, base: float, factor: float, max_tokens: int) -> Rope:
    if given.get("truncate", True) is not True:
        raise ValueError(f"{file}: truncate is {given['truncate']!r}, expected true: places of channels are whole here")
    low = attributes.number(file, given, "beta_slow", default=1.0)
    high = attributes.number(file, given, "beta_fast", default=32.0)
    if low >= high:
        raise ValueError(f"{file}: beta_fast is {high}, expected more than beta_slow {low}")
    original = {"original_max_position_embeddings": max_tokens} | given
    original = attributes.integer(file, original, "original_max_position_embeddings")
    # Queries and keys both have it, so that scores have its square.
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    amplitude = attributes.number(file, given, "attention_factor", default=usual)
    return Rope(base, "yarn", factor, low, high, original, amplitude)


def read_local_rope(file: Path, raw: Mapping[str, Any]) -> Rope:
    """Returns how Gemma 3's layers with a window turn; see :func:`read_rope`."""
    nested = _nested(raw, "sliding_attention")
    own = {"rope_theta": raw.get("rope_local_base_freq"), "rope_parameters": nested}
    return read_rope(file, own, max_tokens=1, base=attributes.LOCAL_BASE)


def write_rope(rope: Rope) -> dict[str, Any]:
    """Returns the attributes of ``rope`` in the dialect of transformers 4, which 5 reads, too."""
    if rope.scaling == "none":
        return {"rope_theta": rope.base, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
        scaling |= {"original_max_position_embeddings": rope.original_tokens}
    if rope.scaling == "yarn":
        scaling |= {"beta_slow": rope.low_frequency, "beta_fast": rope.high_frequency}
        scaling |= {"original_max_position_embeddings": rope.original_tokens, "attention_factor": rope.amplitude}
    return {"rope_theta": rope.base, "rope_scaling": scaling}


def scaled_tokens(rope: Rope, unscaled: int, *, kind: str) -> int:
    """Returns the longest input: linear and dynamic scaling stretch ``max_position_embeddings``, llama3 includes it.

    So do all models of ``kind`` gemma3_text. Of yarn a file may say the one or the other: the longer of both.
    """
    if rope.scaling == "yarn":
        return max(unscaled, int(rope.factor * rope.original_tokens))
    return int(rope.factor * unscaled) if _is_stretched(rope, kind) else unscaled


def unscaled_tokens(rope: Rope, scaled: int, *, kind: str) -> int:
    """Returns the ``max_position_embeddings`` that :func:`scaled_tokens` gives ``scaled`` for.

    Raises:
        ValueError: there is none, or dynamic scaling begins elsewhere.
    """
    if not _is_stretched(rope, kind):
        return scaled
    unscaled = rope.original_tokens if rope.scaling == "dynamic" else math.ceil(scaled / rope.factor)
    if (fitting := scaled_tokens(rope, unscaled, kind=kind)) != scaled:
        raise ValueError(
            f"max_tokens: got {scaled} with {rope.scaling} positions, expected {fitting}: "
            f"their factor {rope.factor:g} times max_position_embeddings, {unscaled}"
        )
    return unscaled


def _is_stretched(rope: Rope, kind: str) -> bool:
    return rope.scaling in _STRETCHED and kind != "gemma3_text"


def _nested(raw: Mapping[str, Any], layers: str) -> Any:
    """The ``rope_parameters`` of layers of a type, where every type has its own."""
    given = raw.get("rope_parameters")
    return given.get(layers) if isinstance(given, dict) else given


def _merge(file: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of both dialects in one dict; a file may use both, as long as they agree."""
    merged: dict[str, Any] = {}
    own = _nested(raw, "full_attention") if raw.get("model_type") == "gemma3_text" else raw.get("rope_parameters")
    for part in ({"rope_theta": raw.get("rope_theta")}, raw.get("rope_scaling"), own):
        if not isinstance(part or {}, dict):
            raise ValueError(f"{file}: rope_scaling or rope_parameters is {part!r}, expected an object or null")
        for key, value in (part or {}).items():
            name = "rope_type" if key == "type" else key
            if value is not None and merged.setdefault(name, value) != value:
                raise ValueError(f"{file}: {name} is {merged[name]!r} and again {value!r}, expected one value")
    return merged
