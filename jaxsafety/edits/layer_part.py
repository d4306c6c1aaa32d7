"""One layer's part of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between
from jaxsafety.types import Edit, Key, Params, Point


@checked
def layer_part(delta: Params, *, layer: int | Int[Array, ""]) -> Params:
    """Returns the part of an update in one layer, a 0-based index that may be traced; zeros everywhere else.

    Raises:
        ValueError: layer out of range, or a tree without blocks.
    """
    blocks = tree.select(delta, "blocks/.*")
    last = min(len(leaf) for leaf in blocks.values()) - 1
    check_between("layer", layer, 0, last)

    def only_layer(path: str, leaf: Array) -> Array:
        if path not in blocks:
            return jnp.zeros_like(leaf)
        chosen = (jnp.arange(len(leaf)) == layer).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(chosen, leaf, jnp.zeros_like(leaf))

    return tree.label(delta, only_layer)


@dataclass(frozen=True)
class Config:
    """Which layers, each by itself.

    Attributes:
        layer: 0-based indices; none is every layer of the model.
    """

    layer: tuple[int, ...] = swept(at_least=0)
    __post_init__ = check


def points(config: Config, base: Params) -> Sequence[Point]:
    """Returns the layers asked for. Raises ValueError: one that the model does not have."""
    depth = next(iter(tree.select(base, "blocks/.*").values())).shape[0]
    for layer in config.layer[-1:]:
        check_between("layer", layer, 0, depth - 1)
    return [{"layer": layer} for layer in config.layer or range(depth)]


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    delta = tree.difference(trees["target"], trees["base"])
    return tree.interpolate(trees["base"], layer_part(delta, layer=point["layer"]), 1.0)


EDIT = Edit(Config, edit, points=points)
