"""Decompositions against matrices made from known triplets, NumPy float64 and closed forms. Directions are compared as
projectors: signs, and bases of repeated values, are arbitrary.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.linalg import svd

WIDE = (8, 20)
METHODS = ("full", "gram", "randomized")
SHAPES = [WIDE, (2, 3, 7, 5), (1, 6)]
STACK = (3, 3, 8, 5)

# Rounding of a float32 decomposition of some ten rows, relative to the largest value.
RTOL = 2e-6
# Directions err by rounding over the relative gap of their values (0.1 here), the Gram matrix's by its condition more.
PROJECTOR_ATOL = 2e-4
# The same in float64.
RTOL_64 = 1e-13


def orthonormal(n, r, *, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, r)))[0]


def made(shape, values, *, seed=0):
    """A float64 matrix with these values, and its directions."""
    inputs, outputs = (orthonormal(side, len(values), seed=2 * seed + i) for i, side in enumerate(shape))
    return inputs * np.asarray(values) @ outputs.T, inputs, outputs


def single(array):
    return np.asarray(array, np.float32)


@cache
def jitted(method, options):
    key = jax.random.key(7) if method == "randomized" else None
    return jax.jit(partial(svd.decompose, method=method, key=key, **dict(options)))


def decompose(matrices, *, method, **options):
    """Jitted, which compiles faster than all its operations one by one; most tests share the shape that is compiled."""
    return jax.device_get(jitted(method, tuple(options.items()))(matrices))


def projector(basis):
    basis = np.asarray(basis, np.float64)
    return basis @ basis.swapaxes(-1, -2)


def comparable(found):
    """What two decompositions of one matrix share."""
    return found.values, found.errors, found.inputs @ found.inputs.mT, found.outputs @ found.outputs.mT


def plain_errors(matrices, found):
    """The definition, in float64."""
    a, u, s, v = (np.asarray(x, np.float64) for x in (matrices, found.inputs, found.values, found.outputs))
    left = np.linalg.norm(a.swapaxes(-1, -2) @ u - s[..., None, :] * v, axis=-2)
    right = np.linalg.norm(a @ v - s[..., None, :] * u, axis=-2)
    return np.maximum(left, right)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_match_numpy_and_triplets_rebuild_the_matrix(method, shape):
    size = min(shape[-2:])
    # Well conditioned, so that every method serves all triplets.
    noise = np.random.default_rng(1).normal(size=shape)
    matrices = single(noise / 30 + np.eye(*shape[-2:]) * np.linspace(1, 0.5, shape[-1]))
    found = decompose(matrices, method=method)
    assert found.inputs.shape == (*shape[:-1], size) and found.outputs.shape == (*shape[:-2], shape[-1], size)
    expected = np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)
    scale = expected[..., :1]
    np.testing.assert_allclose(found.values / scale, expected / scale, atol=RTOL)
    rebuilt = (found.inputs * found.values[..., None, :]) @ found.outputs.mT
    np.testing.assert_allclose(rebuilt, matrices, atol=10 * RTOL)
    for basis in (found.inputs, found.outputs):
        np.testing.assert_allclose(
            basis.mT @ basis, np.broadcast_to(np.eye(size), (*shape[:-2], size, size)), atol=3e-5
        )


@pytest.mark.parametrize("shape", [WIDE, WIDE[::-1]], ids=str)
def test_leading_directions_are_those_the_matrix_was_made_of(method, shape):
    matrix, inputs, outputs = made(shape, np.linspace(1, 0.1, 8))
    found = decompose(single(matrix), method=method)
    np.testing.assert_allclose(found.values, np.linspace(1, 0.1, 8), rtol=5 * RTOL)
    np.testing.assert_allclose(projector(found.inputs[:, :3]), projector(inputs[:, :3]), atol=PROJECTOR_ATOL)
    np.testing.assert_allclose(projector(found.outputs[:, :3]), projector(outputs[:, :3]), atol=PROJECTOR_ATOL)


def test_inputs_span_what_the_weight_reads_and_outputs_what_it_writes(method):
    read, written = np.eye(WIDE[0])[1], np.eye(WIDE[1])[4]
    found = decompose(single(3 * np.outer(read, written)), method=method)
    np.testing.assert_allclose(projector(found.inputs[:, :1]), np.outer(read, read), atol=RTOL)
    np.testing.assert_allclose(projector(found.outputs[:, :1]), np.outer(written, written), atol=RTOL)
    np.testing.assert_allclose(found.values[0], 3.0, rtol=RTOL)


@pytest.mark.parametrize("shape", [WIDE, (8, 8)], ids=str)
def test_a_zero_matrix_has_zero_values_without_error(method, shape):
    found = decompose(np.zeros(shape, np.float32), method=method)
    assert not found.values.any() and not found.errors.any()
    if method != "randomized":
        short = found.inputs if shape[-2] < shape[-1] else found.outputs
        np.testing.assert_allclose(short.T @ short, np.eye(8), atol=RTOL)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_a_rank_one_matrix_has_one_value(method):
    matrix, inputs, outputs = made(WIDE, [2.0])
    found = decompose(single(matrix), method=method)
    np.testing.assert_allclose(found.values[0], 2.0, rtol=RTOL)
    assert np.all(found.values[1:] < 2 * RTOL) and np.all(found.errors < 4 * RTOL)
    np.testing.assert_allclose(projector(found.inputs[:, :1]), projector(inputs), atol=4 * RTOL)
    np.testing.assert_allclose(projector(found.outputs[:, :1]), projector(outputs), atol=4 * RTOL)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_matrices_of_any_size_have_the_values_of_their_unit(method, size):
    matrix, _, _ = made(WIDE, [2.0, 1.0, 0.5])
    found = decompose(single(size * matrix), method=method)
    np.testing.assert_allclose(found.values[:3] / size, [2.0, 1.0, 0.5], rtol=4 * RTOL)


def test_gram_sets_values_at_rounding_level_to_zero_with_zero_directions_on_the_long_side():
    matrix, _, _ = made(WIDE[::-1], [2.0, 1.0])
    found = decompose(single(matrix), method="gram")
    assert not found.values[2:].any() and not found.inputs[:, 2:].any()
    np.testing.assert_allclose(found.outputs.T @ found.outputs, np.eye(8), atol=RTOL)
    # The reported error of a zero is what it leaves out: |A v|.
    left_out = np.linalg.norm(
        np.asarray(single(matrix), np.float64) @ np.asarray(found.outputs[:, 2:], np.float64), axis=0
    )
    np.testing.assert_allclose(found.errors[2:], left_out, atol=RTOL)


def test_a_repeated_value_has_the_right_space(method):
    matrix, inputs, outputs = made(WIDE, [2.0, 2.0, 2.0, 0.5, 0.5])
    found = decompose(single(matrix), method=method)
    np.testing.assert_allclose(found.values[:5], [2.0, 2.0, 2.0, 0.5, 0.5], rtol=2 * RTOL)
    for space in (slice(0, 3), slice(3, 5)):
        np.testing.assert_allclose(projector(found.inputs[:, space]), projector(inputs[:, space]), atol=1e-5)
        np.testing.assert_allclose(projector(found.outputs[:, space]), projector(outputs[:, space]), atol=1e-5)


def test_an_orthogonal_matrix_has_ones(method):
    found = decompose(single(orthonormal(8, 8, seed=3)), method=method)
    np.testing.assert_allclose(found.values, np.ones(8), rtol=RTOL)
    np.testing.assert_allclose(projector(found.inputs), np.eye(8), atol=1e-5)


def test_errors_are_the_residuals_of_the_triplets(method):
    matrix = single(np.random.default_rng(4).normal(size=STACK))
    found = decompose(matrix, method=method, rank=2, **({"oversample": 0} if method == "randomized" else {}))
    scale = float(found.values.max())
    np.testing.assert_allclose(found.errors / scale, plain_errors(matrix, found) / scale, atol=2 * RTOL, rtol=1e-3)


def test_errors_bound_the_distance_to_a_true_value_even_of_a_poor_method():
    matrix, _, _ = made((40, 30), np.linspace(1, 0.5, 30))
    found = decompose(single(matrix), method="randomized", rank=5, oversample=0, power_iterations=0)
    distance = np.abs(np.asarray(found.values)[:, None] - np.linspace(1, 0.5, 30)).min(axis=1)
    assert np.all(found.errors > 1e-2), "five random dimensions of a flat spectrum cannot be accurate"
    assert np.all(distance <= found.errors)


def test_power_iterations_sharpen_the_random_subspace():
    values = 0.9 ** np.arange(8)
    matrix = single(made(WIDE, values)[0])
    coarse, refined = (
        decompose(matrix, method="randomized", rank=2, oversample=1, power_iterations=power) for power in (0, 8)
    )
    assert refined.errors.max() < coarse.errors.max() / 4
    # As wide as the matrix, the subspace is everything.
    np.testing.assert_allclose(decompose(matrix, method="randomized").values, values, rtol=RTOL)


@pytest.mark.parametrize("condition", [1e2, 1e30])
def test_the_random_subspace_is_orthonormal_whatever_the_condition(condition):
    values = np.geomspace(1, 1 / condition, 20)
    found = decompose(single(made((50, 20), values)[0]), method="randomized", rank=12, oversample=2)
    # Where rounding hides a value its direction is any, or zero; the others are orthonormal to rounding.
    seen = values[:12] > 1e-5
    for basis in (found.inputs[:, seen], found.outputs[:, seen]):
        np.testing.assert_allclose(basis.T @ basis, np.eye(seen.sum()), atol=5 * RTOL)
    # A fraction of the error estimates allows for their own rounding; far down the values are rounding too.
    np.testing.assert_array_less(np.abs(found.values - values[:12]), found.errors + RTOL)


# Beyond 32 triplets the subspace is several blocks: here two of 33, of which the second one may find nothing new.
BLOCKS = {"rank": 36, "oversample": 30, "power_iterations": 1}


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (50, 60)], ids=str)
def test_blocks_are_orthonormal_and_tell_what_they_miss(shape):
    """The last shape has fewer dimensions than the two blocks."""
    values = np.arange(1, min(shape) + 1) ** -1.0
    matrix = single(made(shape, values)[0])
    found = decompose(matrix, method="randomized", **BLOCKS)
    for basis in (found.inputs, found.outputs):
        np.testing.assert_allclose(basis.T @ basis, np.eye(36), atol=5 * RTOL)
    np.testing.assert_allclose(found.errors, plain_errors(matrix, found), atol=2 * RTOL, rtol=1e-3)
    np.testing.assert_allclose(found.values[:8], values[:8], rtol=5 * RTOL)


def test_what_a_matrix_of_few_dimensions_lacks_is_rounding():
    matrix, inputs, outputs = made((90, 70), [3.0, 2.0, 2.0, 1.0])
    found = decompose(single(matrix), method="randomized", **BLOCKS)
    np.testing.assert_allclose(found.values[:4], [3.0, 2.0, 2.0, 1.0], rtol=5 * RTOL)
    assert np.all(found.values[4:] < 4 * RTOL) and np.all(found.errors < 4 * RTOL)
    np.testing.assert_allclose(projector(found.inputs[:, :4]), projector(inputs), atol=20 * RTOL)
    np.testing.assert_allclose(projector(found.outputs[:, :4]), projector(outputs), atol=20 * RTOL)


def test_a_value_is_found_as_often_as_a_block_is_wide():
    matrix, _, _ = made((90, 70), [1.0] * 30 + [0.1] * 40)
    found = decompose(single(matrix), method="randomized", **BLOCKS)
    np.testing.assert_allclose(found.values, [1.0] * 30 + [0.1] * 6, rtol=10 * RTOL)


def test_matrices_of_a_stack_draw_their_own_subspaces():
    matrix = single(np.random.default_rng(5).normal(size=(20, 20)))
    found = decompose(np.stack([matrix, matrix]), method="randomized", rank=2, oversample=0, power_iterations=0)
    assert np.abs(found.values[0] - found.values[1]).max() > 1e-2


@pytest.mark.parametrize("condition", [10.0, 80.0])
def test_gram_serves_the_conditions_it_resolves(condition):
    values = np.geomspace(1, 1 / condition, 6)
    matrix, inputs, _ = made((30, 6), values)
    found = decompose(single(matrix), method="gram")
    np.testing.assert_allclose(found.values, values, rtol=svd.GRAM_ERROR)
    np.testing.assert_allclose(projector(found.inputs), projector(inputs), atol=3 * svd.GRAM_ERROR)


def test_gram_falls_back_with_a_warning_that_names_the_condition():
    well, ill = (made((12, 6), np.geomspace(1, 1 / condition, 6))[0] for condition in (10.0, 2e3))
    matrices = jnp.asarray(single(np.stack([well, ill])))
    with pytest.warns(RuntimeWarning, match=r"up to 92 in float32, these matrices have 2\.0e\+03 within the first 6"):
        found = svd.decompose(matrices, method="gram")
    jax.tree.map(np.testing.assert_array_equal, found, svd.decompose(matrices, method="full"))


def test_gram_needs_no_fallback_where_the_wanted_triplets_are_resolved():
    values = np.geomspace(1, 1e-5, 6)
    found = svd.decompose(jnp.asarray(single(made((12, 6), values)[0])), method="gram", rank=2)
    np.testing.assert_allclose(found.values, values[:2], rtol=RTOL)


def test_traced_gram_refuses_what_it_cannot_resolve():
    values = np.array([1.0, 0.5, 0.02, 5e-3, 1e-3])
    found = decompose(single(made((5, 12), values)[0]), method="gram")
    refused = values < svd.gram_limit(jnp.float32)
    assert refused.sum() == 2
    for leaf in (found.values, found.errors):
        np.testing.assert_array_equal(np.isnan(leaf), refused)
    for leaf in (found.inputs, found.outputs):
        np.testing.assert_array_equal(np.isnan(leaf), np.broadcast_to(refused, leaf.shape))
    np.testing.assert_allclose(found.values[:3], values[:3], rtol=svd.GRAM_ERROR)


def test_chunks_change_nothing(method):
    matrices = single(np.random.default_rng(6).normal(size=STACK))
    # 9 matrices: two chunks and one over. Trailing Gram values of random ones may be refused; the leading are not.
    whole, parts = (decompose(matrices, method=method, rank=2, **chunk) for chunk in ({}, {"chunk": 4}))
    assert whole.inputs.shape == parts.inputs.shape
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-5), comparable(whole), comparable(parts))


@pytest.mark.slow
def test_jitted_is_eager_and_seeds_vmap_as_a_loop(method):
    matrices = jnp.asarray(single(np.random.default_rng(8).normal(size=(3, 2, 9, 6))))
    keys = jax.random.split(jax.random.key(1), 3)

    def run(stack, key):
        return comparable(svd.decompose(stack, method=method, rank=2, key=key))

    jitted = jax.jit(run)
    looped = [jitted(*given) for given in zip(matrices, keys, strict=True)]
    vmapped = jax.jit(jax.vmap(run))(matrices, keys)
    close = partial(np.testing.assert_allclose, rtol=0, atol=5e-5)
    jax.tree.map(close, run(matrices[0], keys[0]), looped[0])
    for lane, expected in enumerate(looped):
        jax.tree.map(close, jax.tree.map(lambda leaf, i=lane: leaf[i], vmapped), expected)


def test_a_tiny_update_is_resolved_like_a_large_one(method):
    matrix = single(made(WIDE, np.linspace(1, 0.3, 8))[0])
    large, tiny = (decompose(matrix * factor, method=method) for factor in (1.0, 2.0**-100))
    np.testing.assert_array_equal(tiny.values, large.values * 2.0**-100)
    np.testing.assert_array_equal(tiny.errors, large.errors * 2.0**-100)
    np.testing.assert_array_equal(tiny.inputs, large.inputs)


def test_16_bit_matrices_are_decomposed_in_float32(method):
    dtype = jnp.float16 if method == "gram" else jnp.bfloat16
    matrix = single(np.random.default_rng(9).normal(size=WIDE)).astype(dtype)
    found = decompose(matrix, method=method)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, found, decompose(single(matrix), method=method))


def test_float64_stays_float64(method):
    values = np.geomspace(1, 1e-5, 6)
    matrix, inputs, _ = made((14, 6), values)
    with jax.enable_x64(True):
        found = decompose(matrix, method=method)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float64)}
        # The Gram matrix loses the condition number once more than the others.
        np.testing.assert_allclose(found.values / values, np.ones(6), rtol=1e-7 if method == "gram" else 1e-9)
        np.testing.assert_allclose(found.values, values, atol=RTOL_64)
        np.testing.assert_allclose(projector(found.inputs[:, :3]), projector(inputs[:, :3]), atol=1e-7)


def test_the_limit_squared_is_the_rounding_over_the_error_allowed():
    assert svd.gram_limit(jnp.float32) == pytest.approx(1 / 92, rel=0.01)
    assert svd.gram_limit(jnp.float64) == pytest.approx(4.7e-7, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: got 0, expected from 1 to 4, the smaller side"),
        ({"rank": 5}, "rank: got 5, expected from 1 to 4"),
        ({"chunk": 0}, "chunk: got 0, expected at least 1"),
        ({"method": "randomized"}, "method 'randomized' got no key"),
        ({"oversample": -1}, "oversample: got -1, expected at least 0"),
        ({"power_iterations": -1}, "power_iterations: got -1, expected at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        svd.decompose(jnp.asarray(np.ones((6, 4))), **options)


def test_an_unknown_method_is_refused_with_the_nearest(unchecked):
    with pytest.raises(ValueError, match=r"unknown method 'randomised'.*did you mean 'randomized'"):
        svd.decompose(jnp.asarray(np.ones((6, 4))), method="randomised")


def test_a_vector_is_no_matrix(unchecked):
    with pytest.raises(ValueError, match=r"decompose: matrices is float32\[4\], expected Float\[\*batch m n\]"):
        svd.decompose(jnp.asarray(np.ones(4)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="matrices holds values that are not finite"):
        svd.decompose(jnp.asarray([[1.0, bad], [1.0, 1.0]]))


def test_traced_values_that_are_not_finite_give_nan_in_their_lane_only(method):
    matrices = single(np.random.default_rng(10).normal(size=STACK))
    matrices[0, 0, 1, 2] = np.nan
    values = decompose(matrices, method=method, rank=2).values.reshape(9, 2)
    assert np.isnan(values[0]).all() and np.isfinite(values[1:]).all()
