"""Harm direction removal: a model without the largest entries of what tuning on harmful data changes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.edits.trim import trimmed
from jaxsafety.entry.annotations import checked
from jaxsafety.types import Edit, Key, Params, Point


@checked
def harm_removed(
    target: Params, harm_delta: Params, *, keep: float | Float[Array, ""], scale: float | Float[Array, ""]
) -> Params:
    """Returns ``target - scale * trimmed(harm_delta, keep)``; scale 0 is the target, keep 1 negates the whole update.

    Args:
        target: the model that is to become safer.
        harm_delta: the update of a model tuned on harmful data.
        keep: share in (0, 1] of that update's entries, see :func:`jaxsafety.edits.trim.trimmed`.
        scale: multiple of what is kept; below 0 harm is added.

    Raises:
        ValueError: keep out of range, trees that differ in structure or shape, or values that are not finite.

    References:
        Hazra et al. 2024 (arXiv 2406.11801), harm direction removal.

    Fidelity: the paper trims the update as one vector, here every layer of a parameter by itself; the further steps
    for models with edited facts (their layers alone) and at inference (Safe-Align) are not part of it.
    """
    tree.check_match(target, harm_delta, names=("target", "harm_delta"))
    return tree.interpolate(target, trimmed(harm_delta, keep=keep), -scale)


@dataclass(frozen=True)
class Config:
    """How much of the harmful update is removed, and how far; by default as in the paper, where scale is 2 to 3.

    Attributes:
        keep: shares of its entries, the largest of every layer of every parameter; 1 is all of them, of which a
            ``scale`` below 1 may do.
        scale: multiples of what is kept that are subtracted.
    """

    keep: tuple[float, ...] = swept(0.1, above=0, at_most=1)
    scale: tuple[float, ...] = swept(2.0)
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    harm = tree.difference(trees["harmful"], trees["base"])
    return harm_removed(trees["target"], harm, keep=point["keep"], scale=point["scale"])


EDIT = Edit(Config, edit, roles=("target", "harmful", "base"), leafwise=True, whole=True)
