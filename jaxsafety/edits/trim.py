"""The update with its largest entries alone: how few of them carry what tuning taught?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_share
from jaxsafety.entry.programs import compiled
from jaxsafety.linalg.largest import largest
from jaxsafety.types import Edit, Key, Leaf, Params, Point


@checked
def trimmed(delta: Params, *, keep: float | Float[Array, ""]) -> Params:
    """The largest entries of an update by magnitude, zeros elsewhere: of n entries ``keep * n`` are kept.

    So it is in every layer of every parameter below ``blocks``, and in every other parameter as a whole. The number is
    rounded to the nearest and at least 1; of entries that are as large those that come first are kept. Keep 1 is the
    whole update.

    Args:
        delta: the update, whose structure the result has; a layer has fewer than 2^31 entries.
        keep: share in (0, 1]; may be traced, so that one program serves every share, and is then brought into range.

    Raises:
        ValueError: keep out of range, or an update that is not finite; traced, what is not counts as the largest.

    References:
        Yadav et al. 2023 (arXiv 2306.01708), section 4.

    Fidelity: the paper trims the update as one vector; here every layer of a parameter has its own threshold, so that
    what is kept of it depends on nothing else and a model is trimmed a matrix at a time.
    """
    check_share("keep", keep)
    tree.check_finite(delta, name="delta")
    return _trimmed(delta, jnp.asarray(keep))


@compiled()
def _trimmed(delta: Params, keep: Float[Array, ""]) -> Params:
    def one(path: str, leaf: Leaf) -> Array:
        leaf, rule = jnp.asarray(leaf), partial(_kept, keep=keep)
        kept = (jax.vmap(rule) if tree.is_stacked(path) else rule)(leaf)
        return jnp.where(kept, leaf, jnp.zeros_like(leaf))

    return tree.label(delta, one)


def _kept(values: Array, *, keep: Float[Array, ""]) -> Bool[Array, "..."]:
    size = values.size
    count = jnp.where(keep >= 1, size, jnp.clip(jnp.round(keep * size).astype(jnp.int32), 1, size))
    return largest(values, count=count)


@dataclass(frozen=True)
class Config:
    """How much of the update is kept, and how far.

    Attributes:
        scale: multiples of what is kept.
        keep: shares of the entries, the largest of every layer of every parameter; 1 is all of them.
    """

    scale: tuple[float, ...] = swept(1.0)
    # The last one is the axis of figures.
    keep: tuple[float, ...] = swept(0.05, 0.1, 0.2, 0.5, 1.0, above=0, at_most=1)
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    delta = tree.difference(trees["target"], trees["base"])
    return tree.interpolate(trees["base"], trimmed(delta, keep=point["keep"]), point["scale"])


EDIT = Edit(Config, edit, leafwise=True, whole=True)
