"""Means over a part of the samples, that keep their shape under jit and vmap; norms that have a gradient at zero."""

from __future__ import annotations

from functools import partial

import jax
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
    return _norm(axis, values)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(axis, values):
    return jnp.linalg.norm(values, axis=axis)


@_norm.defjvp
def _norm_jvp(axis, primals, tangents):
    found = _norm(axis, *primals)
    return found, jnp.sum(primals[0] * tangents[0], axis=axis) / jnp.where(found > 0, found, 1.0)
