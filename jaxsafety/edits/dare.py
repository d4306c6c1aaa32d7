"""DARE: entries of an update dropped at random and the rest made larger: how redundant is it?"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety import keys, tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_share
from jaxsafety.types import Edit, Key, Leaf, Params, Point


@checked
def dropped(delta: Params, *, drop: float | Float[Array, ""], key: Key, layer: int | Int[Array, ""] = 0) -> Params:
    """Drops every entry of an update with probability ``drop`` and divides the rest by ``1 - drop``.

    In expectation it is the update, and with drop 0 it is. A draw depends on the key, the parameter's path and, below
    ``blocks``, the layer alone: of a part of the layers what is dropped is that of all. A larger ``drop`` drops what a
    smaller one does, and more.

    Args:
        delta: the update, whose structure the result has.
        drop: probability in [0, 1); may be traced.
        key: of the draws.
        layer: 0-based index of the first layer of what lies below ``blocks``; may be traced.

    Raises:
        ValueError: drop out of range.

    References:
        Yu et al. 2023 (arXiv 2311.03099).

    Fidelity: faithful.
    """
    check_share("drop", drop, whole="[0, 1)", what="a probability")

    def rule(path: str, leaf: Leaf) -> Array:
        leaf, own = jnp.asarray(leaf), keys.named(key, path)
        if not tree.is_stacked(path):
            return _dropped(own, leaf, drop)
        return jax.vmap(_dropped, in_axes=(0, 0, None))(keys.of_layers(own, len(leaf), first=layer), leaf, drop)

    return tree.label(delta, rule)


def _dropped(key: Key, leaf: Array, drop: float | Float[Array, ""]) -> Array:
    stays = jax.random.uniform(key, leaf.shape, jnp.float32) >= drop
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return jnp.where(stays, wide / (1 - drop), 0).astype(leaf.dtype)


@dataclass(frozen=True)
class Config:
    """How much of the update is dropped.

    Attributes:
        drop: probabilities that an entry is.
    """

    drop: tuple[float, ...] = swept(0.5, 0.9, at_least=0, below=1)
    __post_init__ = check


def edit(
    trees: dict[str, Params], config: Config, *, point: Point, key: Key, layer: int | Int[Array, ""] = 0
) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    delta = tree.difference(trees["target"], trees["base"])
    return tree.interpolate(trees["base"], dropped(delta, drop=point["drop"], key=key, layer=layer), 1.0)


EDIT = Edit(Config, edit, leafwise=True, whole=True, draws=True)
