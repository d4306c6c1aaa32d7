"""The update with its matrices cut to a low rank."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Int

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between
from jaxsafety.entry.programs import undifferentiated
from jaxsafety.linalg import low_rank
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Edit, Key, Params, Point


@checked
def rank_part(
    delta: Params, *, rank: int | Int[Array, ""], pattern: str = tree.MATRICES, method: Method = "full"
) -> Params:
    """The update with its matrices cut to their leading ``rank`` singular directions; everything else is kept whole.

    Args:
        delta: the update, whose structure the result has.
        rank: singular directions kept in every layer, from 1 to the most that a matched matrix has; a matrix that has
            fewer is kept whole. May be traced, so that one program serves every rank.
        pattern: paths of the ``[l, m, n]`` stacks to cut.
        method: of the decompositions; a direction that ``gram`` does not resolve inside jit or vmap is NaN.

    Raises:
        ValueError: rank out of range, a pattern that matches nothing or something else than stacks of matrices, an
            update that is not finite, or a gradient with respect to what is cut; what is kept whole has one.
    """
    tree.check_finite(delta, name="delta")
    stacks = undifferentiated("rank_part", tree.matrix_stacks(delta, pattern))
    most = max(min(stack.shape[1:]) for stack in stacks.values())
    check_between("rank", rank, 1, most)
    parts = {path: low_rank.truncated(stack, rank=rank, method=method) for path, stack in stacks.items()}
    return tree.label(delta, lambda path, leaf: parts[path].astype(leaf.dtype) if path in parts else leaf)


@dataclass(frozen=True)
class Config:
    """How many directions of every matrix are kept.

    Attributes:
        rank: leading singular directions of the update; a matrix that has fewer is kept whole.
        method: of the decompositions; a kept direction that ``gram`` does not resolve is NaN.
    """

    rank: tuple[int, ...] = swept(1, 2, 4, 8, 16, at_least=1)
    method: Method = "full"
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    delta = tree.difference(trees["target"], trees["base"])
    return tree.interpolate(trees["base"], rank_part(delta, rank=point["rank"], method=config.method), 1.0)


EDIT = Edit(Config, edit, leafwise=True)
