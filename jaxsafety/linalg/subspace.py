"""Subspaces and spectra: how much of a vector lies in a subspace, angles, ranks, and what a random subspace would show.

A basis is ``[*batch, n, r]``, orthonormal columns. How many of its columns count may differ between matrices and seeds,
so a subspace of data-dependent rank is a basis and a boolean ``mask [*batch, r]`` (:func:`leading`): static shapes.
Everything is computed in float32, or float64 if an input is. A large projection says nothing alone: beside it belongs
the random baseline, ``k / n`` of the energy for k of n dimensions. Directions that a mask leaves out may be anything.
Arrays of other shapes or types are a ValueError that names them. Ranks are integers: neither they nor what depends on
them alone has a gradient.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between, check_share, whole_number
from jaxsafety.entry.programs import compiled, undifferentiated
from jaxsafety.linalg.unbatched import singular_values
from jaxsafety.types import Key

_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# A share that a difference from 1 still has to five digits.
_SMALL = 0.1
# Recurrence steps before the asymptotic series, which then errs by 1e-7.
_SHIFT = 6


@checked
def rank_at_energy(values: Float[Array, "*batch r"], *, energy: float | Float[Array, ""]) -> Int[Array, "*batch"]:
    """Smallest k whose leading values hold a share of the energy: ``sum_{i<k} s_i^2 >= energy * sum_i s_i^2``.

    Args:
        values: ``[*batch, r]`` singular values, descending; all of them, for the sum is taken over what is given.
        energy: share in (0, 1]; 1 counts the values that are not 0.

    Returns:
        ``[*batch]`` int32 in ``[0, r]``: 0 for a zero matrix, -1 where a value is NaN (refused).

    Raises:
        ValueError: energy out of range (unless traced).
    """
    check_share("energy", energy)
    squares = _largest_one(_widened(values)) ** 2
    # What the k-th and later values hold, added from the smallest: near 1 the leading sums would all round to it.
    tails = jnp.cumsum(squares[..., ::-1], axis=-1)[..., ::-1]
    return _counted(tails > (1 - energy) * tails[..., :1], values)


@checked
def rank_at_tolerance(values: Float[Array, "*batch r"], *, tolerance: float | Float[Array, ""]) -> Int[Array, "*batch"]:
    """Number of values above a share of the largest, ``s_i > tolerance * s_1``, tolerance in [0, 1).

    Returns:
        ``[*batch]`` int32 in ``[0, r]``: 0 for a zero matrix, -1 where a value is NaN (refused).

    Raises:
        ValueError: tolerance out of range (unless traced).
    """
    check_share("tolerance", tolerance, whole="[0, 1)", what="a share of the largest value")
    return _counted(values > tolerance * jnp.max(values, axis=-1, keepdims=True), values)


@checked
def leading(rank: Int[Array, "*batch"], size: int) -> Bool[Array, "*batch size"]:
    """Returns the mask of the first ``rank`` of ``size`` directions: none for a rank below 1, all from ``size`` on."""
    return _along(size, rank) < rank[..., None]


@checked
def projection_energy(
    vectors: Float[Array, "*batch v n"],
    basis: Float[Array, "*batch n r"],
    *,
    mask: Bool[Array, "*batch r"] | None = None,
) -> Float[Array, "*batch v"]:
    """Share of each vector's energy inside a subspace, ``|P x|^2 / |x|^2``.

    Vectors are rows, the columns of the basis orthonormal; ``mask`` has those that span the subspace, None for all.

    Returns:
        ``[*batch, v]`` in [0, 1]; NaN for a zero vector. Expected of a random vector: :func:`random_energy`.
    """
    vectors, basis = _same_precision(vectors, _masked(basis, mask))
    coordinates = _product(_unit(vectors), basis)
    return jnp.minimum(jnp.sum(coordinates**2, axis=-1), 1.0)


@checked
def complement_energy(
    vectors: Float[Array, "*batch v n"],
    basis: Float[Array, "*batch n r"],
    *,
    mask: Bool[Array, "*batch r"] | None = None,
) -> Float[Array, "*batch v"]:
    """Share of each vector's energy outside a subspace, ``|x - P x|^2 / |x|^2``.

    Where any share is small it is taken from the residual, so that 1e-8 is seen where 1 minus
    :func:`projection_energy` rounds to 0; else from that difference, which takes half the products. Arguments, shapes
    and NaN are those of that function.
    """
    return _complement_energy(vectors, basis, mask)


@compiled()
def _complement_energy(
    vectors: Float[Array, "*batch v n"], basis: Float[Array, "*batch n r"], mask: Bool[Array, "*batch r"] | None
) -> Float[Array, "*batch v"]:
    vectors, basis = _same_precision(vectors, _masked(basis, mask))
    unit = _unit(vectors)
    coordinates = _product(unit, basis)
    difference = 1.0 - jnp.sum(coordinates**2, axis=-1)

    def residual() -> Array:
        return jnp.sum((unit - _product(coordinates, basis.mT)) ** 2, axis=-1)

    outside = jax.lax.cond(jnp.any(difference < _SMALL), residual, lambda: difference)
    return jnp.minimum(outside, 1.0)


@checked
def principal_angles(
    basis_a: Float[Array, "*batch n r"],
    basis_b: Float[Array, "*batch n q"],
    *,
    mask_a: Bool[Array, "*batch r"] | None = None,
    mask_b: Bool[Array, "*batch q"] | None = None,
) -> Float[Array, "*batch k"]:
    """Principal angles between two subspaces, ``cos(theta_i) = s_i(A^T B)``.

    Angles below 45 degrees come from their sine, ``s(B - A A^T B)``: a cosine cannot tell 1e-4 from 0 in float32.
    The columns of both bases are orthonormal; the masks have those that span the subspaces, None for all.

    Returns:
        ``[*batch, min(r, q)]`` radians in [0, pi / 2], ascending; NaN beyond the dimension of the smaller subspace.
        Unrelated k-dimensional subspaces of n dimensions have a mean squared cosine of ``k / n``.

    Raises:
        ValueError: a gradient is asked; it has none.

    References: Bjorck and Golub 1973; Knyazev and Argentati 2002 (the sines).
    """
    bases = undifferentiated("principal_angles", (basis_a, basis_b))
    return _principal_angles(*bases, mask_a, mask_b)


@compiled()
def _principal_angles(
    basis_a: Array, basis_b: Array, mask_a: Array | None, mask_b: Array | None
) -> Float[Array, "*batch k"]:
    a, b = _same_precision(_masked(basis_a, mask_a), _masked(basis_b, mask_b))
    size = min(a.shape[-1], b.shape[-1])
    overlap = _product(a.mT, b)
    cosines = jnp.clip(singular_values(overlap), 0.0, 1.0)
    sines = jnp.clip(singular_values(b - _product(a, overlap)), 0.0, 1.0)
    rank_a, rank_b = _dimension(a, mask_a), _dimension(b, mask_b)
    # The sines descend and end, before the zeros of masked columns, with those of the smallest angles; dimensions of b
    # beyond those of a stand in front, as ones.
    places = _along(size, rank_a)
    from_end = jnp.clip(rank_b[..., None] - 1 - places, 0, sines.shape[-1] - 1)
    sines = jnp.take_along_axis(sines, from_end, axis=-1)
    angles = jnp.where(sines**2 < 0.5, jnp.arcsin(sines), jnp.arccos(cosines))
    return jnp.where(places < jnp.minimum(rank_a, rank_b)[..., None], angles, jnp.nan)


@checked
def stable_rank(values: Float[Array, "*batch r"]) -> Float[Array, "*batch"]:
    """Stable rank ``sum_i s_i^2 / s_1^2`` of singular values ``[*batch, r]``: in [1, r], NaN for a zero matrix."""
    values = _widened(values)
    return jnp.sum((values / jnp.max(values, axis=-1, keepdims=True)) ** 2, axis=-1)


@checked
def effective_rank(values: Float[Array, "*batch r"]) -> Float[Array, "*batch"]:
    """Effective rank ``exp(-sum_i p_i log p_i)``, ``p = s / sum s``, of singular values ``[*batch, r]``.

    It is in [1, r]: r equal values have r; NaN for a zero matrix. The slope of a value of 0 is infinite: its gradient
    is that of the sum alone. References: Roy and Vetterli 2007, definition 1.
    """
    values = _widened(values)
    values = values / jnp.max(values, axis=-1, keepdims=True)
    shares = values / jnp.sum(values, axis=-1, keepdims=True)
    return jnp.exp(jnp.sum(_entropy(shares), axis=-1))


@checked
def cosine(a: Float[Array, "*batch m n"], b: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    """Alignment of two updates ``[*batch, m, n]``, ``<a, b> / (|a| |b|)`` in the Frobenius product, in [-1, 1].

    NaN where either is zero. Unrelated random matrices have 0 with a standard deviation of ``1 / sqrt(m n)``.
    """
    a, b = (jnp.reshape(x, (*x.shape[:-2], -1)) for x in _same_precision(a, b))
    return jnp.clip(jnp.sum(_unit(a) * _unit(b), axis=-1), -1.0, 1.0)


@checked
def random_energy(
    rank: int | Int[Array, "*batch"], *, dimension: int
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Mean and standard deviation of ``|P x|^2`` for a uniform unit vector and a projector on ``rank`` dimensions.

    The energy is ``Beta(k / 2, (n - k) / 2)``: mean ``k / n``, variance ``2 k (n - k) / (n^2 (n + 2))``, k = rank in
    ``[0, n]``, n = dimension. The complement has the mean ``1 - k / n`` and the same standard deviation. NaN for a
    traced rank out of range, such as the -1 of a refused value.

    Raises:
        ValueError: rank (unless traced) or dimension out of range.
    """
    rank = _checked(rank, dimension)
    # From the integers: 1 minus a rounded share may fall below 0.
    return rank / dimension, jnp.sqrt(2 * rank * (dimension - rank) / (dimension + 2)) / dimension


