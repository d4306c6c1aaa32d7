"""Projected gradient descent on vectors that stay in l2 balls about zero: soft tokens, perturbed embeddings."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.linalg.masked import norm

Scalar = float | Float[Array, ""]
# Vectors [b, n, d] to what is minimised, a sum over rows, and what is told of every row [b].
Objective = Callable[[Float[Array, "b n d"]], tuple[Float[Array, ""], Float[Array, " b"]]]


@checked
def unit(vectors: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Scales each vector to norm 1; a zero vector stays zero, and has no gradient."""
    # A saturated model's gradients are so small that their squares underflow: scale by the largest entry first. The
    # norm is then at least 1, or the vector is zero.
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    scaled = vectors / jnp.where(largest > 0, largest, 1.0)
    return scaled / jnp.maximum(norm(scaled, axis=-1)[..., None], 1.0)


@checked
def projected(vectors: Float[Array, "*b d"], *, radius: Scalar) -> Float[Array, "*b d"]:
    """Returns the nearest vectors whose norm is at most ``radius``, >= 0."""
    length = norm(vectors, axis=-1)[..., None]
    outside = length > radius
    return vectors * jnp.where(outside, radius / jnp.where(outside, length, 1.0), 1.0)


def descended(
    objective: Objective, start: Float[Array, "b n d"], *, active: Bool[Array, "#b n 1"], radius: Scalar, steps: int,
    taken: int | Int[Array, ""],
) -> tuple[Float[Array, "b n d"], Float[Array, "{steps} b"]]:  # fmt: skip
    """Makes ``taken`` of ``steps`` steps of projected gradient descent; its parts are :func:`unit`, :func:`projected`.

    Every vector's gradient is scaled to norm 1, a step is ``2 * radius / steps`` long, so that all of them lead across
    the ball, and each vector is projected onto the ball of ``radius``. Rows must not influence each other's part of the
    objective. Vectors that are not ``active`` stay as they are.

    Returns:
        The vectors, and what the objective told before every step, NaN for steps that are not made.
    """

    def step(vectors: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Float[Array, " b"]]:
        (_, told), gradient = jax.value_and_grad(objective, has_aux=True)(vectors)
        moved = projected(vectors - 2 * radius / steps * unit(gradient), radius=radius)
        return jnp.where(active, moved, vectors), told

    def left(vectors: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Float[Array, " b"]]:
        return vectors, jnp.full(len(vectors), jnp.nan, jnp.float32)

    def taken_step(vectors: Float[Array, "b n d"], index: Int[Array, ""]) -> tuple[Array, Array]:
        return jax.lax.cond(index < taken, step, left, vectors)

    return jax.lax.scan(taken_step, start, jnp.arange(steps))
