"""Attention by an accelerator's own kernel, which stores no scores: the oracle is ``layers.causal_attention``."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Attention = Literal["plain", "fused"]


def fused_attention(
    queries: Float[Array, "b t n k"], *, keys: Float[Array, "b u n k"], values: Float[Array, "b u n k"]
) -> Float[Array, "b t n k"]:
    """Returns ``softmax(q k^T / sqrt(k)) v`` over the positions up to and including one's own, in the type of q.

    The queries are those of the last t of u positions. The factors of both products are rounded to bfloat16. On a GPU
    it is cuDNN's flash attention, which wants ``k`` a multiple of 8; elsewhere what jax makes of it, with scores.

    References: Dao (2023), FlashAttention-2, arXiv:2307.08691.
    """
    on_gpu = jax.default_backend() == "gpu"
    q, k, v = (_rounded(x, narrow=on_gpu) for x in (queries, keys, values))
    tokens, places = q.shape[1], k.shape[1]
    # As many queries as keys need no mask, whose half is then not computed at all.
    mask = None if tokens == places else jnp.tril(jnp.ones((1, 1, tokens, places), bool), places - tokens)
    implementation = "cudnn" if on_gpu else "xla"
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, implementation=implementation)
    return mixed.astype(queries.dtype)


def _rounded(x: Array, *, narrow: bool) -> Array:
    # A CPU has no kernel for some products of bfloat16 arrays: the same numbers as float32.
    half = x.astype(jnp.bfloat16)
    return half if narrow else half.astype(jnp.float32)
