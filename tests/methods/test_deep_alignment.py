"""Deep alignment against lists of tokens in float64, and what is given away how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety.methods import deep_alignment
from tests.methods.bound import bound
from tests.methods.lists import (
    MODEL,
    PARAMS,
    PROMPTS,
    REPLIES,
    SAFE,
    depths,
    of_answer,
    pairs,
    repeated,
    traced,
    transformed,
    turned,
)

# float32 sums in another order.
RTOL = 2e-6
UNSAFE = [True, False, True, True, True]
ALIGNED = pytest.mark.parametrize("aligned", [False, True])
TIMES = 2000


def loss(batch, **options):
    return bound("deep_alignment", MODEL, **options)(PARAMS, batch)


@ALIGNED
def test_both_terms_match_lists(aligned):
    batch = pairs(unsafe=UNSAFE, aligned=aligned)
    found = depths(batch, transformed(deep_alignment.METHOD, batch, prefix=1.0, depth=3))
    safety, utility = [], []
    for row, unsafe in enumerate(UNSAFE):
        if unsafe:
            given = PROMPTS[row] + REPLIES[row][: found[row]]
            safety += of_answer(given, turned(row, found[row], aligned=aligned))
        else:
            utility += of_answer(PROMPTS[row], SAFE[row])
    value, metrics = loss(batch, prefix=1.0, depth=3, alpha=0.3)
    assert found.max() > 0
    np.testing.assert_allclose(metrics["loss/safety"], 0.3 * np.mean(safety), rtol=RTOL)
    np.testing.assert_allclose(metrics["loss/utility"], 0.7 * np.mean(utility), rtol=RTOL)
    np.testing.assert_allclose(value, 0.3 * np.mean(safety) + 0.7 * np.mean(utility), rtol=RTOL)


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_depths_are_uniform_up_to_the_deepest_and_leave_a_token_to_avert(depth):
    batch = repeated(pairs(unsafe=UNSAFE), TIMES)
    found = depths(batch, transformed(deep_alignment.METHOD, batch, prefix=0.5, depth=depth)).reshape(TIMES, -1)
    for row, unsafe in enumerate(UNSAFE):
        most = max(min(depth, len(REPLIES[row]) - 2), 0) if unsafe else 0
        counts = np.bincount(found[:, row])
        share = np.full(most + 1, 0.5 / max(most, 1))
        share[0] = 0.5 if most else 1.0
        assert len(counts) == most + 1
        # Five standard deviations of a binomial.
        assert (np.abs(counts - TIMES * share) <= 5 * np.sqrt(TIMES * share * (1 - share))).all()


def test_of_one_kind_alone_it_is_sft_by_its_weight():
    for unsafe, weight in ((True, 0.2), (False, 0.8)):
        batch = pairs(unsafe=[unsafe] * len(PROMPTS))
        value, expected = loss(batch, prefix=0.0)[0], bound("sft", MODEL)(PARAMS, batch)[0]
        np.testing.assert_allclose(value, weight * expected, rtol=RTOL)


@ALIGNED
def test_padding_changes_nothing(aligned):
    short, long = (loss(pairs(unsafe=UNSAFE, aligned=aligned, length=length))[0] for length in (14, 40))
    np.testing.assert_allclose(short, long, rtol=RTOL)


def test_the_deepest_may_be_traced():
    batch = pairs(unsafe=UNSAFE)
    found = jax.jit(jax.vmap(lambda depth: traced("deep_alignment", batch, prefix=1.0, depth=depth)))(
        jnp.float32([1, 2, 100])
    )
    expected = [loss(batch, prefix=1.0, depth=depth)[0] for depth in (1, 2, 100)]
    np.testing.assert_allclose(found, expected, rtol=RTOL)
    assert len(set(np.asarray(found).tolist())) > 1


def test_gradients_are_finite_differences():
    batch = pairs(unsafe=UNSAFE)
    value = jax.jit(lambda params: bound("deep_alignment", MODEL)(params, batch)[0])
    check_grads(value, (PARAMS,), order=1, modes=("rev",), atol=2e-3, rtol=2e-2, eps=1e-2)
