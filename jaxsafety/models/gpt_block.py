"""The parts of a GPT on rows ``[b*t, d]``: what enters its layers, one layer, and the logits at the end.

``config`` is a :class:`jaxsafety.models.gpt.GPTConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from jaxsafety.models import layers as nn
from jaxsafety.models.fused import fused_attention
from jaxsafety.models.sites import RowEdit, watched
from jaxsafety.types import Params

# Rows of queries, keys and values to what the queries' rows mix, ``[rows, d]`` each.
Attend = Callable[[Array, Array, Array], Array]


def additive_positions(params: Params, tokens: int, *, config: Any) -> Float[Array, "1 {tokens} d"] | float:
    """Returns what is added to the embeddings of a sequence, 0 where positions are rotations."""
    if config.positions == "sinusoidal":
        return nn.sinusoidal_table(tokens, config.width)[None]
    if config.positions == "learned":
        return params["positions"][None, :tokens]
    return 0.0


def block(
    x: Float[Array, "rows d"], weights: Any, *, config: Any, attend: Attend, edit: RowEdit | None = None, first: int = 0
) -> tuple[Float[Array, "_ d"], dict[str, Array]]:
    """Returns the rows that leave a layer, from row ``first`` on, and what its sites saw.

    The rows before it are attended to and no more.
    """
    see, seen = watched(edit)
    x = see("hook_resid_pre", x)
    normed = nn.layer_norm(x, **weights["norm_attn"])
    attn_out = see("hook_attn_out", _attention(normed, weights["attn"], config=config, attend=attend, first=first))
    mid = see("hook_resid_mid", (normed if config.block == "paper" else x)[first:] + attn_out)
    mlp = weights["mlp"]
    mlp_in = see("mlp.hook_in", mid if config.block == "paper" else nn.layer_norm(mid, **weights["norm_mlp"]))
    pre = see("mlp.hook_pre", nn.linear(mlp_in, mlp["up"], bias=mlp["up_bias"], dtype=config.compute_dtype))
    post = see("mlp.hook_post", nn.gelu(pre))
    mlp_out = nn.linear(post, mlp["down"], bias=mlp["down_bias"], dtype=config.compute_dtype)
    return see("hook_resid_post", mid + see("hook_mlp_out", mlp_out)), seen


def _attention(x, weights, *, config, attend, first):
    def linear(x, name):
        return nn.linear(x, weights[name], bias=weights[f"{name}_bias"], dtype=config.compute_dtype)

    return linear(attend(linear(x[first:], "q"), linear(x, "k"), linear(x, "v")), "o")


def rope_table(tokens: int, *, config: Any) -> Float[Array, "2 {tokens} half"] | None:
    """Returns the rotations of a sequence's positions, None where there are none."""
    return nn.rope_table(tokens, config.width // config.heads) if config.positions == "rope" else None


def heads(
    x: Float[Array, "rows d"], tokens: int, *, config: Any, rope: Float[Array, "2 {tokens} half"] | None = None
) -> Float[Array, "b {tokens} n k"]:
    """Returns rows of queries, keys or values as heads of sequences, turned by the rotations of their positions."""
    x = x.reshape(-1, tokens, config.heads, config.width // config.heads)
    return x if rope is None else nn.rotate(x, rope)


def attended(
    q: Float[Array, "b t n k"], k: Float[Array, "b u n k"], v: Float[Array, "b u n k"], *, config: Any
) -> Array:
    """Returns the rows ``[b*t, d]`` that the last t of u places mix of those up to their own."""
    if config.attention == "fused":
        return fused_attention(q, keys=k, values=v).reshape(-1, config.width)
    return nn.causal_attention(q, keys=k, values=v, dtype=config.compute_dtype).reshape(-1, config.width)


def unembedded(params: Params, x: Float[Array, "rows d"], *, config: Any) -> Float[Array, "rows v"]:
    """Returns the logits of what leaves the last layer."""
    return nn.project(nn.layer_norm(x, **params["norm"]), params["unembed"], dtype=config.compute_dtype)
