"""Decoding away from a tuned model, against probabilities multiplied in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.attacks import emulated

# float32 logits of order 1, softmax in float64.
ATOL = 1e-6


def softmax(logits):
    values = np.exp(np.asarray(logits, np.float64))
    return values / values.sum(axis=-1, keepdims=True)


def logits(seed, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(2, 3, 5)), jnp.float32)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_it_is_the_base_over_the_aligned_model_whatever_constant_logits_have(alpha):
    base, aligned = logits(0), logits(1)
    found = softmax(emulated._away([aligned + 3.0, base - 2.0], alpha=jnp.float32(alpha)))
    expected = softmax(base) ** (1 + alpha) / softmax(aligned) ** alpha
    np.testing.assert_allclose(found, expected / expected.sum(axis=-1, keepdims=True), atol=ATOL)


def test_several_pairs_multiply_and_one_of_weight_one_is_proxy_tuning():
    target, tuned, reference = logits(0), [logits(1), logits(2)], [logits(3), logits(4)]
    found = softmax(emulated.combined(target, tuned, reference, weights=[1.0, -0.5]))
    parts = [softmax(one) / softmax(other) for one, other in zip(tuned, reference, strict=True)]
    expected = softmax(target) * parts[0] * parts[1] ** -0.5
    np.testing.assert_allclose(found, expected / expected.sum(axis=-1, keepdims=True), atol=ATOL)
    # With what it is tuned from for a target, proxy tuning by the whole of it is the tuned model.
    own = emulated.combined(reference[0], tuned[:1], reference[:1], weights=[1.0])
    np.testing.assert_allclose(softmax(own), softmax(tuned[0]), atol=ATOL)


def test_no_weight_is_the_base_bit_for_bit():
    base = logits(0, scale=40.0)
    np.testing.assert_array_equal(emulated._away([logits(1, scale=40.0), base], alpha=jnp.float32(0)), base)


def test_what_does_not_go_together_is_said(unchecked):
    with pytest.raises(ValueError, match="expected a reference and a weight for each tuned model, got 1 and 2 for 1"):
        emulated.combined(logits(0), [logits(1)], [logits(2)], weights=[1.0, 2.0])
