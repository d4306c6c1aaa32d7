"""Directions of contrast, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.linalg import contrasts

# float32 sums over a few tens of numbers of order 1.
ATOL = 1e-5


def differences(seed=0, layers=2, count=7, width=5):
    drawn = np.random.default_rng(seed).normal(size=(layers, count, width)) + np.arange(width)
    return jnp.asarray(drawn, jnp.float32)


def test_the_mean_direction_is_that_of_the_mean():
    found = contrasts.direction(differences(), component="mean")
    mean = np.asarray(differences(), np.float64).mean(axis=1)
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=ATOL)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_component_has_most_of_the_squares_and_goes_with_the_mean(sign):
    given = sign * differences()
    found = contrasts.direction(given, component="first")
    for one, rows in zip(found, np.asarray(given, np.float64), strict=True):
        values, vectors = np.linalg.eigh(rows.T @ rows)
        np.testing.assert_allclose(np.abs(vectors[:, np.argmax(values)] @ one), 1, atol=ATOL)
        assert rows.mean(axis=0) @ one > 0


@pytest.mark.parametrize("component", ["mean", "first"])
def test_no_difference_has_no_direction(component):
    found = contrasts.direction(jnp.zeros((1, 3, 4)), component=component)
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_a_direction_is_projected_out(shape, strength):
    rng = np.random.default_rng(1)
    values, unit = rng.normal(size=shape), rng.normal(size=5)
    unit /= np.linalg.norm(unit)
    projector = np.eye(5) - strength * np.outer(unit, unit)
    found = contrasts.ablated(jnp.float32(values), jnp.float32(unit), strength=jnp.float32(strength))
    np.testing.assert_allclose(found, values @ projector, atol=ATOL)


def test_no_strength_and_no_direction_are_the_values_bit_for_bit():
    values = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5)), jnp.bfloat16)
    unit = jnp.full(5, 5**-0.5)
    np.testing.assert_array_equal(contrasts.ablated(values, unit, strength=jnp.float32(0)), values)
    found = contrasts.ablated(values, jnp.zeros(5))
    np.testing.assert_array_equal(found, values)
    assert found.dtype == jnp.bfloat16
