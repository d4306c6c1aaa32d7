"""Building blocks of a decoder: linear maps, norms, GELU, attention, sinusoidal and rotary positions.

Activations around a linear are rows ``[b*t, d]``: with three axes XLA fuses the residual stream into transposing
copies, which costs a small model a fifth of its gradient step on CPU. Products of activations with weights and of
attention multiply in a compute dtype and accumulate in float32; everything else is computed in float32. Activations
leave in the type that they came in: of bfloat16 ones only these are kept for the backward pass, which computes what it
needs from them again, and only between operations are they rounded.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.entry.programs import einsum

ComputeDtype = Literal["float32", "bfloat16"]

LAYER_NORM_EPS = 1e-5
"""PyTorch's default, which the paper's model keeps."""


def product(
    spec: str, left: Float[Array, "..."], right: Float[Array, "..."], *, dtype: ComputeDtype
) -> Float[Array, "..."]:
    """Returns the einsum of two arrays, multiplied in ``dtype``, accumulated and returned in float32.

    Each letter of ``spec``, such as ``"ri,io->ro"``, stands in two of its three terms or in all. ``dtype`` is what the
    factors are rounded to, in the forward pass and in the backward pass.
    """
    return einsum(spec)(left, right) if dtype == "float32" else bfloat16_product(spec, left, right)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def bfloat16_product(spec: str, left: Float[Array, "..."], right: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the einsum of two arrays rounded to bfloat16, accumulated and returned in float32.

    The backward pass does the same: its two products round the cotangent as well, and the gradients are what float32
    has accumulated, in the type of the factor that they are by. jax's own rule for bfloat16 operands multiplies them
    with a float32 cotangent, off an accelerator's matrix units, and rounds the gradients of float32 weights to
    bfloat16. Forward-mode derivatives are refused.

    References:
        Micikevicius et al. (2018), Mixed Precision Training, section 3.3, arXiv:1710.03740; Kalamkar et al. (2019), A
        Study of BFLOAT16 for Deep Learning Training, arXiv:1905.12322.
    """
    return _bfloat16_forward(spec, left, right)[0]


def _bfloat16_forward(spec, left, right):
    factors = (_round_to_bfloat16(left), _round_to_bfloat16(right))
    return _multiply_rounded(spec, *factors), factors


def _bfloat16_backward(spec, factors, cotangent):
    operands, result = spec.split("->")
    first, second = operands.split(",")
    left, right = factors
    cotangent = _round_to_bfloat16(cotangent)
    return (
        _multiply_rounded(f"{result},{second}->{first}", cotangent, right).astype(left.dtype),
        _multiply_rounded(f"{result},{first}->{second}", cotangent, left).astype(right.dtype),
    )


bfloat16_product.defvjp(_bfloat16_forward, _bfloat16_backward)


def _round_to_bfloat16(x):
    # The array stays float32: XLA's CPU backend has no kernel for some products of bfloat16 arrays (attention's
    # backward pass fails with jax 0.10.2), and may drop a conversion there and back, which it never does with this.
    # One that is stored in bfloat16 is kept as it is.
    return x if x.dtype == jnp.bfloat16 else jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _multiply_rounded(spec, left, right):
    # Accelerators multiply in bfloat16, a CPU in float32: the same numbers, for a product of two bfloat16 values is
    # exact in float32.
    return einsum(spec, jax.lax.DotAlgorithmPreset.BF16_BF16_F32)(_wide(left), _wide(right))


def _lean(function):
    """Of bfloat16 activations these alone are kept for the backward pass, not what float32 makes of them."""

    @functools.wraps(function)
    def call(*arrays, **named):
        fixed = {name: value for name, value in named.items() if isinstance(value, str | float)}
        named = {name: value for name, value in named.items() if name not in fixed}
        own, first = partial(function, **fixed), next(iter((*arrays, *named.values())))
        return (jax.checkpoint(own) if first.dtype == jnp.bfloat16 else own)(*arrays, **named)

    return call


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def project(
    x: Float[Array, "rows i"], kernel: Float[Array, "i o"], *, dtype: ComputeDtype = "float32"
) -> Float[Array, "rows o"]:
    """Returns ``x @ kernel``, its factors rounded to ``dtype``, accumulated and returned in float32."""
    return product("ri,io->ro", x, kernel, dtype=dtype)


