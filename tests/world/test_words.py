"""Draws from words, against exact arithmetic on integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys
from jaxsafety.world import words

EDGES = np.array([0, 1, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
DRAWN = np.concatenate([EDGES, np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)])


@pytest.mark.parametrize("bound", [1, 2, 3, 1000, 2**16 - 1])
def test_numbers_below_a_bound_are_the_high_word_of_the_product(bound):
    found = np.asarray(jax.jit(words.below)(DRAWN, jnp.int32(bound)))
    np.testing.assert_array_equal(found, [int(word) * bound >> 32 for word in DRAWN])


def test_uniform_numbers_are_multiples_below_one():
    found = np.asarray(words.uniform(jnp.asarray(DRAWN)), np.float64)
    np.testing.assert_array_equal(found, (DRAWN >> 9) / 2**23)
    assert found.min() == 0 and found.max() < 1


def test_certain_coins_are_certain():
    assert not np.any(words.chance(jnp.asarray(DRAWN), 0.0)) and np.all(words.chance(jnp.asarray(DRAWN), 1.0))
    np.testing.assert_array_equal(words.chance(jnp.asarray(DRAWN), 0.5), DRAWN < 2**31)


@pytest.mark.parametrize(
    "weights", [(0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1), (0.1, 0.2, 0.3, 0.4), (0.3, 0.7, 0, 0), (0, 0.25, 0.75, 0)]
)
def test_a_choice_is_the_interval_of_its_share(weights):
    shares = np.asarray(weights, np.float32)
    found = np.asarray(jax.jit(jax.vmap(words.choice, in_axes=(0, None)))(DRAWN, shares))
    ends = np.cumsum(shares, dtype=np.float64) / np.sum(shares, dtype=np.float64)
    expected = np.searchsorted(ends, (DRAWN >> 9) / 2**23, side="right")
    clear = np.abs(ends[None] - ((DRAWN >> 9) / 2**23)[:, None]).min(axis=1) > 1e-6
    np.testing.assert_array_equal(found[clear], expected[clear])
    assert not np.any(shares[found] == 0)


def test_words_are_those_of_the_key():
    drawn = words.draw(keys.root(0), count=4)
    assert drawn.dtype == jnp.uint32 and len(set(drawn.tolist())) == 4
    np.testing.assert_array_equal(drawn, words.draw(keys.root(0), count=4))
    assert not np.any(drawn == words.draw(keys.root(1), count=4))
