"""Half-precision weights of stacked layers to float32, inside a loop over the layers, one layer at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety.types import Params


def widened(layer: Params, *, stacked: Params, index: Int[Array, ""]) -> Params:
    """Returns one layer's weights, as the loop slices them, in float32.

    XLA's CPU backend (jaxlib 0.10) has no slices of bfloat16: it widens the whole operand, and moves that out of the
    loop, so that all layers would be held in float32. A barrier ties the stack to the loop's index, which keeps it in
    the loop, and the slice is fused with the widening. So a bfloat16 leaf has its value from ``stacked`` and its
    derivatives from ``layer``, whose own slice is compiled away: a gradient by ``stacked`` would sum whole stacks.
    """

    def widen(leaf, stack):
        if leaf.dtype != jnp.bfloat16:
            return leaf.astype(jnp.float32)
        stack, place = jax.lax.optimization_barrier((jax.lax.stop_gradient(stack), index))
        return _replaced(leaf, jax.lax.dynamic_index_in_dim(stack, place, keepdims=False).astype(jnp.float32))

    return jax.tree.map(widen, layer, stacked)


@jax.custom_jvp
def _replaced(leaf, value):
    """``value``, with the derivatives of ``leaf``."""
    return value


@_replaced.defjvp
def _replaced_jvp(primals, tangents):
    return _replaced(*primals), tangents[0].astype(jnp.float32)
