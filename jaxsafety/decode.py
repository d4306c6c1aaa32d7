"""Greedy decoding within a fixed window (no cache: the synthetic windows are short)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety.types import Forward, Params


def greedy(
    forward: Forward, params: Params, *, tokens: Int[Array, "b t"], start: Int[Array, " b"], count: int
) -> Int[Array, "b t"]:
    """Returns ``tokens`` with the ``count`` places from ``start`` on replaced by the most likely continuation.

    Args:
        forward: the model.
        params: its parameters.
        tokens: ``[b, t]`` prompts; what stands at or after ``start`` is not looked at (attention is causal).
        start: ``[b]`` index of the first token to write, >= 1.
        count: tokens to write; places beyond the window are dropped.
    """

    def write(i: Int[Array, ""], tokens: Int[Array, "b t"]) -> Int[Array, "b t"]:
        rows, place = jnp.arange(tokens.shape[0]), start + i
        best = jnp.argmax(forward(params, tokens)[rows, place - 1], axis=-1)
        return tokens.at[rows, place].set(best.astype(tokens.dtype))

    return jax.lax.fori_loop(0, count, write, tokens)
