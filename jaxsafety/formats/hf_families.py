"""What a model type of Hugging Face's computes beside the sizes that all have: from and to a ``config.json``.

Some of it is in the file, some goes by the type alone. An attribute that transformers ignores in a type is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsafety.formats import hf_attributes as attributes
from jaxsafety.models.llama import LlamaConfig

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
GEMMAS = ("gemma2", "gemma3_text")
# Types whose files hold queries, keys and values in one matrix, and gate and up.
FUSED = ("phi3",)
_GEMMA: dict[str, Any] = {"norms": "both", "norm_offset": True, "activation": "gelu"}
_BY_TYPE: dict[str, dict[str, Any]] = {
    "qwen3": {"query_norm": "head"},
    "olmo2": {"query_norm": "whole", "norms": "after"},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"query_norm": "head"},
}
# Types whose ``attention_bias`` is one of queries, keys, values and the output; those whose ``mlp_bias`` is read; those
# without a window; those that turn it on by ``use_sliding_window``; and those that go by ``layer_types``.
_BIASED = ("llama", "qwen3", "smollm3", "olmo2", *GEMMAS)
_MLP_BIASED = ("llama", "smollm3")
_UNWINDOWED = ("llama", "olmo2")
_SWITCHED = ("qwen2", "qwen3", "smollm3")
_TYPED = (*_SWITCHED, *GEMMAS)
# transformers refuses these where heads do not divide the width, though head_dim is given.
_DIVIDED = ("llama", *GEMMAS)
_FULL, _SLIDING = "full_attention", "sliding_attention"


def read(file: Path, raw: Mapping[str, Any], kind: str, *, layers: int, width: int) -> dict[str, Any]:
    """Returns the fields of a ``LlamaConfig`` that a type has beside sizes and ``rope``.

    ``raw`` is the configuration with the defaults of its type; ``file`` is for messages.

    Raises:
        ValueError: an attribute is not valid, or one that transformers ignores in this type asks for something.
    """
    rotated = _rotated(file, raw, layers) if kind == "smollm3" else ()
    found = _BY_TYPE.get(kind, {}) | _biases(file, raw, kind) | {"rotated": rotated}
    found |= _windows(file, raw, kind, layers=layers, rotated=rotated)
    return found | _gemma(file, raw, kind, width=width) if kind in GEMMAS else found


def describe(config: LlamaConfig, kind: str) -> dict[str, Any]:
    """Returns the attributes of a type that say what :func:`read` reads, as far as the type has them."""
    raw: dict[str, Any] = {"hidden_act": "silu"}
    if kind in _BIASED:
        raw["attention_bias"] = config.out_bias
    if kind in _MLP_BIASED:
        raw["mlp_bias"] = config.mlp_bias
    if kind not in _UNWINDOWED and not (kind in GEMMAS and config.window is None):
        raw["sliding_window"] = config.window
    if kind in _SWITCHED:
        raw["use_sliding_window"] = config.window is not None
    if kind in ("qwen2", "qwen3"):
        raw["max_window_layers"] = config.layers if config.window is None else 0
    if kind == "smollm3":
        raw["no_rope_layers"] = [int(turns) for turns in config.rotated or (True,) * config.layers]
    if kind in GEMMAS or config.windowed or kind == "smollm3":
        windowed = config.windowed or (config.window is not None,) * config.layers
        raw["layer_types"] = [_SLIDING if own else _FULL for own in windowed]
    if kind in GEMMAS:
        raw |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
        scalar = config.query_scalar or config.head_width
        raw |= {
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar
        }  # transformers wants integers
        raw |= {"attn_logit_softcapping": config.attn_softcap, "final_logit_softcapping": config.logit_softcap}
    if kind == "gemma3_text" and config.local_rope is not None:
        raw["rope_local_base_freq"] = config.local_rope.base
    return raw


def can_be(config: LlamaConfig, kind: str) -> bool:
    """Whether transformers takes the sizes of a configuration for a model of this type."""
    return kind not in _DIVIDED or not config.width % config.heads


def _biases(file: Path, raw: Mapping[str, Any], kind: str) -> dict[str, bool]:
    attention, mlp = (attributes.flag(file, raw, name) for name in ("attention_bias", "mlp_bias"))
    for name, value, kinds in (("attention_bias", attention, _BIASED), ("mlp_bias", mlp, _MLP_BIASED)):
        if value and kind not in kinds:
            raise ValueError(f"{file}: {name} is true, expected false: transformers ignores it in a {kind} model")
    return {"qkv_bias": attention or kind == "qwen2", "out_bias": attention, "mlp_bias": mlp}


def _rotated(file: Path, raw: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    interval = attributes.integer(file, raw, "no_rope_layer_interval")
    given = raw.get("no_rope_layers")
    given = [int((layer + 1) % interval != 0) for layer in range(layers)] if given is None else given
    # The list names the layers that do turn, whatever its name says.
    if not isinstance(given, list) or len(given) != layers or not all(one in (0, 1) for one in given):
        raise ValueError(f"{file}: no_rope_layers is {given!r}, expected {layers} of 0 and 1")
    if not any(given):
        raise ValueError(f"{file}: no_rope_layers is {given!r}, expected a layer whose heads turn")
    return _pattern(given)


def _windows(
    file: Path, raw: Mapping[str, Any], kind: str, *, layers: int, rotated: tuple[bool, ...]
) -> dict[str, Any]:
    window = None if raw["sliding_window"] is None else attributes.integer(file, raw, "sliding_window")
    uses = attributes.flag(file, raw, "use_sliding_window")
    if kind in _UNWINDOWED and window is not None:
        raise ValueError(
            f"{file}: sliding_window is {window}, expected null: transformers ignores it in a {kind} model"
        )
    if uses and kind not in _SWITCHED:
        raise ValueError(
            f"{file}: use_sliding_window is true, expected false: transformers ignores it in a {kind} model"
        )
    window = None if kind in _SWITCHED and not uses else window
    types = [_SLIDING if window is not None and own else _FULL for own in _usual(file, raw, kind, layers, rotated)]
    given = raw.get("layer_types") or types
    # Only some types read the list, and with windows; in any other model it must say what that does.
    if given != types and not (kind in _TYPED and window is not None):
        expected = f"{types[0]} {layers} times" if len(set(types)) == 1 else repr(types)
        raise ValueError(f"{file}: layer_types is {given!r}, expected {expected}")
    if not isinstance(given, list) or len(given) != layers or not set(given) <= {_FULL, _SLIDING}:
        raise ValueError(f"{file}: layer_types is {given!r}, expected {layers} of {_FULL} and {_SLIDING}")
    windowed = [one == _SLIDING for one in given]
    return {"window": window if any(windowed) else None, "windowed": _pattern(windowed)}


def _usual(file: Path, raw: Mapping[str, Any], kind: str, layers: int, rotated: tuple[bool, ...]) -> list[bool]:
    """Which layers have the window, if there is one and no list says so."""
    if kind in GEMMAS:
        every = 2 if kind == "gemma2" else attributes.integer(file, raw, "sliding_window_pattern")
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if kind == "smollm3":
        return [not turns for turns in rotated or (True,) * layers]
    first = attributes.integer(file, raw, "max_window_layers", least=0) if kind in _SWITCHED else 0
    return [layer >= first for layer in range(layers)]


def _gemma(file: Path, raw: Mapping[str, Any], kind: str, *, width: int) -> dict[str, Any]:
    caps = {
        name: None if raw.get(name) is None else attributes.number(file, raw, name)
        for name in ("attn_logit_softcapping", "final_logit_softcapping")
    }
    if kind == "gemma3_text" and caps["attn_logit_softcapping"] is not None:
        raise ValueError(
            f"{file}: attn_logit_softcapping is {caps['attn_logit_softcapping']}, expected null: transformers ignores "
            f"it in a {kind} model"
        )
    return {
        "query_scalar": attributes.number(file, raw, "query_pre_attn_scalar"),
        "attn_softcap": caps["attn_logit_softcapping"],
        "logit_softcap": caps["final_logit_softcapping"],
        "embed_scale": width**0.5,
    }


def _pattern(layers: list[Any]) -> tuple[bool, ...]:
    """Which layers have something; none named where all are alike."""
    return tuple(map(bool, layers)) if any(layers) and not all(layers) else ()
