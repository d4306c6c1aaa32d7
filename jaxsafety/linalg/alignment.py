"""Are the methods different? Alignment of their updates and of their gradients.

Two updates of the same model are compared as whole trees (cosine), matrix by matrix (cosine), and by the subspaces of
inputs that they read and of outputs that they write (principal angles of the leading k directions, with the overlap
that unrelated subspaces would have beside them).
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import whole_number
from jaxsafety.entry.programs import compiled, undifferentiated
from jaxsafety.linalg import subspace, svd
from jaxsafety.types import Leaf, Params


@flax.struct.dataclass
class Alignment:
    """How two updates lie to each other; the dicts run over the paths of the compared stacks of matrices.

    Attributes:
        cosine: ``[]`` cosine of the whole trees in [-1, 1], NaN where either is zero.
        matrix_cosine: ``{path: [l]}`` the same of each matrix.
        input_angles: ``{path: [l, k]}`` principal angles in radians, ascending in [0, pi / 2], between the leading k
            input directions of either update; NaN beyond the rank of the one with the smaller rank.
        output_angles: ``{path: [l, k]}`` the same of the output directions.
        input_chance: ``{path: [l]}`` the mean squared cosine (:func:`overlap`) expected of unrelated input directions:
            k / m where both updates have rank k or more, which is all updates but those of a very low rank.
        output_chance: ``{path: [l]}`` the same of the output directions, k / n.
    """

    cosine: Leaf
    matrix_cosine: dict[str, Leaf]
    input_angles: dict[str, Leaf]
    output_angles: dict[str, Leaf]
    input_chance: dict[str, Leaf]
    output_chance: dict[str, Leaf]


@checked
def align(delta_a: Params, delta_b: Params, *, rank: int, pattern: str = tree.MLP_MATRICES) -> Alignment:
    """Compares two updates of one model, ``tree.difference(tuned, base)``; a matrix that did not change has NaN.

    Args:
        delta_a, delta_b: the updates.
        rank: k, leading directions whose spans are compared; at most what the smallest compared matrix has.
        pattern: paths of the ``[l, m, n]`` stacks to compare one by one.

    Raises:
        ValueError: rank out of range, a pattern that matches nothing or something else than stacks of matrices,
            trees that differ in structure or shape, values that are not finite, or a gradient is asked: only that of
            :func:`tree_cosine` is there.

    References:
        Beyond Jain et al. 2024 (arXiv 2407.10264), who compare the methods by their behaviour. Angles: Bjorck and
        Golub 1973.
    """
    tree.check_match(delta_a, delta_b, names=("delta_a", "delta_b"), finite=True)
    stacks_a, stacks_b = (tree.matrix_stacks(delta, pattern) for delta in (delta_a, delta_b))
    most = min(min(stack.shape[1:]) for stack in stacks_a.values())
    rank = whole_number("rank", rank, 1, most, what=", the smallest side of the compared matrices")
    delta_a, delta_b, stacks_a, stacks_b = undifferentiated("align", (delta_a, delta_b, stacks_a, stacks_b))
    sides = {path: _spaces(stack, stacks_b[path], rank=rank) for path, stack in stacks_a.items()}
    columns = [dict(zip(sides, column, strict=True)) for column in zip(*sides.values(), strict=True)]
    return Alignment(
        tree_cosine(delta_a, delta_b),
        {path: subspace.cosine(stack, stacks_b[path]) for path, stack in stacks_a.items()},
        *columns,
    )


@checked
def overlap(angles: Float[Array, "*batch k"]) -> Float[Array, "*batch"]:
    """Mean squared cosine of principal angles in [0, 1], NaN ones left out: 1 if one space contains the other."""
    missing = jnp.isnan(angles)
    squares = jnp.where(missing, 0.0, jnp.cos(jnp.where(missing, 0.0, angles)) ** 2)
    return jnp.sum(squares, axis=-1) / jnp.sum(~missing, axis=-1)


@checked
def tree_cosine(a: Params, b: Params) -> Float[Array, ""]:
    """Cosine ``<a, b> / (|a| |b|)`` of two whole trees, updates or gradients, in [-1, 1]; NaN where either is zero.

    Raises:
        ValueError: the trees differ in structure or shape, or are empty.
    """
    tree.check_match(a, b, names=("a", "b"))
    if not jax.tree.leaves(a):
        raise ValueError("a and b hold no leaves, expected at least one")
    a, b = _largest_one(a), _largest_one(b)
    return jnp.clip(_dot(a, b) / jnp.sqrt(_dot(a, a) * _dot(b, b)), -1.0, 1.0)


@compiled("rank")
def _spaces(a: Float[Array, "l m n"], b: Float[Array, "l m n"], *, rank: int) -> tuple[Array, Array, Array, Array]:
    """Returns input angles, output angles, input chance and output chance of two stacks."""
    found = [svd.decompose(stack, rank=rank) for stack in (a, b)]
    # Directions of values that are zero to rounding are arbitrary completions of a basis, equal in both updates.
    tolerance = max(a.shape[1:]) * float(jnp.finfo(found[0].values.dtype).eps)
    ranks = [subspace.rank_at_tolerance(side.values, tolerance=tolerance) for side in found]
    masks = [subspace.leading(side, rank) for side in ranks]
    angles = [
        subspace.principal_angles(first, second, mask_a=masks[0], mask_b=masks[1])
        for first, second in ((found[0].inputs, found[1].inputs), (found[0].outputs, found[1].outputs))
    ]
    # The expected sum of squared cosines, r_a r_b / n, is spread over the smaller rank's number of angles.
    larger = jnp.where(jnp.minimum(*ranks) > 0, jnp.maximum(*ranks), jnp.nan)
    return *angles, *(larger / size for size in a.shape[1:])


def _largest_one(params: Params) -> Params:
    """The tree in float32 or wider over its largest entry: squares of a saturated loss's gradients underflow."""
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32)), params)
    largest = jax.lax.stop_gradient(jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(wide)])))
    return jax.tree.map(lambda leaf: leaf / jnp.where(largest > 0, largest, 1.0), wide)


def _dot(a: Params, b: Params) -> Float[Array, ""]:
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST), a, b)
    return sum(jax.tree.leaves(products))
