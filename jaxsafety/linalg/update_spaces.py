"""Where an update lies in the spaces of the weights that it changes, and how strongly it acts on given inputs.

``base`` holds the weights before the update ``delta``, stacks ``[l, m, n]`` stored ``[in, out]``: the output space
(the paper's column space) is n-dimensional, the input space (its row space) m-dimensional. ``energy`` is a share in
(0, 1] of a squared spectrum. What a share means is only how far it exceeds chance, so every share stands beside the
value of random directions. Statistics are float32, or float64 for float64 weights. What is decomposed has no gradient,
and a ValueError says so; values that are not finite are refused where they are known, and NaN where traced.
"""

from __future__ import annotations

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_finite, check_share
from jaxsafety.entry.programs import compiled, undifferentiated
from jaxsafety.linalg import subspace, svd
from jaxsafety.linalg.masked import norm
from jaxsafety.types import Key, Leaf

# Ranks that hold a share of the energy need the whole spectrum, which a randomised decomposition has not.
Method = Literal["full", "gram"]
DeltaMethod = Literal["full", "gram", "randomized"]
Share = float | Float[Array, ""]


@flax.struct.dataclass
class NullSpace:
    """An update's directions on one side against the null space of the base there: what the base hardly uses.

    Attributes:
        null_norm: ``[l, r]`` ``|(I - P) u_j|`` in [0, 1] of every leading direction of the update, the strongest first;
            NaN beyond ``rank_delta``.
        null_energy: ``[l]`` share of the energy of those directions in the null space: the mean of their squared
            ``null_norm``, weighted by ``s_j^2``.
        total_null_energy: ``[l]`` the same of the whole update: of the outputs ``|dW (I - P)|_F^2 / |dW|_F^2``.
        rank_base: ``[l]`` int32 dimensions that P projects on, -1 where the decomposition was refused.
        rank_delta: ``[l]`` int32 leading directions of the update, -1 where the decomposition was refused.
        baseline_norm: ``[l]`` expected ``|(I - P) u|`` of a random direction.
        baseline_energy: ``[l]`` expected ``|(I - P) u|^2``, ``1 - rank_base / n``.
        baseline_std: ``[l]`` standard deviation of ``|(I - P) u|^2`` over random directions.
        errors: ``[l]`` largest residual of the triplets used, over the largest singular value of its matrix.
    """

    null_norm: Leaf
    null_energy: Leaf
    total_null_energy: Leaf
    rank_base: Leaf
    rank_delta: Leaf
    baseline_norm: Leaf
    baseline_energy: Leaf
    baseline_std: Leaf
    errors: Leaf


@flax.struct.dataclass
class Spaces:
    """An update beside its base, from one decomposition of each.

    Attributes:
        output: of the directions that the update writes.
        input: of the directions that it reads: P projects on the base's leading input directions, and the whole
            update's share is ``|(I - P) dW|_F^2 / |dW|_F^2``.
        base_values: ``[l, r]`` singular values of the base, descending; NaN where the decomposition refused them.
        delta_values: ``[l, r]`` those of the update; as many as were computed.
    """

    output: NullSpace
    input: NullSpace
    base_values: Leaf
    delta_values: Leaf


@flax.struct.dataclass
class InputSpace:
    """How an update acts on inputs ``a``.

    Attributes:
        gain: ``[l, b]`` ``|a dW| / |a|``, in the unit of a singular value; at most the largest of the update.
        ratio: ``[l, b]`` ``|a dW| / |a W|``.
        projections: ``[l, b, r]`` ``s_j <a, v_j> / |a|`` on the update's input directions, the strongest first. Signs
            are arbitrary; the squares of all directions add up to the gain's.
        energy: ``[l, b]`` share ``|V^T a|^2 / |a|^2`` of the input in those r directions, in [0, 1]; of a random input
            ``r / m`` is expected.
    """

    gain: Leaf
    ratio: Leaf
    projections: Leaf
    energy: Leaf


@checked
def output_space(
    base: Float[Array, "l m n"],
    delta: Float[Array, "l m n"],
    *,
    energy: Share = 0.9,
    method: Method = "full",
) -> NullSpace:
    """Measures how much of an update's output lies in the null space of the base.

    P projects on the base's leading output directions that hold ``energy`` of its squared spectrum; the leading
    directions of the update hold as much of its own. Under vmap over updates of one base, that is decomposed once.

    Args:
        method: of the decompositions, see :func:`jaxsafety.linalg.svd.decompose`. ``gram`` is faster; a layer whose
            ``energy`` needs directions that it cannot resolve is decomposed with ``full`` outside of jit and vmap, and
            is NaN with a rank of -1 inside them.

    Returns:
        See :class:`NullSpace`. A layer whose update is zero has NaN shares; one whose base is zero has a null space
        that is everything.

    Raises:
        ValueError: energy out of range, an unknown method, different shapes, or values that are not finite.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.2 and figure 4.

    Fidelity: the paper's claim in its clean definition, beside its baseline: a wide matrix leaves most of any direction
        in its null space. The released code compares the tuned weights instead of the update, subtracts the mean row
        first, takes rows of the factor for singular vectors, and leaves out the last direction of P.
    """
    check_share("energy", energy)
    base, delta = undifferentiated("output_space", _numbers(base=base, delta=delta))
    before, update = (svd.decompose(stack, method=method) for stack in (base, delta))
    ranks = _rank(base, before, energy=energy), _rank(delta, update, energy=energy)
    return _null_space(base, before, delta, update, ranks)