@checked
def random_norm(rank: int | Int[Array, "*batch"], *, dimension: int) -> Float[Array, "*batch"]:
    """Mean of ``|P x|`` for a uniform unit vector and a projector on ``rank`` dimensions.

    The mean of a Beta variable's root, ``g(k / 2) / g(n / 2)`` with ``g(a) = Gamma(a + 1/2) / Gamma(a)``: below
    ``sqrt(k / n)``. For the complement give ``dimension - rank``. Arguments, NaN and errors are those of
    :func:`random_energy`; rank 0 gives 0, the whole space 1.
    """
    rank = _checked(rank, dimension)
    return jnp.minimum(_gamma_ratio(rank / 2) / _gamma_ratio(jnp.full_like(rank, dimension / 2)), 1.0)


@checked
def sample_random_energy(
    basis: Float[Array, "*batch n r"], *, key: Key, samples: int, mask: Bool[Array, "*batch r"] | None = None
) -> Float[Array, "*batch samples"]:
    """Energies of uniform random unit vectors in a subspace: :func:`random_energy` by sampling, for its whole spread.

    ``basis`` and ``mask`` are those of :func:`projection_energy`; ``samples`` vectors are drawn for each subspace.

    Raises:
        ValueError: samples below 1.
    """
    samples = whole_number("samples", samples, 1)
    basis = _widened(basis)
    vectors = jax.random.normal(key, (*basis.shape[:-2], samples, basis.shape[-2]), basis.dtype)
    return projection_energy(vectors, basis, mask=mask)


