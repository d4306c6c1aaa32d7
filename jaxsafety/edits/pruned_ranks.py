"""Directions removed that refusing rests on and answering does not, by ActSVD: how low is the rank of safety?"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.edits.pruned import SITES, Moments
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between
from jaxsafety.linalg import directions, subspace
from jaxsafety.linalg.directions import INPUTS
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Edit, Key, Params, Point

Rank = int | Int[Array, ""]


@checked
def without_directions(
    weights: Float[Array, "l m n"], unsafe: Float[Array, "l n r"], safe: Float[Array, "l n r"], *, safety: Rank,
    utility: Rank,
) -> Float[Array, "l m n"]:  # fmt: skip
    """Returns ``W - W P_s (I - P_u)``, P_s on the first ``safety`` columns of one basis, P_u on those of the other.

    Args:
        weights: a stack of matrices.
        unsafe, safe: orthonormal output directions, the most important first.
        safety: how many of the first basis are removed, at least 0; may be traced.
        utility: how many of the other are spared.

    Raises:
        ValueError: a rank below 0.

    References:
        Wei et al. 2024 (arXiv 2402.05162): ``(I - P_u) P_s W`` of weights ``[out, in]``; ours are ``[in, out]``.

    Example:
        >>> import jax.numpy as jnp
        >>> weights, axes = jnp.float32([[[1.0, 2.0]]]), jnp.eye(2)[None]
        >>> print(without_directions(weights, axes, axes[:, :, ::-1], safety=1, utility=0))
        [[[0. 2.]]]
    """
    check_between("safety", safety, 0)
    check_between("utility", utility, 0)
    size = unsafe.shape[-1]
    removed, spared = (
        jnp.where(subspace.leading(jnp.asarray(rank), size)[None, None], basis, 0)
        for basis, rank in ((unsafe, safety), (safe, utility))
    )
    part = _product(_product(weights, removed), removed.mT)
    return weights - (part - _product(_product(part, spared), spared.mT))


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@checked
def ranks_removed(params: Params, moments: Moments, *, safety: Rank, utility: Rank, method: Method = "full") -> Params:
    """Returns the model without the output directions of its MLP matrices that matter most where it refuses.

    What they share with those that matter most where it answers is spared; all other parameters stay, bit for bit.

    Args:
        params: the model.
        moments: as of :func:`jaxsafety.edits.pruned.pruned`.
        safety: directions of every matrix that go, at least 0; 0 removes none.
        utility: directions of every matrix that are spared.
        method: of the decompositions, see :func:`jaxsafety.linalg.directions.ordered`.

    Raises:
        ValueError: a rank below 0, an unknown method, a model without an MLP, or a gradient with respect to what is
            decomposed.

    References:
        Wei et al. 2024 (arXiv 2402.05162), ActSVD and its orthogonal projection.

    Fidelity: of the MLPs' matrices alone, whose inputs are read.
    """
    stacks = tree.matrix_stacks(params, tree.MLP_MATRICES)

    def kept(path: str, leaf: Array) -> Array:
        if path not in stacks:
            return leaf
        wide, site = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), SITES[path.rpartition("/")[2]]
        unsafe, safe = (
            directions.ordered(wide, "activations", moments=moments[name][site], method=method)
            for name in ("unsafe", "safe")
        )
        return without_directions(wide, unsafe, safe, safety=safety, utility=utility).astype(leaf.dtype)

    return tree.label(params, kept)


@dataclass(frozen=True)
class Config:
    """How many directions are removed, and how many are spared.

    Attributes:
        utility: directions of every MLP matrix, the most important where safe prompts are answered, that stay.
        safety: directions of every MLP matrix, the most important where unsafe prompts are refused, that go.
        method: of the decompositions; a direction that ``gram`` does not resolve is NaN.
    """

    utility: tuple[int, ...] = swept(8, at_least=0)
    safety: tuple[int, ...] = swept(0, 1, 2, 4, 8, at_least=0)
    method: Method = "full"
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key, moments: Moments) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    given = {"safety": point["safety"], "utility": point["utility"], "method": config.method}
    return ranks_removed(trees["target"], moments, **given)


EDIT = Edit(Config, edit, roles=("target",), reads=tuple(INPUTS.values()))
