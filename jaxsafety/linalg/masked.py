"""Means over a part of the samples, that keep their shape under jit and vmap; norms that have a gradient at zero."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxsafety.entry.annotations import checked


@checked
def averaged(values: Shaped[Array, "..."], weights: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Mean of ``values[..., b]`` over the samples that ``weights[..., b]`` keeps; NaN where it keeps none.

    The two have as many axes, of which those but the last may be broadcast. It is at least float32.

    Raises:
        ValueError: weights that are not boolean, or not of as many samples.
    """
    if values.ndim != weights.ndim or values.shape[-1] != weights.shape[-1]:
        raise ValueError(f"weights have shape {weights.shape}, expected those of values of shape {values.shape}")
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    kept = jnp.sum(weights, axis=-1)
    total = jnp.sum(jnp.where(weights, values, 0.0), axis=-1)
    return jnp.where(kept > 0, total / jnp.maximum(kept, 1), jnp.nan)


@checked
def norm(values: Float[Array, "..."], *, axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """Euclidean norm over one axis or several; the gradient of a norm that is zero is zero."""
    squares = jnp.sum(values * values, axis=axis)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), squares)
