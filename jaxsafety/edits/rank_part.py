"""The update with its matrices cut to a low rank."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.linalg import subspace, svd
from jaxsafety.types import Edit, Key, Params, Point


def rank_part(delta: Params, *, rank: int | Int[Array, ""], pattern: str = tree.MATRICES) -> Params:
    """The update with its matrices cut to their leading ``rank`` singular directions; everything else is kept whole.

    Args:
        delta: the update, whose structure the result has.
        rank: singular directions kept in every layer, from 1 to the most that a matched matrix has; a matrix that has
            fewer is kept whole. May be traced, so that one program serves every rank.
        pattern: paths of the ``[l, m, n]`` stacks to cut.

    Raises:
        ValueError: rank out of range, a pattern that matches nothing or something else than stacks of matrices, or an
            update that is not finite.
    """
    tree.check_finite(delta, name="delta")
    stacks = tree.matrix_stacks(delta, pattern)
    most = max(min(stack.shape[1:]) for stack in stacks.values())
    tree.check_between("rank", rank, 1, most)
    parts = {path: _truncated(stack, jnp.asarray(rank)) for path, stack in stacks.items()}
    return tree.label(delta, lambda path, leaf: parts[path].astype(leaf.dtype) if path in parts else leaf)


def _truncated(matrices: Float[Array, "l m n"], rank: Int[Array, ""]) -> Float[Array, "l m n"]:
    found = svd.decompose(matrices)
    values = jnp.where(subspace.leading(rank, found.values.shape[-1])[None], found.values, 0)
    return jnp.matmul(found.inputs * values[:, None, :], found.outputs.mT, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Config:
    """How many directions of every matrix are kept.

    Attributes:
        rank: leading singular directions of the update; a matrix that has fewer is kept whole.
    """

    rank: tuple[int, ...] = swept(1, 2, 4, 8, 16, at_least=1)
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    delta = tree.difference(trees["target"], trees["base"])
    return tree.interpolate(trees["base"], rank_part(delta, rank=point["rank"]), 1.0)


EDIT = Edit(Config, edit)