@checked
def both_spaces(
    base: Float[Array, "l m n"],
    delta: Float[Array, "l m n"],
    *,
    energy: Share = 0.9,
    method: DeltaMethod = "full",
    rank: int | None = None,
    key: Key | None = None,
) -> Spaces:
    """Measures an update against the null spaces of the base on both sides, and the spectra of both.

    Args:
        method: as for :func:`output_space`. ``randomized`` decomposes the update alone that way, and the base, most of
            whose directions are needed, with ``gram``; a layer of whose update ``rank`` triplets do not hold ``energy``
            is NaN with a rank of -1.
        rank, key: for ``randomized``, how many triplets it computes and from what.

    Raises:
        ValueError: as :func:`output_space`, and as :func:`jaxsafety.linalg.svd.decompose` for rank and key.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.2 and figure 4 (outputs).

    Fidelity: as :func:`output_space`; the paper does not look at the inputs that way.
    """
    check_share("energy", energy)
    base, delta = undifferentiated("both_spaces", _numbers(base=base, delta=delta))
    randomized = method == "randomized"
    before = svd.decompose(base, method="gram" if randomized else method)
    update = svd.decompose(delta, method=method, rank=rank if randomized else None, key=key)
    ranks = _rank(base, before, energy=energy), _rank(delta, update, energy=energy)
    before_turned, update_turned = (
        found.replace(inputs=found.outputs, outputs=found.inputs) for found in (before, update)
    )
    return Spaces(
        output=_null_space(base, before, delta, update, ranks),
        input=_null_space(base.mT, before_turned, delta.mT, update_turned, ranks),
        base_values=before.values,
        delta_values=update.values,
    )


@checked
def range_basis(base: Float[Array, "l m n"], *, energy: Share = 0.9, method: Method = "full") -> Float[Array, "l n r"]:
    """Returns the leading output directions that hold ``energy`` of a stack's squared spectrum, zeros behind them.

    A layer that ``method`` ``gram`` does not resolve inside jit or vmap is NaN.

    Raises:
        ValueError: as :func:`output_space`.
    """
    check_share("energy", energy)
    (base,) = undifferentiated("range_basis", _numbers(base=base))
    found = svd.decompose(base, method=method)
    rank = _rank(base, found, energy=energy)
    basis = jnp.where(subspace.leading(rank, found.values.shape[-1])[:, None], found.outputs, 0.0)
    return jnp.where(rank[:, None, None] < 0, jnp.nan, basis)


@checked
def input_space(
    base: Float[Array, "l m n"],
    delta: Float[Array, "l m n"],
    *,
    inputs: Float[Array, "l b m"],
    rank: int | None = None,
    method: DeltaMethod = "full",
    key: Key | None = None,
) -> InputSpace:
    """Measures how strongly an update acts on inputs.

    Args:
        inputs: what the matrices are multiplied with, biases not added.
        rank: r, leading input directions to project on, in [1, min(m, n)]; None for all.
        method: of the update's decomposition; ``randomized`` for a few directions of a large matrix.
        key: for ``randomized``.

    Returns:
        See :class:`InputSpace`; NaN for an input of norm zero, and the ratio NaN where the base maps an input to zero.
        Base and inputs have gradients, the update has none; that of a norm that is zero is zero.

    Raises:
        ValueError: rank out of range, an unknown method, shapes that do not fit, or values that are not finite.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.2 and figure 5.

    Fidelity: the paper's claim in its clean definition. The released code decomposes the base, its mean row subtracted,
        instead of the update, feeds it the attention output alone, and plots the last singular index of 15 samples.
    """
    base, delta, inputs = _numbers(base=base, delta=delta, inputs=inputs)
    delta = undifferentiated("input_space: the update", delta)
    update = svd.decompose(delta, method=method, rank=rank, key=key)
    norms = norm(inputs, axis=-1)
    changed, kept = (norm(_product(inputs, stack), axis=-1) for stack in (delta, base))
    coordinates = _quotient(_product(inputs, update.inputs), norms[..., None])
    return InputSpace(
        gain=_quotient(changed, norms),
        ratio=_quotient(changed, kept),
        projections=coordinates * update.values[:, None],
        energy=jnp.minimum(jnp.sum(coordinates**2, axis=-1), 1.0),
    )


@checked
def changed_norm(base: Float[Array, "l m n"], delta: Float[Array, "l m n"]) -> Float[Array, " l"]:
    """Size of an update beside what it changes, ``|dW|_F / |W|_F``: ``[l]``, NaN for a zero base.

    The gradient of an update of zero is zero.

    Raises:
        ValueError: different shapes, or values that are not finite.
    """
    changed, kept = (norm(stack, axis=(1, 2)) for stack in reversed(_numbers(base=base, delta=delta)))
    return _quotient(changed, kept)


