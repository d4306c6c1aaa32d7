"""Subspace quantities against plain NumPy float64 by another route (least squares, sampling, log-gammas) and closed
forms."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxsafety import tree
from jaxsafety.linalg import subspace

# float32 sums of some ten terms against float64.
RTOL = 5e-6
# An angle is as accurate as the bases: rounding, whatever its size.
ANGLE_ATOL = 1e-6


# Jitted, which compiles faster than all their operations one by one; the last tests are eager.
def one_program(function, **options):
    compiled = jax.jit(function, **options)
    return lambda *args, **kwargs: jax.device_get(compiled(*args, **kwargs))


projection_energy = one_program(subspace.projection_energy)
complement_energy = one_program(subspace.complement_energy)
principal_angles = one_program(subspace.principal_angles)
stable_rank = one_program(subspace.stable_rank)
effective_rank = one_program(subspace.effective_rank)
cosine = one_program(subspace.cosine)
leading = one_program(subspace.leading, static_argnums=1)


def single(array):
    return np.asarray(array, np.float32)


def padded(values):
    """With zeros to one length, which compiles once."""
    return jnp.asarray(single([*values, *[0.0] * (5 - len(values))]))


def orthonormal(n, r, *, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, r)))[0]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def plain_residual_energy(vectors, columns):
    """What least squares leaves of each vector."""
    solution = np.linalg.lstsq(columns, vectors.T, rcond=None)[0]
    return ((vectors.T - columns @ solution) ** 2).sum(0) / (vectors**2).sum(1)


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        ([3.0, 2.0, 1.0], 9 / 14 - 1e-4, 1),
        ([3.0, 2.0, 1.0], 9 / 14 + 1e-4, 2),
        ([3.0, 2.0, 1.0], 1.0, 3),
        ([3.0, 1.0], 0.9, 1),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2),
        ([2.0, 0.0, 0.0], 1.0, 1),
        ([0.0, 0.0], 0.9, 0),
        # The last square is lost in a float32 sum, and the smallest scale would be lost in squares.
        ([1.0, 1e-5], 1.0, 2),
        ([3e-25, 2e-25, 1e-25], 0.9, 2),
        ([1.0, np.nan], 0.9, -1),
    ],
)
def test_rank_at_energy(values, energy, rank):
    assert subspace.rank_at_energy(padded(values), energy=energy) == rank


def test_rank_at_energy_matches_the_definition():
    values = np.sort(np.abs(draw(5, 4, 12)))[..., ::-1].copy()
    got = jax.device_get(jax.jit(partial(subspace.rank_at_energy, energy=0.9))(single(values)))
    for index in np.ndindex(5, 4):
        squares = values[index] ** 2
        assert got[index] == next(k for k in range(13) if squares[:k].sum() >= 0.9 * squares.sum())
    assert got.dtype == jnp.int32


@pytest.mark.parametrize(
    ("values", "tolerance", "rank"),
    [
        ([4.0, 2.0, 1.0, 0.0], 0.0, 3),
        ([4.0, 2.0, 1.0, 0.0], 0.3, 2),
        ([4.0, 2.0, 1.0, 0.0], 0.5, 1),
        ([0.0, 0.0], 0.1, 0),
        ([1.0, np.nan], 0.1, -1),
    ],
)
def test_rank_at_tolerance(values, tolerance, rank):
    assert subspace.rank_at_tolerance(padded(values), tolerance=tolerance) == rank


def test_leading_masks_the_first_directions():
    mask = leading(np.asarray([[0, 2], [3, -1]]), 3)
    np.testing.assert_array_equal(mask, [[[0, 0, 0], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]])
    np.testing.assert_array_equal(leading(np.asarray(1), 2), [True, False])


def test_energies_match_least_squares():
    columns, vectors = draw(12, 4), draw(6, 12, seed=1)
    basis = single(np.linalg.qr(columns)[0])
    outside = plain_residual_energy(vectors, columns)
    np.testing.assert_allclose(complement_energy(single(vectors), basis), outside, rtol=RTOL)
    np.testing.assert_allclose(projection_energy(single(vectors), basis), 1 - outside, rtol=RTOL)


def test_a_mask_is_the_subspace_of_its_columns():
    basis, vectors = single(np.stack([orthonormal(9, 5), orthonormal(9, 5, seed=1)])), single(draw(2, 3, 9))
    mask = np.asarray([[True, False, True, False, False], [False] * 5])
    for energy, empty in ((projection_energy, 0.0), (complement_energy, 1.0)):
        got = energy(vectors, basis, mask=mask)
        np.testing.assert_allclose(got[0], energy(vectors[0], basis[0][:, [0, 2]]), rtol=RTOL)
        np.testing.assert_allclose(got[1], empty, rtol=RTOL)


def test_a_masked_column_may_be_nan():
    basis = single(orthonormal(6, 3))
    basis[:, 2] = np.nan
    mask = np.asarray([True, True, False])
    for energy in (projection_energy, complement_energy):
        np.testing.assert_array_equal(
            energy(single(draw(2, 6)), basis, mask=mask), energy(single(draw(2, 6)), basis[:, :2])
        )


def test_energies_of_vectors_in_and_across_the_subspace():
    basis = orthonormal(8, 8)
    inside, across = basis[:, :3], basis[:, 3:]
    vectors = single(np.stack([inside @ [1.0, 2.0, -1.0], across @ np.arange(1.0, 6.0), np.zeros(8)]))
    within = projection_energy(vectors, single(inside))
    outside = complement_energy(vectors, single(inside))
    np.testing.assert_allclose(within, [1.0, 0.0, np.nan], atol=RTOL)
    np.testing.assert_allclose(outside, [0.0, 1.0, np.nan], atol=RTOL)
    assert within[0] <= 1.0 and outside[1] <= 1.0


def test_the_complement_sees_shares_that_one_minus_the_projection_cannot():
    basis = orthonormal(30, 6)
    share = 1e-8
    vector = single(basis[:, 0] * np.sqrt(1 - share) + basis[:, 5] * np.sqrt(share))[None]
    # The residual's length is 1e-4, and the vector's rounding 1e-7 of 1.
    np.testing.assert_allclose(complement_energy(vector, single(basis[:, :5])), [share], rtol=5e-3)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_energies_and_cosines_do_not_depend_on_the_scale(factor):
    vectors, basis = single(draw(3, 8)), single(orthonormal(8, 2))
    scaled = vectors * np.float32(factor)
    for energy in (projection_energy, complement_energy):
        np.testing.assert_allclose(energy(scaled, basis), energy(vectors, basis), rtol=RTOL)
    np.testing.assert_allclose(cosine(scaled, vectors), 1.0, rtol=RTOL)


def planes(angles, *, n=9, seed=0):
    """Two bases of float64 with these principal angles, mixed within each."""
    frame, k = orthonormal(n, 2 * len(angles), seed=seed), len(angles)
    a = frame[:, :k] @ orthonormal(k, k, seed=seed + 1)
    b = (frame[:, :k] * np.cos(angles) + frame[:, k:] * np.sin(angles)) @ orthonormal(k, k, seed=seed + 2)
    return a, b


@pytest.mark.parametrize(
    "angles",
    [[0.0, 1e-5, 1e-3], [np.pi / 4 - 1e-4, np.pi / 4, np.pi / 4 + 1e-4], [0.3, 1.2, np.pi / 2], [1.57, np.pi / 2]],
    ids=str,
)
def test_principal_angles_are_those_the_spaces_were_made_with(angles):
    a, b = planes(np.asarray(angles))
    got = principal_angles(single(a), single(b))
    np.testing.assert_allclose(got, angles, atol=ANGLE_ATOL)
    np.testing.assert_allclose(principal_angles(single(b), single(a)), got, atol=ANGLE_ATOL)


@pytest.mark.parametrize(("r", "q", "n"), [(4, 4, 10), (2, 5, 10), (5, 2, 10), (4, 3, 5), (1, 1, 2)])
def test_principal_angles_of_unequal_spaces_match_scipy(r, q, n):
    a, b = orthonormal(n, r, seed=3), orthonormal(n, q, seed=4)
    expected = np.sort(scipy.linalg.subspace_angles(a, b))
    np.testing.assert_allclose(principal_angles(single(a), single(b)), expected, atol=ANGLE_ATOL)


@pytest.mark.parametrize(("r", "q"), [(2, 4), (3, 1), (3, 3), (0, 2)])
def test_masked_angles_are_those_of_the_columns_that_count_and_nan_beyond(r, q):
    a, b = single(orthonormal(10, 4, seed=5)), single(orthonormal(10, 5, seed=6))
    got = principal_angles(a, b, mask_a=np.arange(4) < r, mask_b=np.arange(5) < q)
    count = min(r, q)
    assert got.shape == (4,) and np.isnan(got[count:]).all()
    if count:
        np.testing.assert_allclose(got[:count], principal_angles(a[:, :r], b[:, :q]), atol=ANGLE_ATOL)


def test_mean_squared_cosine_of_random_spaces_is_the_share_of_dimensions():
    a, b = (np.stack([orthonormal(20, 5, seed=seed) for seed in range(s, s + 100)]) for s in (0, 100))
    cosines = np.cos(principal_angles(single(a), single(b)))
    # The standard error of 100 means of 5 is 0.005.
    assert abs((cosines**2).mean() - 5 / 20) < 0.02


def test_stable_and_effective_rank_of_known_spectra():
    spectra = single([[1, 1, 1, 1], [2, 0, 0, 0], [2, 1, 1, 0], [0, 0, 0, 0]])
    entropy = 1.5 * math.log(2)  # of 1/2, 1/4, 1/4
    np.testing.assert_allclose(stable_rank(spectra), [4, 1, 1.5, np.nan], rtol=RTOL)
    np.testing.assert_allclose(effective_rank(spectra), [4, 1, math.exp(entropy), np.nan], rtol=RTOL)
    for rank in (stable_rank, effective_rank):
        np.testing.assert_allclose(rank(spectra * single(1e-25)), rank(spectra), rtol=RTOL)


def test_stable_rank_is_a_quotient_of_norms():
    matrix = draw(7, 5)
    values = np.linalg.svd(matrix, compute_uv=False)
    expected = np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2
    np.testing.assert_allclose(stable_rank(single(values)), expected, rtol=RTOL)


def test_cosine_of_updates():
    a, b = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    expected = [np.trace(x.T @ y) / np.sqrt(np.trace(x.T @ x) * np.trace(y.T @ y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(cosine(single(a), single(b)), expected, rtol=RTOL)
    np.testing.assert_allclose(cosine(single(a), single(-3 * a)), [-1, -1], rtol=RTOL)
    assert np.isnan(cosine(single(a), single(np.zeros((2, 4, 3))))).all()


@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 2), (40, 192), (5, 5)])
def test_random_baselines_match_vectors_drawn_in_numpy(k, n):
    vectors = draw(20_000, n)
    energies = (vectors[:, :k] ** 2).sum(1) / (vectors**2).sum(1)
    mean, std = subspace.random_energy(k, dimension=n)
    noise = 5 * float(std) / np.sqrt(20_000) + RTOL  # five standard errors
    assert abs(energies.mean() - mean) < noise
    assert abs(np.sqrt(energies).mean() - subspace.random_norm(k, dimension=n)) < noise * (k / n + 1e-9) ** -0.5
    np.testing.assert_allclose(energies.std(), std, rtol=0.05, atol=RTOL)


@pytest.mark.parametrize("n", [1, 2, 7, 192, 11008])
def test_random_norm_matches_log_gammas_in_float64(n):
    ranks = np.linspace(1, n, 9).astype(int)

    def log_ratio(a):
        return math.lgamma(a + 0.5) - math.lgamma(a)

    expected = [math.exp(log_ratio(k / 2) - log_ratio(n / 2)) for k in ranks]
    np.testing.assert_allclose(subspace.random_norm(jnp.asarray(ranks), dimension=n), expected, rtol=1e-6)


def test_random_norm_in_closed_form():
    np.testing.assert_allclose(subspace.random_norm(1, dimension=2), 2 / np.pi, rtol=RTOL)
    np.testing.assert_allclose(subspace.random_norm(1, dimension=3), 1 / 2, rtol=RTOL)
    assert subspace.random_norm(0, dimension=9) == 0
    np.testing.assert_allclose(subspace.random_norm(9, dimension=9), 1, rtol=RTOL)


def test_the_baseline_of_a_traced_rank_that_is_undefined_is_nan():
    for baseline in (subspace.random_energy, subspace.random_norm):
        found = jax.jit(partial(baseline, dimension=4))(np.asarray([-1, 2, 5]))
        for leaf in jax.tree.leaves(found):
            np.testing.assert_array_equal(np.isnan(leaf), [True, False, True])


def test_sampled_energies_have_the_moments_of_the_closed_form(key):
    basis = single(np.stack([orthonormal(12, 6, seed=s) for s in range(2)]))
    ranks = np.asarray([2, 5])
    draws = one_program(partial(subspace.sample_random_energy, samples=4000))
    samples = draws(basis, key=key, mask=np.arange(6) < ranks[:, None])
    mean, std = one_program(partial(subspace.random_energy, dimension=12))(ranks)
    assert samples.shape == (2, 4000)
    # Five standard errors.
    np.testing.assert_array_less(np.abs(samples.mean(-1) - mean), 5 * std / np.sqrt(4000))
    np.testing.assert_allclose(samples.std(-1), std, rtol=0.1)


def basis_of(rng):
    return jnp.asarray(single(np.linalg.qr(rng.normal(size=(7, 4)))[0]))


def values_of(rng):
    return jnp.asarray(single(np.sort(rng.uniform(size=5))[::-1]))


def mask_of(rng):
    return jnp.asarray(np.arange(4) < rng.integers(1, 5))


def vectors_of(rng):
    return jnp.asarray(single(rng.normal(size=(3, 7))))


def rank_of(rng):
    return jnp.asarray(rng.integers(0, 8, dtype=np.int32))


def key_of(rng):
    return jax.random.key(int(rng.integers(100)))


CASES = {
    "rank_at_energy": (partial(subspace.rank_at_energy, energy=0.8), (values_of,)),
    "rank_at_tolerance": (partial(subspace.rank_at_tolerance, tolerance=0.4), (values_of,)),
    "leading": (lambda rank: subspace.leading(rank, 6), (rank_of,)),
    "projection_energy": (lambda x, b, m: subspace.projection_energy(x, b, mask=m), (vectors_of, basis_of, mask_of)),
    "complement_energy": (lambda x, b, m: subspace.complement_energy(x, b, mask=m), (vectors_of, basis_of, mask_of)),
    "principal_angles": (
        lambda a, b, m: subspace.principal_angles(a, b, mask_a=m, mask_b=m),
        (basis_of, basis_of, mask_of),
    ),
    "stable_rank": (subspace.stable_rank, (values_of,)),
    "effective_rank": (subspace.effective_rank, (values_of,)),
    "cosine": (subspace.cosine, (vectors_of, vectors_of)),
    "random_energy": (partial(subspace.random_energy, dimension=7), (rank_of,)),
    "random_norm": (partial(subspace.random_norm, dimension=7), (rank_of,)),
    "sample_random_energy": (
        lambda b, k: subspace.sample_random_energy(b, key=k, samples=3),
        (basis_of, key_of),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_jitted_is_eager_and_vmapped_is_looped(name):
    function, draws = CASES[name]
    rngs = [np.random.default_rng(lane) for lane in range(3)]
    lanes = [tuple(draw_from(rng) for draw_from in draws) for rng in rngs]
    vmapped = jax.vmap(function)(*tree.stack(lanes))
    for lane, given in enumerate(lanes):
        expected = function(*given)
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, tree.lane(vmapped, lane), expected)
        if lane == 0:
            jax.tree.map(close, jax.jit(function)(*given), expected)


def test_16_bit_arrays_are_computed_in_float32_and_float64_stays():
    vectors, basis, values = draw(2, 6), orthonormal(6, 3), np.array([2.0, 1.0, 0.5])

    @jax.jit
    def results(x, b, s):
        return [
            subspace.projection_energy(x, b),
            subspace.complement_energy(x, b),
            subspace.principal_angles(b, b),
            subspace.stable_rank(s),
            subspace.effective_rank(s),
            subspace.cosine(x, x),
        ]

    def dtypes(found):
        return {x.dtype for x in found}

    half = results(*(jnp.asarray(array, jnp.bfloat16) for array in (vectors, basis, values)))
    assert dtypes(half) == {jnp.dtype(jnp.float32)}
    with jax.enable_x64(True):
        double = results(*(jnp.asarray(array, jnp.float64) for array in (vectors, basis, values)))
        assert dtypes(double) == {jnp.dtype(jnp.float64)}
        np.testing.assert_allclose(double[1], plain_residual_energy(vectors, basis), rtol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subspace.rank_at_energy(jnp.ones(3), energy=0.0), r"energy: got 0.0, expected a share in \(0, 1\]"),
        (lambda: subspace.rank_at_energy(jnp.ones(3), energy=90.0), "energy: got 90.0"),
        (lambda: subspace.rank_at_tolerance(jnp.ones(3), tolerance=1.0), "tolerance: got 1.0, expected a share"),
        (lambda: subspace.rank_at_tolerance(jnp.ones(3), tolerance=-0.1), "tolerance: got -0.1"),
        (lambda: subspace.random_energy(5, dimension=4), "rank: got 5, expected from 0 to 4, the dimension"),
        (lambda: subspace.random_norm(jnp.asarray([1, -1]), dimension=4), "rank: got -1, expected from 0 to 4"),
        (lambda: subspace.random_energy(0, dimension=0), "dimension: got 0, expected at least 1"),
        (
            lambda: subspace.sample_random_energy(jnp.eye(3), key=jax.random.key(0), samples=0),
            "samples: got 0, expected at least 1",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
