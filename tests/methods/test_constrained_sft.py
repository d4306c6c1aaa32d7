"""Constrained fine-tuning against NumPy in float64, and what it is at its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety.methods import constrained_sft
from tests.methods.bound import bound
from tests.methods.lists import MODEL, OTHER, PARAMS, PROMPTS, REFERENCE, SAFE, nll, pairs

# float32 sums in another order; of gradients, whose terms cancel.
RTOL, ATOL = 5e-6, 1e-6
BATCH = pairs(unsafe=[False] * len(PROMPTS)).replace(rejected=None)


def loss(params, batch=BATCH, reference=REFERENCE, **options):
    return bound("constrained_sft", MODEL, reference=reference, **options)(params, batch)[0]


def test_tokens_match_numpy_and_stay_finite_far_out():
    margins, betas = np.array([[0.3, -2.0, 3e4, -3e4]]), np.array([[0.5, 2.0, 2.0, 0.1]])
    got = constrained_sft.constrained_sft(*map(jnp.float32, (margins, betas)))
    np.testing.assert_allclose(got, 2 / betas * np.logaddexp(0, -betas * margins), rtol=RTOL)


def test_the_loss_matches_lists():
    values = []
    for prompt, answer in zip(PROMPTS, SAFE, strict=True):
        for i, token in enumerate(answer):
            margin = nll(prompt + answer[:i], token, OTHER) - nll(prompt + answer[:i], token)
            beta = 0.7 if i == 0 else 3.0 if i < 2 else 0.2
            values.append(2 / beta * np.logaddexp(0, -beta * margin))
    got = loss(PARAMS, first=0.7, early=3.0, late=0.2, early_tokens=2)
    np.testing.assert_allclose(got, np.mean(values), rtol=RTOL)


def test_strengths_are_those_of_the_papers_token_numbers():
    mask = jnp.asarray([[0, 0, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]], bool)
    found = np.asarray(constrained_sft.strengths(mask, first=0.5, early=2.0, late=0.1, early_tokens=5))
    np.testing.assert_allclose(found[0, 2:9], [0.5, 2, 2, 2, 2, 0.1, 0.1], rtol=RTOL)
    np.testing.assert_allclose(found[1, :2], [0.5, 2], rtol=RTOL)


@pytest.mark.parametrize("options", [{}, {"first": 1e-3, "early": 1e-3, "late": 1e-3}])
def test_at_the_reference_or_with_small_betas_its_gradient_is_that_of_sft(options):
    reference = REFERENCE if options else PARAMS
    got = jax.grad(lambda params: loss(params, reference=reference, **options))(PARAMS)["table"]
    expected = jax.grad(lambda params: bound("sft", MODEL)(params, BATCH)[0])(PARAMS)["table"]
    # To first order in beta x margin, at most some 4e-3.
    np.testing.assert_allclose(got, expected, rtol=RTOL, atol=4e-3 * np.abs(expected).max() if options else ATOL)
    at_reference = constrained_sft.constrained_sft(jnp.zeros((1, 1)), jnp.full((1, 1), 0.5))
    np.testing.assert_allclose(at_reference, 4 * np.log(2), rtol=RTOL)


def test_a_token_that_has_become_likelier_is_pushed_no_further():
    slope = jax.grad(lambda margin: jnp.sum(constrained_sft.constrained_sft(margin, jnp.full((1, 3), 2.0))))
    got = slope(jnp.asarray([[-9.0, 0.0, 9.0]]))
    np.testing.assert_allclose(got, [[-2.0, -1.0, 0.0]], atol=1e-6)


def test_what_is_not_scored_changes_neither_value_nor_gradient():
    """A target beyond the vocabulary has no log-probability."""
    targets = jnp.where(BATCH.chosen.mask, BATCH.chosen.targets, 99)
    other = BATCH.replace(chosen=BATCH.chosen.replace(targets=targets))
    got, expected = (jax.value_and_grad(lambda params, b=batch: loss(params, b))(PARAMS) for batch in (other, BATCH))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_padding_changes_nothing():
    longer = pairs(unsafe=[False] * len(PROMPTS), length=40)
    np.testing.assert_allclose(loss(PARAMS, longer), loss(PARAMS), rtol=RTOL)


def test_gradients_are_finite_differences_and_none_is_of_the_reference():
    check_grads(jax.jit(loss), (PARAMS,), order=1, modes=("rev",), atol=2e-3, rtol=2e-2, eps=1e-2)
    assert not np.any(jax.grad(lambda reference: loss(PARAMS, reference=reference))(REFERENCE)["table"])
