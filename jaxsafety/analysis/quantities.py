"""What an analysis returns: named arrays whose axes have names."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


class Quantity(NamedTuple):
    """One measured quantity.

    Attributes:
        analysis: which analysis it belongs to.
        metric: its name.
        axes: names of its axes in order, separated by spaces; a study names the places along each.
    """

    analysis: str
    metric: str
    axes: str = ""


Quantities = dict[Quantity, Any]


# All prompts of a condition, or those that this model complied with.
SUBSETS = ("all", "successful")


# MLP activations: at the last prompt token; averaged over the first response positions; the same, first d neurons only.
VECTORS = ("last", "response", "response_d")


MATRICES = ("up", "down")


class Coordinate(NamedTuple):
    """The places along an axis: the result column that names them, and their names."""

    column: str
    names: tuple[Any, ...]


def averaged(values: Array, weights: Array) -> Array:
    """Mean of ``values[..., b]`` over the samples that ``weights[..., b]`` keeps; NaN where it keeps none."""
    kept = jnp.sum(weights, axis=-1)
    total = jnp.sum(jnp.where(weights, values, 0.0), axis=-1)
    return jnp.where(kept > 0, total / jnp.maximum(kept, 1), jnp.nan)
