"""Losses against NumPy float64, closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import losses

# float32 sums of some hundred terms against float64.
RTOL = 1e-5


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 7)) * 3
    targets = rng.integers(0, 7, size=(3, 5))
    mask = rng.random((3, 5)) < 0.6
    mask[0] = True
    mask[2] = False
    return logits, targets, mask


def numpy_logprobs(logits, targets):
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.take_along_axis(log_softmax, targets[..., None], -1)[..., 0]


def test_token_logprobs_match_numpy(case):
    logits, targets, _ = case
    got = losses.token_logprobs(jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.int32))
    np.testing.assert_allclose(got, numpy_logprobs(logits, targets), rtol=RTOL, atol=RTOL)


def test_token_logprobs_of_bfloat16_logits_are_float32():
    got = losses.token_logprobs(jnp.zeros((1, 1, 4), jnp.bfloat16), jnp.zeros((1, 1), jnp.int32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, -np.log(4), rtol=RTOL)


def test_token_logprobs_survive_extreme_logits():
    logits = jnp.asarray([[[1e4, -1e4, 0.0]]])
    got = [losses.token_logprobs(logits, jnp.full((1, 1), i, jnp.int32)).item() for i in range(3)]
    np.testing.assert_allclose(got, [0, -2e4, -1e4])


def test_entropy_matches_numpy(case):
    logits = case[0]
    # Of the definition, with every probability as a quotient.
    weights = np.exp(logits)
    shares = weights / weights.sum(-1, keepdims=True)
    got = losses.entropy(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(got, np.sum(shares * np.log(1 / shares), -1), rtol=RTOL)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([2.0, 2.0, 2.0, 2.0], np.log(4)),
        ([0.0, 0.0, -np.inf, -np.inf], np.log(2)),
        ([1e4, 0.0, -1e4, 0.0], 0.0),
        ([-np.inf] * 4, np.nan),
        ([np.inf, 0.0, 0.0, 0.0], np.nan),
    ],
)
def test_entropy_in_closed_form(logits, expected):
    got, gradient = jax.value_and_grad(losses.entropy)(jnp.asarray(logits))
    np.testing.assert_allclose(got, expected, rtol=RTOL, atol=RTOL)
    # All of these are as even as they can be, or as uneven.
    np.testing.assert_allclose(gradient, np.full(4, 0.0 if np.isfinite(expected) else np.nan), atol=RTOL)


def test_nll_is_the_masked_sum_and_count(case):
    logits, targets, mask = case
    logprobs = numpy_logprobs(logits, targets)
    total, count = losses.nll(jnp.asarray(logprobs, jnp.float32), jnp.asarray(mask))
    np.testing.assert_allclose(total, -logprobs[mask].sum(), rtol=RTOL)
    assert count == mask.sum()


def test_nll_over_microbatches_adds_up(case):
    logits, targets, mask = case
    logprobs = jnp.asarray(numpy_logprobs(logits, targets), jnp.float32)
    parts = [losses.nll(logprobs[i : i + 1], jnp.asarray(mask[i : i + 1])) for i in range(3)]
    whole = losses.nll(logprobs, jnp.asarray(mask))
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=RTOL)


def test_quotient_of_nothing_is_zero():
    assert losses.quotient(jnp.float32(0), jnp.float32(0)) == 0


def test_nan_outside_the_mask_does_not_leak():
    total, count = losses.nll(jnp.asarray([[-1.0, jnp.nan]]), jnp.asarray([[True, False]]))
    assert (total, count) == (1.0, 1.0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sequence_logprobs_match_numpy(case, reduction):
    logits, targets, mask = case
    logprobs = numpy_logprobs(logits, targets)
    got = losses.sequence_logprobs(jnp.asarray(logprobs, jnp.float32), jnp.asarray(mask), reduction=reduction)
    expected = np.where(mask, logprobs, 0).sum(1)
    if reduction == "mean":
        expected = expected / np.maximum(mask.sum(1), 1)
    np.testing.assert_allclose(got, expected, rtol=RTOL)


def test_bounded_logprobs_have_no_gradient_beyond_the_bound():
    def total(logprobs):
        return -losses.bounded(logprobs, bound=jnp.float32(2.0)).sum()

    logprobs = jnp.asarray([[-1.0, -5.0]])
    assert total(logprobs) == 3.0
    np.testing.assert_array_equal(jax.grad(total)(logprobs), [[-1.0, 0.0]])


def test_no_bound_changes_nothing():
    logprobs = jnp.asarray([[-1.0, -500.0]])
    np.testing.assert_array_equal(losses.bounded(logprobs, bound=jnp.float32(jnp.inf)), logprobs)


def test_exact_match_ignores_what_is_not_scored():
    ok = jnp.asarray([[True, False], [False, True], [False, False]])
    mask = jnp.asarray([[True, False], [True, True], [False, False]])
    np.testing.assert_array_equal(losses.exact_match(ok, mask), [True, False, True])
    np.testing.assert_array_equal(losses.token_accuracy(ok, mask), [1.0, 0.5, 0.0])