def linear(
    x: Float[Array, "rows i"], kernel: Float[Array, "i o"], *, bias: Float[Array, " o"], dtype: ComputeDtype = "float32"
) -> Float[Array, "rows o"]:
    """Returns ``x @ kernel + bias`` in the type of ``x``, the product's factors rounded to ``dtype``."""
    if kernel.shape[0] > kernel.shape[1]:
        # The gradient by a tall kernel is then computed wide, which is faster on a CPU (benchmarks/README.md: a whole
        # step of tuning by 1.04 to 1.07, the same bits); the barrier keeps the compiler from turning it back.
        y = product("ri,oi->ro", x, jax.lax.optimization_barrier(kernel.T), dtype=dtype)
    else:
        y = project(x, kernel, dtype=dtype)
    return (y + bias[None, :]).astype(x.dtype)


@_lean
def layer_norm(
    x: Float[Array, "rows d"], *, scale: Float[Array, " d"], bias: Float[Array, " d"]
) -> Float[Array, "rows d"]:
    """Returns ``(x - mean) / sqrt(variance + 1e-5) * scale + bias`` with the biased variance, row by row.

    References: Ba, Kiros and Hinton (2016), Layer Normalization, arXiv:1607.06450.
    """
    wide = _wide(x)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPS) * scale[None, :] + bias[None, :]
    return normed.astype(x.dtype)


@_lean
def rms_norm(x: Float[Array, "rows d"], *, scale: Float[Array, " d"], eps: float) -> Float[Array, "rows d"]:
    """Returns ``x / sqrt(mean(x^2) + eps) * scale``, row by row, eps > 0, in the type of ``x``.

    References: Zhang and Sennrich (2019), Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    wide = _wide(x)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * scale[None, :]
    return normed.astype(x.dtype)


# Recomputed in the backward pass: reading the stored intermediates back costs more than the tanh (1.04-1.3x of a
# whole gradient step on CPU, most when the layers are a loop).
@jax.checkpoint
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns ``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``, element by element.

    References: Hendrycks and Gimpel (2016), Gaussian Error Linear Units, arXiv:1606.08415.
    """
    return jax.nn.gelu(_wide(x), approximate=True).astype(x.dtype)


@_lean
def gelu_gated(gate: Float[Array, "rows f"], up: Float[Array, "rows f"]) -> Float[Array, "rows f"]:
    """Returns ``gelu(gate) up`` with the GELU of :func:`gelu`, element by element, in the type of the gate.

    References: Shazeer (2020), GLU Variants Improve Transformer, arXiv:2002.05202 (GEGLU).
    """
    return (gelu(_wide(gate)) * up).astype(gate.dtype)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Returns ``cap tanh(x / cap)``, element by element, in (-cap, cap), or ``x`` without a cap.

    References: Gemma Team (2024), Gemma 2, section 2, arXiv:2408.00118.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


@_lean
def silu_gated(gate: Float[Array, "rows f"], up: Float[Array, "rows f"]) -> Float[Array, "rows f"]:
    """Returns ``gate sigmoid(gate) up``, element by element, in the type of the gate.

    References: Shazeer (2020), GLU Variants Improve Transformer, arXiv:2002.05202 (SwiGLU).
    """
    return (jax.nn.silu(_wide(gate)) * up).astype(gate.dtype)