def _numbers(**arrays: Array) -> tuple[Array, ...]:
    """All arrays in one dtype of at least float32, once they are known to hold numbers."""
    check_finite(**arrays)
    dtype = jnp.promote_types(jnp.result_type(*arrays.values()), jnp.float32)
    return tuple(jnp.asarray(array, dtype) for array in arrays.values())


@compiled()
def _null_space(base: Array, before: svd.SVD, delta: Array, update: svd.SVD, ranks: tuple[Array, Array]) -> NullSpace:
    """The outputs of an update against the null space of its base, both decomposed, with their leading directions."""
    rank_base, rank_delta = ranks
    width = base.shape[-1]
    used, leading = (
        subspace.leading(rank, found.values.shape[-1]) for rank, found in ((rank_base, before), (rank_delta, update))
    )
    refused = rank_base < 0
    every = subspace.complement_energy(update.outputs.mT, before.outputs, mask=used)
    outside = jnp.where(leading & ~refused[:, None], every, jnp.nan)
    power = jnp.where(leading, (update.values / update.values[:, :1]) ** 2, 0.0)

    def of_rows() -> Array:
        return _weighted(subspace.complement_energy(delta, before.outputs, mask=used), _row_energies(delta))

    def of_directions() -> Array:
        return _weighted(every, (update.values / update.values[:, :1]) ** 2)

    # Directions are at hand, and make up the whole update unless some are missing.
    complete = update.values.shape[-1] == min(delta.shape[1:])
    missing = jnp.any(jnp.isnan(update.values))
    whole = jax.lax.cond(missing, of_rows, of_directions) if complete else of_rows()
    mean, spread = subspace.random_energy(jnp.maximum(rank_base, 0), dimension=width)
    norm = subspace.random_norm(width - jnp.maximum(rank_base, 0), dimension=width)
    errors = jnp.maximum(_relative_error(before, rank_base), _relative_error(update, rank_delta))
    known = {"total_null_energy": whole, "baseline_norm": norm, "baseline_energy": 1 - mean}
    known |= {"baseline_std": spread, "errors": errors}
    return NullSpace(
        null_norm=jnp.sqrt(outside),
        null_energy=_weighted(outside, power),
        rank_base=rank_base,
        rank_delta=rank_delta,
        **{name: jnp.where(refused, jnp.nan, value) for name, value in known.items()},
    )


def _rank(matrices: Float[Array, "l m n"], found: svd.SVD, *, energy: float | Array) -> Int[Array, " l"]:
    """Leading directions that hold ``energy``, -1 where that takes values which the decomposition has refused."""
    refused = jnp.isnan(found.values)
    # Triplets that were not computed count as one more that was refused.
    fewer = found.values.shape[-1] < min(matrices.shape[1:])
    refused = jnp.pad(refused, ((0, 0), (0, int(fewer))), constant_values=True)
    values = jnp.pad(found.values, ((0, 0), (0, int(fewer))), constant_values=jnp.nan)
    so_far = jnp.cumsum(refused, axis=-1)
    # All that the refused values hold together is what the others leave of the Frobenius norm.
    scale = jnp.maximum(jnp.max(jnp.abs(matrices), axis=(1, 2)), jnp.finfo(matrices.dtype).tiny)[:, None]
    known = jnp.where(refused, 0.0, values / scale)
    rest = jnp.sum((matrices / scale[..., None]) ** 2, axis=(1, 2)) - jnp.sum(known**2, axis=-1)
    filled = jnp.where(refused & (so_far == 1), jnp.sqrt(jnp.maximum(rest, 0.0))[:, None], known)
    rank = subspace.rank_at_energy(filled, energy=energy)
    return jnp.where(rank > jnp.sum(so_far == 0, axis=-1), -1, rank)


def _relative_error(found: svd.SVD, rank: Int[Array, " l"]) -> Float[Array, " l"]:
    """Largest residual of the leading triplets over the largest value; nothing errs where none is used."""
    used = subspace.leading(rank, found.values.shape[-1])
    largest = jnp.max(jnp.where(used, found.errors, 0.0), axis=-1)
    return jnp.where(rank < 0, jnp.nan, jnp.where(rank == 0, 0.0, largest / found.values[:, 0]))


def _row_energies(matrices: Float[Array, "l m n"]) -> Float[Array, "l m"]:
    """Squared norms of the rows, in the unit of the largest entry: squares of a small update would underflow."""
    largest = jnp.max(jnp.abs(matrices), axis=(1, 2), keepdims=True)
    return jnp.sum((matrices / jnp.where(largest > 0, largest, 1.0)) ** 2, axis=-1)


def _weighted(values: Float[Array, "l v"], weights: Float[Array, "l v"]) -> Float[Array, " l"]:
    """Weighted mean; NaN for no weight at all. A value without weight may be anything."""
    total = jnp.sum(jnp.where(weights > 0, weights * values, 0.0), axis=-1)
    return _quotient(total, jnp.sum(weights, axis=-1))


def _quotient(numerator: Array, denominator: Array) -> Array:
    """The quotient, NaN unless the denominator is above zero."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), jnp.nan)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
