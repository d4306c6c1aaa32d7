"""Means over a part of the samples, that keep their shape under jit and vmap."""

import jax.numpy as jnp
from jaxtyping import Array


def averaged(values: Array, weights: Array) -> Array:
    """Mean of ``values[..., b]`` over the samples that ``weights[..., b]`` keeps; NaN where it keeps none."""
    kept = jnp.sum(weights, axis=-1)
    total = jnp.sum(jnp.where(weights, values, 0.0), axis=-1)
    return jnp.where(kept > 0, total / jnp.maximum(kept, 1), jnp.nan)
