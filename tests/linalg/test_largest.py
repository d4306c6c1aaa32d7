"""The largest entries, against a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.linalg.largest import largest

# One digit: many entries are as large as others.
VALUES = np.round(np.random.default_rng(0).normal(size=(3, 7)), 1).astype(np.float32)
marked = jax.jit(lambda values, count: largest(values, count=count))


@pytest.mark.parametrize("count", [-1, 0, 1, 5, 20, 21, 30])
def test_as_many_are_marked_the_first_of_those_as_large(count):
    expected = np.zeros(VALUES.size, bool)
    expected[np.argsort(-np.abs(VALUES.ravel()), kind="stable")[: max(count, 0)]] = True
    np.testing.assert_array_equal(marked(VALUES, count), expected.reshape(VALUES.shape))


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_entry_is_marked_if_one_is_asked_for(count):
    np.testing.assert_array_equal(marked(jnp.zeros((1, 1)), count), [[count == 1]])


def test_what_is_not_a_number_is_the_largest():
    np.testing.assert_array_equal(marked(jnp.asarray([1.0, jnp.nan, -jnp.inf]), 1), [False, True, False])
