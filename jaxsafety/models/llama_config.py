"""The shapes and choices of a Llama-family decoder, checked before any device work."""

import math
from dataclasses import dataclass, field
from typing import get_args

from jaxsafety.config.names import check_name
from jaxsafety.models.layers import ComputeDtype
from jaxsafety.models.rope import Rope

_SIZES = ("vocab_size", "max_tokens", "layers", "heads", "kv_heads", "width", "mlp_width", "head_width", "unroll")
_FLAGS = ("tied", "qkv_bias", "out_bias", "mlp_bias", "recompute")


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
        unroll: layers per iteration of the scan; as many are widened to float32 at a time.
        recompute: a gradient keeps the residual stream between layers alone and runs each layer again on its way back.
        compute_dtype: what the factors of products with weights and of attention are rounded to, forward and backward;
            their sums and everything else are float32 whatever it is. ``"bfloat16"`` has no forward-mode derivatives.
        stored_dtype: what activations of a whole sequence are rounded to between operations, and what is kept of them
            for the backward pass; norms' statistics, softmax, sums, logits and gradients are float32 whatever it is.
            ``"bfloat16"`` asks for products in bfloat16 too.

    Raises:
        ValueError: a size below 1, an unknown name, heads that the key heads do not divide, an odd head width, or
            activations in bfloat16 whose products are not.
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
        check_name("compute_dtype", self.compute_dtype, get_args(ComputeDtype))
        check_name("stored_dtype", self.stored_dtype, get_args(ComputeDtype))
        if self.stored_dtype == "bfloat16" != self.compute_dtype:
            raise ValueError("stored_dtype: got 'bfloat16', expected compute_dtype 'bfloat16' as well")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps: got {self.norm_eps!r}, expected a number greater than 0")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: got {self.kv_heads}, expected a divisor of heads {self.heads}")
        if self.head_width % 2:
            raise ValueError(f"head_width: got {self.head_width}, expected an even number for rotary positions")
        if self.rope.scaling == "dynamic" and self.head_width < 4:
            raise ValueError(f"head_width: got {self.head_width}, expected at least 4 for dynamic rope scaling")
