"""The metadata of a GGUF file to :class:`~jaxsafety.models.llama.LlamaConfig`.

Mistral is stored as architecture llama, as its graph is the same. A hyperparameter that the model here does not follow
is refused by name.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsafety.config.names import nearest
from jaxsafety.formats import hf_attributes as attributes
from jaxsafety.formats.gguf_file import GGUF
from jaxsafety.formats.hf_rope import read_rope, scaled_tokens
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.models.rope import Rope, frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# The divisors of frequencies that stand for the scaling of Llama 3.1, as a tensor.
FACTORS = "rope_freqs.weight"
_SIZES = {
    "layers": "block_count",
    "max_tokens": "context_length",
    "width": "embedding_length",
    "mlp_width": "feed_forward_length",
    "heads": "attention.head_count",
}
_EPSILON, _BASE = "attention.layer_norm_rms_epsilon", "rope.freq_base"
_SCALING = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_KNOWN = {
    *_SIZES.values(),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count"),
    *(_EPSILON, _BASE, *(f"rope.scaling.{name}" for name in _SCALING)),
    # without effect: the embeddings tell the vocabulary, and what was tuned is no other model
    *("vocab_size", "tensor_data_layout", "rope.scaling.finetuned"),
}
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scale_linear": 1.0}
# Llama 3.1's, whose divisors no number of a file tells: every model that has them was trained so.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SAME = 1e-4  # relative: divisors are stored as float32, of angles that others computed in it


def read_config(own: GGUF) -> LlamaConfig:
    """Returns the model that a GGUF file of one of the ``ARCHITECTURES`` describes.

    Raises:
        ValueError: another architecture, or a hyperparameter that is missing, not valid, or not followed here.
    """
    kind = _architecture(own)
    raw = _own(own, kind)
    raw.setdefault("attention.head_count_kv", raw.get("attention.head_count"))
    sizes = {ours: attributes.integer(own.file, raw, theirs) for ours, theirs in _SIZES.items()}
    head_width = _head_width(own, raw, sizes)
    rope = _rope(own, raw, sizes["max_tokens"], head_width)
    if "token_embd.weight" not in own.tensors:
        raise ValueError(f"{own.file} holds no token_embd.weight: expected the weights of a {kind} model")
    kv_heads = attributes.integer(own.file, raw, "attention.head_count_kv")
    if sizes["heads"] % kv_heads:
        raise ValueError(f"{own.file}: attention.head_count_kv is {kv_heads}, expected a divisor of {sizes['heads']}")
    return LlamaConfig(
        **sizes | {"max_tokens": scaled_tokens(rope, sizes["max_tokens"], kind=kind)},
        vocab_size=own.shape("token_embd.weight")[0],
        kv_heads=kv_heads,
        head_width=head_width,
        norm_eps=attributes.number(own.file, raw, _EPSILON),
        rope=rope,
        tied="output.weight" not in own.tensors,
        query_norm="head" if kind == "qwen3" else "none",
        **{name: f"blk.0.{part}.bias" in own.tensors
           for name, part in (("qkv_bias", "attn_q"), ("out_bias", "attn_output"), ("mlp_bias", "ffn_up"))},
    )  # fmt: skip


def _architecture(own: GGUF) -> str:
    kind = own.values.get("general.architecture")
    if kind not in ARCHITECTURES:
        hint = nearest(kind, ARCHITECTURES)
        raise ValueError(
            f"{own.file}: general.architecture is {kind!r}, expected one of {', '.join(ARCHITECTURES)}{hint}"
        )
    return kind


def _own(own: GGUF, kind: str) -> dict[str, Any]:
    """The hyperparameters by their names without the architecture's; numbers as they were before they were float32."""
    start = f"{kind}."
    raw = {name.removeprefix(start): value for name, value in own.values.items() if name.startswith(start)}
    for name, value in raw.items():
        if name in _NEUTRAL and value != _NEUTRAL[name]:
            raise ValueError(f"{own.file}: {start}{name} is {value!r}, expected {_NEUTRAL[name]!r}")
        if name not in _KNOWN and name not in _NEUTRAL:
            raise ValueError(
                f"{own.file}: unknown {start}{name} ({value!r}), which may change the model{nearest(name, _KNOWN)}"
            )
    return {name: float(str(np.float32(one))) if isinstance(one, float) else one for name, one in raw.items()}


def _head_width(own: GGUF, raw: dict[str, Any], sizes: dict[str, int]) -> int:
    width, rest = divmod(sizes["width"], sizes["heads"])
    if "attention.key_length" not in raw and rest:
        raise ValueError(
            f"{own.file}: embedding_length is {sizes['width']}, expected a multiple of head_count {sizes['heads']}"
        )
    keys = attributes.integer(own.file, {"attention.key_length": width} | raw, "attention.key_length")
    for name in ("attention.value_length", "rope.dimension_count"):
        if raw.get(name, keys) != keys:
            raise ValueError(f"{own.file}: {name} is {raw[name]!r}, expected the width {keys} of a head")
    if keys % 2:
        raise ValueError(f"{own.file}: a head is {keys} wide, expected an even number: its halves are rotated")
    return keys


def _rope(own: GGUF, raw: dict[str, Any], context: int, head_width: int) -> Rope:
    scaling = {
        theirs: raw[f"rope.scaling.{name}"] for name, theirs in _SCALING.items() if f"rope.scaling.{name}" in raw
    }
    base = attributes.number(own.file, raw, _BASE, default=Rope.base)
    if scaling.get("rope_type", "none") == "none":
        scaling = {} if FACTORS not in own.tensors else _llama3(own, base, head_width, scaling)
    return read_rope(own.file, {"rope_theta": base, "rope_scaling": scaling or None}, max_tokens=context)


def _llama3(own: GGUF, base: float, head_width: int, scaling: dict[str, Any]) -> dict[str, Any]:
    """The scaling whose divisors a file holds."""
    divisors = own.tensor(FACTORS)
    if np.all(divisors == 1):
        return {}
    found = _LLAMA3 | {"factor": float(divisors.max())} | {name: scaling[name] for name in scaling if name in _LLAMA3}
    rope = read_rope(own.file, {"rope_theta": base, "rope_scaling": {"rope_type": "llama3"} | found}, max_tokens=1)
    # Neither looks at the lengths of sequences.
    plain, slowed = (
        np.asarray(frequencies(one, width=head_width, lengths=jnp.ones(1, int)))[0] for one in (Rope(base), rope)
    )
    if divisors.shape != plain.shape or not np.allclose(plain / slowed, divisors, rtol=_SAME, atol=0):
        raise ValueError(
            f"{own.file}: {FACTORS} scales positions otherwise than Llama 3.1 does, by {divisors.min():g} to "
            f"{divisors.max():g}: expected its scaling, whatever the factor"
        )
    return {"rope_type": "llama3"} | found
