"""DeRTa against lists of tokens in float64: what every place is asked for, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety.methods import derta
from tests.methods import lists
from tests.methods.bound import bound
from tests.methods.lists import (
    MODEL,
    PARAMS,
    PROMPTS,
    REPLIES,
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
    return bound("derta", MODEL, **options)(PARAMS, batch)[0]


def sft(batch):
    return bound("sft", MODEL)(PARAMS, batch)[0]


def of_transitions(row, *, aligned):
    """At every token of the harmful answer but its end, how the refusal would go on there."""
    reply = REPLIES[row]
    return [
        lists.nll(PROMPTS[row] + reply[:place], turned(row, place, aligned=aligned)[0])
        for place in range(len(reply) - 1)
    ]


def rows(of_unsafe):
    """The mean over all tokens of what unsafe and safe examples have."""
    each = [of_unsafe(row) if unsafe else of_answer(PROMPTS[row], lists.SAFE[row]) for row, unsafe in enumerate(UNSAFE)]
    return np.mean(np.concatenate(each))


@ALIGNED
def test_transitions_match_lists(aligned):
    expected = rows(lambda row: of_transitions(row, aligned=aligned))
    np.testing.assert_allclose(loss(pairs(unsafe=UNSAFE, aligned=aligned), rto=1.0), expected, rtol=RTOL)


@ALIGNED
def test_refusals_behind_prefixes_match_lists(aligned):
    batch = pairs(unsafe=UNSAFE, aligned=aligned)
    found = depths(batch, transformed(derta.METHOD, batch, rto=0.0))

    def refused(row):
        given = PROMPTS[row] + REPLIES[row][: found[row]]
        return of_answer(given, turned(row, found[row], aligned=aligned))

    assert found.max() > 0 and found[~np.asarray(UNSAFE)].max() == 0
    np.testing.assert_allclose(loss(batch, rto=0.0), rows(refused), rtol=RTOL)


@ALIGNED
def test_depths_are_uniform_below_the_tokens_of_the_harmful_answer(aligned):
    batch = repeated(pairs(unsafe=UNSAFE, aligned=aligned), TIMES)
    found = depths(batch, transformed(derta.METHOD, batch, rto=0.0)).reshape(TIMES, -1)
    for row, unsafe in enumerate(UNSAFE):
        most = max(len(REPLIES[row]) - 1, 1) if unsafe else 1
        counts = np.bincount(found[:, row])
        assert len(counts) == most
        # Five standard deviations of a binomial.
        assert np.abs(counts - TIMES / most).max() <= 5 * np.sqrt(TIMES * (1 / most) * (1 - 1 / most))


def test_each_unsafe_example_is_of_one_term_by_the_share():
    batch = repeated(pairs(unsafe=UNSAFE), TIMES)
    found = transformed(derta.METHOD, batch, rto=0.3)
    ends = jax.tree.map(np.asarray, derta.transition(batch.chosen, batch.rejected, aligned=False))
    all_over = (np.asarray(found.chosen.targets) == ends.targets).all(1) & (
        np.asarray(found.chosen.mask) == ends.mask
    ).all(1)
    refusing = transformed(derta.METHOD, batch, rto=0.0)
    rest = (np.asarray(found.chosen.targets) == np.asarray(refusing.chosen.targets)).all(1)
    assert (all_over | rest).all() and not all_over[~np.asarray(batch.unsafe)].any()
    assert abs(all_over[np.asarray(batch.unsafe)].mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / (4 * TIMES))
    few = depths(batch, transformed(derta.METHOD, batch, rto=0.0, prefix=0.25))[np.tile([True, *[False] * 4], TIMES)]
    assert abs((few > 0).mean() - 0.25 * 4 / 5) < 5 * np.sqrt(0.2 * 0.8 / TIMES)


@ALIGNED
def test_without_either_share_and_of_safe_prompts_alone_it_is_sft_bit_for_bit(aligned):
    batch = pairs(unsafe=UNSAFE, aligned=aligned)
    assert loss(batch, prefix=0.0, rto=0.0) == sft(batch) != loss(batch)
    safe = pairs(unsafe=[False] * len(PROMPTS), aligned=aligned)
    assert loss(safe) == loss(safe, rto=1.0) == sft(safe)


@ALIGNED
def test_padding_changes_nothing(aligned):
    both = (pairs(unsafe=UNSAFE, aligned=aligned, length=length) for length in (14, 40))
    short, long = (loss(batch, rto=0.4) for batch in both)
    np.testing.assert_allclose(short, long, rtol=RTOL)


def test_shares_may_be_traced_and_the_ablation_is_one_program():
    batch = pairs(unsafe=UNSAFE)
    grid = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 0.5], [1.0, 0.5]])
    found = jax.jit(jax.vmap(lambda pair: traced("derta", batch, prefix=pair[0], rto=pair[1])))(grid)
    expected = [loss(batch, prefix=float(prefix), rto=float(rto)) for prefix, rto in grid]
    np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_gradients_are_finite_differences():
    batch = pairs(unsafe=UNSAFE)
    value = jax.jit(lambda params: bound("derta", MODEL)(params, batch)[0])
    check_grads(value, (PARAMS,), order=1, modes=("rev",), atol=2e-3, rtol=2e-2, eps=1e-2)


def test_the_refusals_token_is_each_examples_own():
    batch = pairs(unsafe=[True] * len(PROMPTS))
    found = derta.transition(batch.chosen, batch.rejected, aligned=False)
    for row, mask in enumerate(np.asarray(found.mask)):
        assert set(np.asarray(found.targets)[row][mask]) <= {lists.REFUSALS[row][0]}
    placed = pairs(unsafe=[True] * len(PROMPTS), aligned=True)
    found = derta.transition(placed.chosen, placed.rejected, aligned=True)
    for row, mask in enumerate(np.asarray(found.mask)):
        assert np.asarray(found.targets)[row][mask].tolist() == lists.FILLED[row][:-1]


def test_bad_arguments_are_named():
    batch = pairs(unsafe=UNSAFE)
    with pytest.raises(ValueError, match=r"chosen has shape \(5, 14\) and rejected \(5, 15\)"):
        derta.transition(batch.chosen, pairs(unsafe=UNSAFE, length=15).rejected, aligned=False)
    with pytest.raises(ValueError, match=r"rto must be >= 0 and <= 1 and finite, got 1.5"):
        derta.Config(rto=1.5)