@_lean
def causal_attention(
    queries: Float[Array, "b t n k"],
    *,
    keys: Float[Array, "b u n k"],
    values: Float[Array, "b u n k"],
    dtype: ComputeDtype = "float32",
) -> Float[Array, "b t n k"]:
    """Returns ``softmax(q k^T / sqrt(k)) v`` over the positions up to and including one's own, in the type of q.

    The queries are those of the last t of u positions.
    The factors of the two products are rounded to ``dtype``; scores, their exponentials and the total are float32.
    """
    tokens, places, width = queries.shape[1], keys.shape[1], queries.shape[3]
    # u: the position attended to
    scores = product("btnk,bunk->bntu", _wide(queries) / math.sqrt(width), keys, dtype=dtype)
    visible = jnp.tril(jnp.ones((tokens, places), bool), places - tokens)
    scores = jnp.where(visible[None, None], scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    unnormalised = jnp.exp(scores - peak)
    # Dividing [b, t, n, k] instead of [b, n, t, t] saves one stored array of that size per layer.
    total = einsum("bntu->btn")(unnormalised)
    mixed = product("bntu,bunk->btnk", unnormalised, values, dtype=dtype) / total[..., None]
    return mixed.astype(queries.dtype)


@_lean
def grouped_attention(
    queries: Float[Array, "b t n k"],
    *,
    keys: Float[Array, "b u g k"],
    values: Float[Array, "b u g k"],
    visible: Bool[Array, "#b t u"],
    dtype: ComputeDtype = "float32",
    scalar: float | None = None,
    cap: float | None = None,
) -> Float[Array, "b t n k"]:
    """Returns ``softmax(q k^T / sqrt(k)) v`` over the visible places, ``n / g`` neighbouring queries to a key head.

    ``scalar`` stands for k in the root if it is given, and scores have a soft ``cap``, see :func:`softcap`.

    No key or value is repeated: the queries are split into groups instead. ``visible`` are the places that a query
    attends to, from :func:`visibility`: at least one each. Types are those of :func:`causal_attention`.

    References: Ainslie et al. (2023), GQA, arXiv:2305.13245.
    """
    batch, tokens, heads, width = queries.shape
    # j: a query head's place within its group
    split = (_wide(queries) / math.sqrt(width if scalar is None else scalar)).reshape(
        batch, tokens, keys.shape[2], -1, width
    )
    scores = product("btgjk,bugk->bgjtu", split, keys, dtype=dtype)
    scores = jnp.where(visible[:, None, None], softcap(scores, cap), -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    unnormalised = jnp.exp(scores - peak)
    total = einsum("bgjtu->btgj")(unnormalised)
    mixed = product("bgjtu,bugk->btgjk", unnormalised, values, dtype=dtype) / total[..., None]
    return mixed.reshape(batch, tokens, heads, width).astype(queries.dtype)


def real_positions(mask: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns the position of every token among its sequence's real ones, from 0; padding before them has 0."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def visibility(
    mask: Bool[Array, "b u"], *, positions: Int[Array, "b u"], queries: Int[Array, " t"], window: int | None = None
) -> Bool[Array, "b t u"]:
    """Returns which places a query attends to: real tokens up to its own, and in every case its own.

    That a padded query sees itself keeps its row finite; nobody else sees it. ``positions`` are those of
    :func:`real_positions`, ``queries`` the queries' places in ``u``. With a ``window`` a query sees itself and the
    ``window - 1`` real tokens before it.
    """
    places = jnp.arange(mask.shape[1])
    visible = (places[None, :] <= queries[:, None])[None] & mask[:, None, :]
    if window is not None:
        own = positions[:, queries]
        visible &= own[:, :, None] - positions[:, None, :] < window
    return visible | (places[None, :] == queries[:, None])[None]


def sinusoidal_table(tokens: int, width: int) -> Float[Array, "{tokens} {width}"]:
    """Returns fixed positions: ``sin(p / 10000^(2i/d))`` in channel ``2i``, its cosine in ``2i + 1``; d even.

    References: Vaswani et al. (2017), Attention Is All You Need, section 3.5, arXiv:1706.03762.
    """
    angles = _angles(tokens, width, base=10_000.0)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(tokens, width)


def rope_table(tokens: int, width: int, *, base: float = 10_000.0) -> Float[Array, "2 {tokens} {width}//2"]:
    """Returns the cosines, then the sines, of the rotary angles ``p / base^(2i/k)`` of even head width k.

    The slowest channel turns once in about ``2 pi base`` positions.
    """
    angles = _angles(tokens, width, base=base)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "b t n k"], table: Float[Array, "2 *#b t half"]) -> Float[Array, "b t n k"]:
    """Returns ``x`` with every channel pair ``(i, i + k/2)`` turned by the angle of its position.

    Inner products of rotated queries and keys depend on the distance of their positions only. The table is that of
    :func:`rope_table`, or one of every sequence ``[2, b, t, k/2]`` (b may be 1).

    References: Su et al. (2021), RoFormer, arXiv:2104.09864; the pairing of halves is GPT-NeoX's and Llama's.
    """
    per_sequence = table if table.ndim == 4 else table[:, None]
    cos, sin = per_sequence[:, :, :, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _angles(tokens: int, width: int, *, base: float) -> Float[Array, "t half"]:
    frequencies = jnp.exp(jnp.arange(0, width, 2, dtype=jnp.float32) * (-math.log(base) / width))
    return jnp.arange(tokens, dtype=jnp.float32)[:, None] * frequencies[None, :]
