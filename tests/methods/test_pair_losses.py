"""IPO, robust DPO and SimPO against lists of tokens in float64, and what they are at their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety.methods import dpo, ipo, robust_dpo, simpo
from tests.methods.bound import bound
from tests.methods.lists import (
    MODEL,
    OTHER,
    PARAMS,
    PROMPTS,
    REFERENCE,
    REFUSALS,
    REPLIES,
    SAFE,
    logprob,
    pairs,
    traced,
    unscored,
)

# float32 sums in another order; of gradients, whose terms cancel.
RTOL, ATOL = 5e-6, 1e-6
UNSAFE = [True, False, True, False, True]
BATCH = pairs(unsafe=UNSAFE)
OPTIONS = {"ipo": {"tau": 0.4}, "robust_dpo": {"beta": 0.7, "flipped": 0.2}, "simpo": {"beta": 2.0, "gamma": 0.5}}
NAMES = pytest.mark.parametrize("name", OPTIONS)


def loss(name, params=PARAMS, batch=BATCH, reference=REFERENCE, **options):
    return bound(name, MODEL, reference=reference, **(OPTIONS[name] | options))(params, batch)


def margins(*, mean, reference=OTHER):
    """Of every pair's answers in lists, by side; without a reference their log-probs."""
    found = []
    for sides in zip(PROMPTS, zip(REFUSALS, SAFE, strict=True), REPLIES, UNSAFE, strict=True):
        prompt, (refusal, safe), reply, unsafe = sides
        for answer in (refusal if unsafe else safe, reply):
            moved = logprob(prompt, answer) - (0 if reference is None else logprob(prompt, answer, reference))
            found.append(moved / len(answer) if mean else moved)
    return np.array(found).reshape(-1, 2).T


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ipo_matches_lists(reduction):
    value, metrics = loss("ipo", reduction=reduction)
    chosen, rejected = margins(mean=reduction == "mean")
    np.testing.assert_allclose(value, np.mean((chosen - rejected - 1 / 0.8) ** 2), rtol=RTOL)
    np.testing.assert_allclose(metrics["rewards/margins"], 0.4 * np.mean(chosen - rejected), rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(metrics["rewards/accuracies"], np.mean(chosen > rejected), rtol=RTOL)


def test_ipo_rests_at_its_margin_and_comes_back_from_beyond():
    slope = jax.grad(lambda x: jnp.sum(ipo.ipo(x, jnp.zeros(3), tau=0.25)))
    np.testing.assert_allclose(slope(jnp.asarray([1.0, 2.0, 3.0])), [-2.0, 0.0, 2.0], atol=ATOL)


def test_robust_dpo_matches_lists():
    chosen, rejected = margins(mean=False)
    z = 0.7 * (chosen - rejected)
    expected = (-0.8 * log_sigmoid(z) + 0.2 * log_sigmoid(-z)) / 0.6
    value, metrics = loss("robust_dpo")
    np.testing.assert_allclose(value, expected.mean(), rtol=RTOL)
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.7 * chosen.mean(), rtol=RTOL)


def test_robust_dpo_without_flips_is_dpo_bit_for_bit():
    chosen, rejected = jnp.asarray([1.0, -2.0, 3e4, -3e4]), jnp.asarray([0.5, 4.0, -3e4, 3e4])
    got = robust_dpo.robust_dpo(chosen, rejected, beta=0.3, flipped=0.0)
    np.testing.assert_array_equal(got, dpo.dpo(chosen, rejected, weight_chosen=0.3, weight_rejected=0.3))


def test_robust_dpo_is_on_average_over_flipped_labels_the_loss_of_the_true_ones():
    chosen, rejected = np.array([0.3, -2.0]), np.array([1.0, 0.4])
    with jax.enable_x64(True):
        given = jnp.asarray(chosen), jnp.asarray(rejected)
        found = [robust_dpo.robust_dpo(*sides, beta=0.7, flipped=0.3) for sides in (given, given[::-1])]
    true, turned = map(np.asarray, found)
    expected = -log_sigmoid(0.7 * (chosen - rejected))
    np.testing.assert_allclose(0.7 * true + 0.3 * turned, expected, rtol=1e-12)


def test_simpo_matches_lists_and_asks_no_reference():
    chosen, rejected = margins(mean=True, reference=None)
    value, metrics = loss("simpo", reference=None)
    np.testing.assert_allclose(value, -log_sigmoid(2 * (chosen - rejected) - 0.5).mean(), rtol=RTOL)
    np.testing.assert_allclose(metrics["rewards/rejected"], 2 * rejected.mean(), rtol=RTOL)


def test_simpo_of_answers_as_likely_as_each_other_is_that_of_the_margin():
    same = jnp.asarray([-1.0, -3.0])
    np.testing.assert_allclose(simpo.simpo(same, same, beta=2.0, gamma=0.5), np.logaddexp(0, 0.5), rtol=RTOL)


@NAMES
def test_what_is_not_scored_and_padding_change_nothing(name):
    run = jax.jit(jax.value_and_grad(lambda params, batch: loss(name, params, batch)[0]))
    expected = run(PARAMS, BATCH)
    # A target beyond the vocabulary has no log-probability.
    jax.tree.map(np.testing.assert_array_equal, run(PARAMS, unscored(BATCH)), expected)
    np.testing.assert_allclose(loss(name, batch=pairs(unsafe=UNSAFE, length=40))[0], expected[0], rtol=RTOL)


@NAMES
def test_gradients_are_finite_differences_and_none_is_of_the_reference(name):
    value = jax.jit(lambda params: loss(name, params)[0])
    check_grads(value, (PARAMS,), order=1, modes=("rev",), atol=2e-3, rtol=2e-2, eps=1e-2)
    assert not np.any(jax.grad(lambda reference: loss(name, reference=reference)[0])(REFERENCE)["table"])


@NAMES
def test_hyper_parameters_are_a_lanes_own(name):
    lanes = {field: jnp.asarray([value, 0.5 * value]) for field, value in OPTIONS[name].items()}
    found = jax.jit(jax.vmap(lambda scalars: traced(name, BATCH, reference=REFERENCE, **scalars)))(lanes)
    for lane, factor in enumerate((1.0, 0.5)):
        alone, _ = loss(name, **{field: factor * value for field, value in OPTIONS[name].items()})
        np.testing.assert_allclose(found[lane], alone, rtol=RTOL)


def test_a_reference_of_itself_makes_no_reward():
    for name in ("ipo", "robust_dpo"):
        _, metrics = loss(name, reference=PARAMS)
        assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == metrics["rewards/accuracies"] == 0
