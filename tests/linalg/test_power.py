"""The largest singular value of a Jacobian against the SVD of the whole Jacobian, and what is reported of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.linalg import power

# The value's error is the residual squared over the gap; float32 products add rounding.
RTOL = 1e-5


def f32(values):
    return np.asarray(values, np.float32)


def drawn(*shape, seed=0):
    return f32(np.random.default_rng(seed).normal(size=shape))


def curved(weights, x):
    return jnp.tanh(x @ weights)


def linear(values, *, seed=0):
    """A symmetric linear map with these eigenvalues."""
    frame = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    matrix = f32(frame * np.asarray(values) @ frame.T)
    return lambda x: matrix @ x


def measured(function, point, *, key, compiler=None, **options):
    """Jitted, which compiles faster than all its operations one by one."""
    run = jax.jit(partial(power.largest_singular_value, function, **options), compiler_options=compiler)
    return jax.device_get(run(point, key=key))


def plain_norm(function, point):
    """From the whole Jacobian, in float64."""
    jacobian = np.asarray(jax.jit(jax.jacobian(function))(point), np.float64)
    return np.linalg.norm(jacobian.reshape(-1, point.size), 2)


@pytest.mark.parametrize(("shape", "outputs"), [((5, 4), 6), ((2, 3, 4), 3), ((4,), 1)], ids=str)
def test_it_is_the_norm_of_the_jacobian(shape, outputs, key):
    weights, point = drawn(4, outputs), drawn(*shape, seed=1)
    function = partial(curved, weights)
    found = measured(function, point, key=key)
    np.testing.assert_allclose(found.value, plain_norm(function, point), rtol=RTOL)
    assert found.converged and found.residual <= 1e-3
    assert all(leaf.shape == () for leaf in jax.tree.leaves(found)) and found.iterations.dtype == jnp.int32


def test_a_small_gap_takes_a_few_times_ten_products(key):
    # Plain power iteration needs some four hundred here: the second value is 2 % below the first.
    function = linear(np.r_[1.0, np.linspace(0.98, 0.0, 99)])
    found = measured(function, f32(np.zeros(100)), key=key, iterations=60)
    assert found.converged and found.iterations < 40
    np.testing.assert_allclose(found.value, 1.0, rtol=1e-4)


def test_the_residual_is_that_of_a_true_value_nearby(key):
    values = np.linspace(1, 0.2, 50)
    found = measured(linear(values), f32(np.zeros(50)), key=key, iterations=3)
    squared = float(found.value) ** 2
    assert not found.converged and found.iterations == 3 and found.residual > 1e-3
    assert np.abs(values**2 - squared).min() <= float(found.residual) * squared
    assert found.value < 1.0


def test_a_tighter_tolerance_takes_more_products_and_errs_less(key):
    function = linear(np.linspace(1, 0, 60))
    loose, tight = (measured(function, f32(np.zeros(60)), key=key, iterations=100, tolerance=t) for t in (1e-1, 1e-4))
    assert loose.iterations < tight.iterations and loose.converged and tight.converged
    assert tight.residual < 1e-4 < loose.residual
    assert abs(tight.value - 1) < abs(loose.value - 1)


@pytest.mark.parametrize("function", [lambda x: 0 * x, lambda x: jnp.ones((2, 2)) + 0 * x.sum()])
def test_a_zero_jacobian_has_norm_zero_and_has_converged(function, key):
    found = measured(function, f32(np.ones((3, 2))), key=key)
    assert found.value == 0 and found.residual == 0 and found.converged and found.iterations == 1


def test_a_rank_one_jacobian_needs_one_step(key):
    direction = f32(np.linspace(-1, 2, 30))
    found = measured(lambda x: direction @ x, f32(np.zeros(30)), key=key)
    np.testing.assert_allclose(found.value, np.linalg.norm(direction), rtol=RTOL)
    assert found.converged and found.iterations == 2


def test_an_orthogonal_jacobian_needs_none(key):
    found = measured(linear(np.ones(10)), f32(np.zeros(10)), key=key)
    np.testing.assert_allclose(found.value, 1.0, rtol=RTOL)
    assert found.converged and found.iterations == 1


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 0.5, 0.1],
        *(pytest.param(v, marks=pytest.mark.slow) for v in ([1.0], [1.0, 0.5], np.linspace(1, 0, 20), np.ones(5))),
    ],
)
def test_going_on_after_convergence_stays_there(values, key, as_users):
    # The residual and the last step are rounding by then.
    found = measured(linear(values), f32(np.zeros(len(values))), key=key, compiler=as_users, tolerance=1e-30)
    np.testing.assert_allclose(found.value, 1.0, rtol=RTOL)
    assert found.residual < 1e-5 and found.iterations == (50 if found.residual else 1)


def test_a_jacobian_that_is_not_finite_is_nan_and_has_not_converged(key):
    found = measured(lambda x: x * jnp.nan, f32(np.ones(3)), key=key)
    assert np.isnan(found.value) and not found.converged


def test_jitted_is_eager_and_seeds_vmap_as_a_loop(key):
    keys = jax.random.split(key, 3)
    weights = jax.vmap(lambda k: jax.random.normal(k, (5, 4)))(keys)
    # The lanes finish at different steps; the second at its first.
    weights = weights.at[1].set(0.0)

    def run(w, k):
        return power.largest_singular_value(partial(curved, w), jnp.ones((2, 5)) / 9, key=k, tolerance=1e-4)

    jitted = jax.jit(run)
    looped = [jitted(*given) for given in zip(weights, keys, strict=True)]
    close = partial(np.testing.assert_allclose, rtol=RTOL, atol=1e-4)
    jax.tree.map(close, run(weights[0], keys[0]), looped[0])
    vmapped = jax.jit(jax.vmap(run))(weights, keys)
    assert len(set(np.asarray(vmapped.iterations).tolist())) > 1
    for lane, expected in enumerate(looped):
        jax.tree.map(close, jax.tree.map(lambda leaf, i=lane: leaf[i], vmapped), expected)


def test_bfloat16_points_are_served_and_float64_stays(key):
    function = partial(curved, drawn(4, 3))
    point = drawn(2, 4, seed=1)
    expected = plain_norm(function, point)
    half = measured(lambda x: function(x.astype(jnp.float32)), point.astype(jnp.bfloat16), key=key, tolerance=1e-2)
    assert half.value.dtype == jnp.float32
    np.testing.assert_allclose(half.value, expected, rtol=2e-2)
    with jax.enable_x64(True):
        matrix = np.diag([2.0, 1.0])
        double = measured(lambda x: matrix @ x, np.zeros(2), key=jax.random.key(0), tolerance=1e-10)
        assert double.value.dtype == jnp.float64 and double.converged
        np.testing.assert_allclose(double.value, 2.0, rtol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations: got 0, expected at least 1"),
        ({"tolerance": 0.0}, "tolerance: got 0.0, expected a number greater than 0"),
        ({"tolerance": float("nan")}, "tolerance: got nan"),
    ],
)
def test_options_out_of_range_are_refused(options, message, key):
    with pytest.raises(ValueError, match=message):
        power.largest_singular_value(jnp.sin, jnp.asarray(f32(np.ones(2))), key=key, **options)


def test_what_the_function_closes_over_has_no_gradient_either(key):
    def value(weights):
        return power.largest_singular_value(lambda x: jnp.tanh(weights @ x), jnp.ones(3), key=key).value

    message = "^the largest singular value of a Jacobian has no gradient here: put jax.lax.stop_gradient around what it"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.grad(value), jnp.ones((4, 3)))
