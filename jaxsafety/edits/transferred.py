"""Task arithmetic: the update between two models added to a third, or taken away from it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.types import Edit, Key, Params, Point


@checked
def transferred(tuned: Params, other_delta: Params, *, alpha: float | Float[Array, ""]) -> Params:
    """Returns one model plus ``alpha`` times another one's update, a task vector ``tree.difference(other, base)``.

    An alpha below 0 negates the task vector: the model forgets what the other was tuned on. With the update from a
    model tuned on harmful data to an aligned one this is RESTA, which adds to a tuned model the safety that it lost.

    Raises:
        ValueError: the trees differ in structure or shape, or values are not finite.

    References:
        Ilharco et al. 2022 (arXiv 2212.04089), section 2. Bhardwaj et al. 2024 (arXiv 2402.11746), RESTA.

    Fidelity: faithful to both; RESTA's further step, dropping entries at random, is :mod:`jaxsafety.edits.dare` before.
    """
    tree.check_match(tuned, other_delta, names=("tuned", "other_delta"))
    return tree.interpolate(tuned, other_delta, alpha)


@dataclass(frozen=True)
class Config:
    """How much of the other model's update is added.

    Attributes:
        alpha: multiples of it; below 0 it is taken away.
    """

    alpha: tuple[float, ...] = swept(0.5, 1.0)
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    return transferred(trees["target"], tree.difference(trees["other"], trees["base"]), alpha=point["alpha"])


EDIT = Edit(Config, edit, roles=("base", "target", "other"), leafwise=True)
