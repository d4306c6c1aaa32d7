"""Decoding away from a tuned model, against probabilities multiplied in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import world
from jaxsafety.attacks import emulated
from jaxsafety.models import gpt
from jaxsafety.subjects import judge
from jaxsafety.types import Decode, Target

# float32 logits of order 1, softmax in float64.
ATOL = 1e-6
# A product of nine such probabilities.
RTOL = 1e-4


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


def test_rates_of_sampled_answers_are_their_probabilities(tiny_config, tiny_gpt, tiny_world, key):
    model, params = gpt.model(tiny_config), tiny_gpt
    trial = world.batch_at(tiny_world, "unsafe", key=key, step=0, batch_size=4)
    target = Target(model, params, jax.tree.map(lambda leaf: 0.5 * leaf, params), trial, stop=0)
    done = emulated.attack(target, emulated.Config(temperature=2.0), point={"alpha": jnp.float32(0.3)}, key=key)
    given = {"decode": done.decode}
    logits = judge.said(model, params, trial.complied.tokens, **given).logits
    found = judge.rates(model, params, logits, trial, **given)
    for name in ("complied", "refused"):
        side = getattr(trial, name)
        aligned, base = (model.apply(one, side.tokens).logits for one in (params, target.base))
        share = softmax((1.3 * np.asarray(base, np.float64) - 0.3 * np.asarray(aligned, np.float64)) / 2)
        each = np.take_along_axis(share, np.asarray(side.targets)[..., None], axis=-1)[..., 0]
        expected = np.where(side.mask, each, 1.0).prod(axis=1)
        np.testing.assert_allclose(found[name], expected, rtol=RTOL)
    np.testing.assert_allclose(sum(found.values()), 1.0, atol=ATOL)


def test_without_a_temperature_the_most_likely_token_is_judged(tiny_config, tiny_gpt, tiny_world, key):
    params = tiny_gpt
    model, trial = gpt.model(tiny_config), world.batch_at(tiny_world, "safe", key=key, step=0, batch_size=4)
    plain = judge.judge(model, params, trial)
    decode = Decode((), lambda logits: logits[0])
    logits = judge.said(model, params, trial.complied.tokens, decode=decode).logits
    found = judge.rates(model, params, logits, trial, decode=decode)
    assert set(found) == set(plain)
    for name, values in plain.items():
        np.testing.assert_array_equal(found[name], values)
