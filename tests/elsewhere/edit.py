"""An edit that the package does not know, as somebody would write it: the update by its signs alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.types import Edit


@dataclass(frozen=True)
class Config:
    """How far.

    Attributes:
        amount: multiples of every leaf's mean absolute update.
    """

    amount: tuple[float, ...] = swept(0.5, 1.0, at_least=0)
    __post_init__ = check


def edit(trees, config, *, point, key):
    delta = tree.difference(trees["target"], trees["base"])
    signs = jax.tree.map(lambda leaf: jnp.sign(leaf) * jnp.mean(jnp.abs(leaf)), delta)
    return tree.interpolate(trees["base"], signs, point["amount"])


EDIT = Edit(Config, edit)
