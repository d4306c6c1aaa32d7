"""Attention by a GPU's own kernel, which stores no scores. Its oracle is that of :mod:`jaxsafety.models.layers`."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety.models.layers import causal_attention

Attention = Literal["plain", "fused"]


def fused_attention(
    queries: Float[Array, "b t n k"], *, keys: Float[Array, "b u n k"], values: Float[Array, "b u n k"]
) -> Float[Array, "b t n k"]:
    """Returns ``softmax(q k^T / sqrt(k)) v`` over the positions up to and including one's own, in the type of q.

    The queries are those of the last t of u positions. On a GPU it is cuDNN's flash attention, whose ``k`` is a
    multiple of 8 up to 128: queries, keys, values, probabilities and the result are rounded to bfloat16, sums are
    float32, and where there are fewer queries than keys all u are computed. Elsewhere it is the plain attention of
    products in bfloat16.

    References: Dao (2023), FlashAttention-2, arXiv:2307.08691.
    """
    if jax.default_backend() != "gpu":
        return causal_attention(queries, keys=keys, values=values, dtype="bfloat16")
    tokens, places = queries.shape[1], keys.shape[1]
    # jax asks even lengths of cuDNN in training (jax 0.10.2 takes the bias that is not there for one); nobody sees a
    # key behind the last one. And the kernel's causal mask begins with the first key: queries of the last positions
    # alone get others before them.
    odd = places % 2
    sides = ((queries, (places - tokens, odd)), (keys, (0, odd)), (values, (0, odd)))
    q, k, v = (jnp.pad(x.astype(jnp.bfloat16), ((0, 0), added, (0, 0), (0, 0))) for x, added in sides)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return mixed[:, places - tokens : places].astype(queries.dtype)