@jax.custom_jvp
def _entropy(shares: Array) -> Array:
    return jax.scipy.special.entr(shares)


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    # An infinite slope would reach the other values, too, as they have a sum together.
    (shares,), (moved,) = primals, tangents
    some = shares > 0
    return _entropy(shares), jnp.where(some, -jnp.log(jnp.where(some, shares, 1.0)) - 1, 0.0) * moved


def _counted(chosen: Bool[Array, "*batch r"], values: Float[Array, "*batch r"]) -> Int[Array, "*batch"]:
    count = jnp.sum(chosen, axis=-1, dtype=jnp.int32)
    return jnp.where(jnp.any(jnp.isnan(values), axis=-1), -1, count)


def _checked(rank: int | Int[Array, "*batch"], dimension: int) -> Float[Array, "*batch"]:
    """The rank as floats, NaN where it does not fit."""
    dimension = whole_number("dimension", dimension, 1)
    check_between("rank", rank, 0, dimension, what=", the dimension")
    rank = jnp.asarray(rank)
    return jnp.where((rank >= 0) & (rank <= dimension), rank.astype(float), jnp.nan)


def _along(size: int, rank: Array) -> Array:
    """Places ``0 ... size - 1`` on a new last axis of the ranks."""
    return jnp.reshape(jnp.arange(size), (1,) * rank.ndim + (size,))


def _gamma_ratio(a: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``Gamma(a + 1/2) / Gamma(a)``. The difference of two log-gammas has lost half of float32's digits at a = 1000."""
    factor = jnp.ones_like(a)
    for step in range(_SHIFT):
        factor = factor * (a + step) / (a + step + 0.5)
    inverse = 1 / (a + _SHIFT)
    series = 1 - inverse / 8 * (1 - inverse / 16 * (1 + 5 * inverse / 8 * (1 - 21 * inverse / 160)))
    return factor * jnp.sqrt(a + _SHIFT) * series


def _widened(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _same_precision(a: Array, b: Array) -> tuple[Array, Array]:
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return a.astype(dtype), b.astype(dtype)


def _largest_one(values: Array) -> Array:
    """Values over their largest, for squares of small ones underflow; zeros stay zeros."""
    largest = jnp.max(values, axis=-1, keepdims=True)
    return values / jnp.where(largest > 0, largest, 1.0)


def _unit(vectors: Array) -> Array:
    """Vectors over their norm; NaN for zero vectors. Scaled first, for squares of small updates underflow."""
    # The scale is left out of the gradient, to which it adds nothing.
    vectors = vectors / jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _masked(basis: Array, mask: Array | None) -> Array:
    return basis if mask is None else jnp.where(mask[..., None, :], basis, 0.0)


def _dimension(basis: Array, mask: Array | None) -> Array:
    if mask is None:
        return jnp.full(basis.shape[:-2], basis.shape[-1])
    return jnp.sum(mask, axis=-1)
