"""The shapes and choices of a Llama-family decoder, checked before any device work."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxsafety.config.names import check_name
from jaxsafety.models.layers import ComputeDtype
from jaxsafety.models.rope import Rope

_SIZES = ("vocab_size", "max_tokens", "layers", "heads", "kv_heads", "width", "mlp_width", "head_width", "unroll")
_FLAGS = ("tied", "qkv_bias", "out_bias", "mlp_bias", "norm_offset", "recompute")
_SCALES = ("norm_eps", "embed_scale", "query_scalar", "attn_softcap", "logit_softcap")

# Whether residual branches are normed before, as in Llama, after, or both.
Norms = Literal["before", "after", "both"]
# Queries and keys are normed head by head, all heads as one, or not.
QueryNorm = Literal["none", "head", "whole"]
Activation = Literal["silu", "gelu"]


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and choices that are static under ``jit``.

    Attributes:
        vocab_size: ``v``.
        max_tokens: the longest input ``t``, padding included.
        layers: ``l``.
        heads: ``n``, query heads.
        kv_heads: ``g``, key and value heads, a divisor of ``heads``.
        width: ``d``.
        mlp_width: ``f``.
        head_width: ``k``, even; ``n k`` need not be ``d``.
        norm_eps: added to the mean square by every RMSNorm.
        rope: rotary positions.
        tied: the unembedding is the embedding transposed, and ``unembed`` is absent.
        qkv_bias: queries, keys and values have biases (Qwen2).
        out_bias: attention's output has one (with ``qkv_bias``: Llama's ``attention_bias``).
        mlp_bias: gate, up and down have biases.
        window: a query sees itself and the ``window - 1`` tokens before it (Mistral); None is all of them.
        windowed: layer by layer whether it has the window (Gemma); () is all.
        rotated: layer by layer whether positions rotate its queries and keys (SmolLM3); () is all.
        local_rope: rotary positions of the layers with a window where they are not ``rope`` (Gemma 3).
        norms: residual branches are normed ``"before"``, ``"after"`` (OLMo 2) or on ``"both"`` sides (Gemma).
        norm_offset: every norm's scale counts from 1 (Gemma).
        query_norm: queries and keys are normed before they rotate, each ``"head"`` by itself (Qwen3, Gemma 3) or the
            ``"whole"`` projection (OLMo 2).
        query_scalar: scores are ``q k`` over its root; None is ``head_width`` (Gemma).
        attn_softcap: scores ``s`` are ``cap tanh(s / cap)``, None without (Gemma 2).
        logit_softcap: so are logits (Gemma 2).
        activation: of the gate: SiLU, or GELU by tanh (Gemma).
        embed_scale: what embeddings are multiplied with before the first layer (Gemma).
        unroll: layers per iteration of the scan; as many are widened to float32 at a time.
        recompute: a gradient keeps the residual stream between layers alone and runs each layer again on its way back.
        compute_dtype: what the factors of products with weights and of attention are rounded to, forward and backward;
            their sums and everything else are float32 whatever it is. ``"bfloat16"`` has no forward-mode derivatives.
        stored_dtype: what activations of a whole sequence are rounded to between operations, and what is kept of them
            for the backward pass; norms' statistics, softmax, sums, logits and gradients are float32 whatever it is.
            ``"bfloat16"`` asks for products in bfloat16 too.

    Raises:
        ValueError: a size below 1, an unknown name, heads that the key heads do not divide, an odd head width, a list
            of layers that are not ``layers`` or all alike, local positions without a window, or activations in bfloat16
            whose products are not.
    """

    vocab_size: int
    max_tokens: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    mlp_width: int
    head_width: int
    norm_eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    rotated: tuple[bool, ...] = ()
    local_rope: Rope | None = None
    norms: Norms = "before"
    norm_offset: bool = False
    query_norm: QueryNorm = "none"
    query_scalar: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    activation: Activation = "silu"
    embed_scale: float = 1.0
    unroll: int = 1
    recompute: bool = False
    compute_dtype: ComputeDtype = "float32"
    stored_dtype: ComputeDtype = "float32"

    def __post_init__(self) -> None:
        for name in _SIZES if self.window is None else (*_SIZES, "window"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: got {size!r}, expected an integer of at least 1")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        names = {"norms": Norms, "query_norm": QueryNorm, "activation": Activation}
        for name, known in (names | {"compute_dtype": ComputeDtype, "stored_dtype": ComputeDtype}).items():
            check_name(name, getattr(self, name), get_args(known))
        if self.stored_dtype == "bfloat16" != self.compute_dtype:
            raise ValueError("stored_dtype: got 'bfloat16', expected compute_dtype 'bfloat16' as well")
        for name in _SCALES:
            value, is_left_out = getattr(self, name), getattr(type(self), name, 0) is None
            if not (is_left_out and value is None) and not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value!r}, expected a number greater than 0")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: got {self.kv_heads}, expected a divisor of heads {self.heads}")
        if self.head_width % 2:
            raise ValueError(f"head_width: got {self.head_width}, expected an even number for rotary positions")
        if self.rope.scaling == "dynamic" and self.head_width < 4:
            raise ValueError(f"head_width: got {self.head_width}, expected at least 4 for dynamic rope scaling")
        self._check_layers()

    def _check_layers(self) -> None:
        for name in ("windowed", "rotated"):
            given = getattr(self, name)
            if given and (len(given) != self.layers or set(given) != {True, False}):
                raise ValueError(
                    f"{name}: got {given!r}, expected {self.layers} of True and False, or () for all alike"
                )
        for name in ("windowed", "local_rope"):
            if getattr(self, name) and self.window is None:
                raise ValueError(f"{name}: got {getattr(self, name)!r} without a window, expected one")

    @property
    def norm_widths(self) -> dict[str, int]:
        """The norms of a layer by name, each with its number of scales."""
        found = {"norm_attn": self.width, "norm_mlp": self.width} if self.norms != "after" else {}
        if self.norms != "before":
            found |= {"norm_attn_out": self.width, "norm_mlp_out": self.width}
        heads = {"none": (), "head": (1, 1), "whole": (self.heads, self.kv_heads)}[self.query_norm]
        return found | {f"norm_{name}": n * self.head_width for name, n in zip("qk", heads, strict=False)}

    @property
    def is_uniform(self) -> bool:
        """Whether attention is the same in all layers."""
        return not (self.windowed or self.rotated)
