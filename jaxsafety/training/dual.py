"""A Lagrange multiplier that is learned beside the parameters, as its logarithm: what constrained methods share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety.entry.annotations import checked

Scalar = float | Float[Array, ""]


@checked
def shares(log_multiplier: Scalar) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns ``1 / (1 + lambda)`` and ``lambda / (1 + lambda)``: the objective's weight and the constraint's."""
    return jax.nn.sigmoid(-log_multiplier), jax.nn.sigmoid(log_multiplier)


@checked
def dual_ascent(log_multiplier: Scalar, cost: Scalar, *, threshold: Scalar, rate: Scalar) -> Float[Array, ""]:
    """Returns ``log lambda + rate * (cost - threshold)``, of the mean ``cost``: it rises while that is too high."""
    return jnp.asarray(log_multiplier + rate * (cost - threshold))
