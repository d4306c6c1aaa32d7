"""One method's update lent to another method's model."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.types import Edit, Key, Params, Point


@checked
def transferred(tuned: Params, other_delta: Params, *, alpha: float | Float[Array, ""]) -> Params:
    """Returns one method's model plus ``alpha`` times the update of another method that started from the same base.

    Raises:
        ValueError: the trees differ in structure or shape.
    """
    tree.check_match(tuned, other_delta, names=("tuned", "other_delta"))
    return tree.interpolate(tuned, other_delta, alpha)


@dataclass(frozen=True)
class Config:
    """How much of every other method's update is added.

    Attributes:
        alpha: multiples of it.
    """

    alpha: tuple[float, ...] = swept(0.5, 1.0)
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    return transferred(trees["target"], tree.difference(trees["other"], trees["base"]), alpha=point["alpha"])


EDIT = Edit(Config, edit, roles=("base", "target", "other"))
