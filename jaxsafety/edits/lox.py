"""Low-rank extrapolation (LoX): the leading directions of what alignment changed are taken further."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry import checks
from jaxsafety.entry.annotations import checked
from jaxsafety.linalg import low_rank
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Edit, Key, Params, Point


@checked
def extrapolated(
    aligned: Params,
    base: Params,
    *,
    rank: int | Int[Array, ""],
    alpha: float | Float[Array, ""],
    pattern: str = tree.MATRICES,
    method: Method = "full",
) -> Params:
    """Returns ``W + alpha (W - W_0)_k`` of the layers' matrices, of rank k the nearest; all else stays as aligned.

    Args:
        aligned: the aligned model W, whose structure the result has.
        base: what it was aligned from, W_0.
        rank: directions k of every matrix that are taken further, at least 0; may be traced.
        alpha: how far beyond the aligned model; 0 is that, below 0 alignment is undone along them.
        pattern: paths of the ``[l, m, n]`` stacks.
        method: of the decompositions, see :func:`jaxsafety.linalg.low_rank.truncated`.

    Raises:
        ValueError: a rank below 0, an alpha that is not finite, trees that differ in structure or shape, values that
            are not finite, a pattern that matches nothing or something else than stacks of matrices, or a gradient
            with respect to what is decomposed.

    References:
        Perin et al. 2025 (arXiv 2506.15606).

    Fidelity: faithful in the maths; the paper finds k by the safety of models cut to few ranks, here it is swept.

    Example:
        >>> import jax.numpy as jnp
        >>> base = {"blocks": {"mlp": {"up": jnp.zeros((1, 2, 2))}}}
        >>> aligned = {"blocks": {"mlp": {"up": jnp.diag(jnp.float32([3.0, 1.0]))[None]}}}
        >>> print(extrapolated(aligned, base, rank=1, alpha=0.5)["blocks"]["mlp"]["up"][0])
        [[4.5 0. ]
         [0.  1. ]]
    """
    checks.check_finite(alpha=alpha)
    tree.check_match(aligned, base, names=("aligned", "base"), finite=True)
    start, parts = tree.flatten(base), {}
    for path, stack in tree.matrix_stacks(aligned, pattern).items():
        wide = jnp.promote_types(stack.dtype, jnp.float32)
        leading = low_rank.truncated(stack.astype(wide) - start[path].astype(wide), rank=rank, method=method)
        parts[path] = (stack + alpha * leading).astype(stack.dtype)
    return tree.label(aligned, lambda path, leaf: parts.get(path, leaf))


@dataclass(frozen=True)
class Config:
    """How many directions, and how far.

    Attributes:
        alpha: multiples of the low-rank part that are added.
        rank: leading singular directions of every matrix's update.
        method: of the decompositions; a kept direction that ``gram`` does not resolve is NaN.
    """

    alpha: tuple[float, ...] = swept(1.25)
    rank: tuple[int, ...] = swept(6, at_least=0)
    method: Method = "full"
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`; the target is the aligned model."""
    given = {"rank": point["rank"], "alpha": point["alpha"], "method": config.method}
    return extrapolated(trees["target"], trees["base"], **given)


EDIT = Edit(Config, edit, leafwise=True)
