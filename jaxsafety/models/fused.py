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
    it is cuDNN's flash attention, whose ``k`` is a multiple of 8 up to 128; elsewhere what jax makes of it, scores
    included.

    References: Dao (2023), FlashAttention-2, arXiv:2307.08691.
    """
    on_gpu = jax.default_backend() == "gpu"
    tokens, places = queries.shape[1], keys.shape[1]
    # jax lets cuDNN have even lengths alone; nobody sees a key behind the last one. And the kernel's causal mask begins
    # with the first key: queries of the last positions alone get others before them.
    odd = places % 2
    sides = ((queries, (places - tokens, odd)), (keys, (0, odd)), (values, (0, odd)))
    q, k, v = (jnp.pad(_rounded(x, narrow=on_gpu), ((0, 0), added, (0, 0), (0, 0))) for x, added in sides)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if on_gpu else "xla")
    return mixed[:, places - tokens : places].astype(queries.dtype)


def _rounded(x: Array, *, narrow: bool) -> Array:
    # A CPU has no kernel for some products of bfloat16 arrays: the same numbers as float32.
    half = x.astype(jnp.bfloat16)
    return half if narrow else half.astype(jnp.float32)
