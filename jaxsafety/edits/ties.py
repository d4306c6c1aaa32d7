"""TIES: the updates of two models merged where they agree in sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.edits.trim import trimmed
from jaxsafety.entry.annotations import checked
from jaxsafety.types import Edit, Key, Params, Point


@checked
def merged(deltas: Sequence[Params], *, keep: float | Float[Array, ""]) -> Params:
    """Updates from one base merged: each is trimmed, and the mean is of those that have an entry's elected sign.

    An entry's sign is that of the sum over updates, so that of the larger total magnitude. Entries that were trimmed
    have no sign and no part in the mean; where both signs are as large the result is 0. One update is what is kept of
    it. The type is that of a sum of the updates.

    Args:
        deltas: the updates, at least one.
        keep: share in (0, 1] of the entries of each, see :func:`jaxsafety.edits.trim.trimmed`.

    Raises:
        ValueError: no updates, keep out of range, trees that differ in structure or shape, or values that are not
            finite.

    References:
        Yadav et al. 2023 (arXiv 2306.01708), section 4.

    Fidelity: trimming is of every layer of a parameter by itself, where the paper takes the update as one vector.
    """
    if not deltas:
        raise ValueError("deltas: got none, expected at least one update")
    for place, delta in enumerate(deltas[1:], 1):
        tree.check_match(delta, deltas[0], names=(f"deltas[{place}]", "deltas[0]"))
    return jax.tree.map(_elected, *(trimmed(delta, keep=keep) for delta in deltas))


def _elected(*leaves: Array) -> Array:
    dtype = jnp.result_type(*leaves)
    values = [leaf.astype(jnp.promote_types(dtype, jnp.float32)) for leaf in leaves]
    total = sum(values)
    agree = [jnp.sign(value) == jnp.sign(total) for value in values]
    mean = sum(jnp.where(own, value, 0) for own, value in zip(agree, values, strict=True)) / jnp.maximum(sum(agree), 1)
    # Of a NaN nothing agrees, and a zero would hide it.
    return jnp.where(jnp.isnan(total), total, mean).astype(dtype)


@dataclass(frozen=True)
class Config:
    """How much of either update is kept, and how far the merged one goes.

    Attributes:
        keep: shares of their entries, the largest of every layer of every parameter.
        scale: multiples of the merged update.
    """

    keep: tuple[float, ...] = swept(0.2, above=0, at_most=1)
    scale: tuple[float, ...] = swept(1.0)
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    base = trees["base"]
    deltas = [tree.difference(trees[role], base) for role in ("target", "other")]
    return tree.interpolate(base, merged(deltas, keep=point["keep"]), point["scale"])


EDIT = Edit(Config, edit, roles=("base", "target", "other"), leafwise=True, whole=True, merges=True)
