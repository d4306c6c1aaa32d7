"""Best of n: rates of several draws by enumeration in float64, and of a model's answers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import world
from jaxsafety.attacks import best_of_n
from jaxsafety.models import gpt
from jaxsafety.subjects import judge
from jaxsafety.types import Target

# float32 powers of probabilities.
RTOL, ATOL = 1e-5, 1e-6
ONE = {"complied": jnp.asarray([0.0, 0.2, 1.0, 0.35, 1e-8]), "refused": jnp.asarray([1.0, 0.7, 0.0, 0.0, 0.999])}


def enumerated(complied, refused, draws):
    """Sums over all sequences of verdicts."""
    chance, rates = (complied, refused, 1 - complied - refused), np.zeros(3)
    for verdicts in itertools.product(range(3), repeat=draws):
        kind = 0 if 0 in verdicts else 1 if set(verdicts) == {1} else 2
        rates[kind] += np.prod([chance[one] for one in verdicts])
    return rates


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_rates_are_sums_over_what_may_be_drawn(draws):
    found = judge.of_draws(ONE["complied"], ONE["refused"], draws=jnp.int32(draws))
    for i, (p, r) in enumerate(zip(*(np.asarray(one, np.float64) for one in ONE.values()), strict=True)):
        expected = enumerated(p, r, draws)
        for rate, value in zip(("complied", "refused", "other"), expected, strict=True):
            np.testing.assert_allclose(found[rate][i], value, rtol=RTOL, atol=ATOL)
    # What is unlikely is not lost beside 1.
    np.testing.assert_allclose(found["complied"][4], draws * 1e-8, rtol=RTOL)


def test_one_draw_is_as_it_was_bit_for_bit():
    found = judge.of_draws(ONE["complied"], ONE["refused"], draws=jnp.int32(1))
    for name, values in ONE.items():
        np.testing.assert_array_equal(found[name], values)


def test_no_draw_is_refused():
    with pytest.raises(ValueError, match="draws: got 0, expected at least 1"):
        judge.of_draws(ONE["complied"], ONE["refused"], draws=0)


def test_of_a_model_it_is_the_probability_of_its_answer(tiny_config, tiny_gpt, tiny_world, key):
    model, trial = gpt.model(tiny_config), world.batch_at(tiny_world, "unsafe", key=key, step=0, batch_size=3)
    target, config = Target(model, tiny_gpt, tiny_gpt, trial, stop=0), best_of_n.Config(temperature=0.5)
    # The first letter alone, so that it is likely enough to see.
    first = (jnp.cumsum(trial.complied.mask, axis=1) == 1) & trial.complied.mask
    trial = trial.replace(complied=trial.complied.replace(mask=first))

    @jax.jit
    def rates(n):
        done = best_of_n.attack(target, config, point={"n": n}, key=key)
        logits = judge.said(model, tiny_gpt, trial.complied.tokens, decode=done.decode).logits
        return judge.rates(model, tiny_gpt, logits, trial, decode=done.decode), logits

    found, logits = jax.device_get(rates(jnp.int32(8)))
    share = np.exp(logits.astype(np.float64) / 0.5)
    share /= share.sum(axis=-1, keepdims=True)
    p = np.take_along_axis(share, np.asarray(trial.complied.targets)[..., None], axis=-1)[..., 0][np.asarray(first)]
    np.testing.assert_allclose(found["complied"], 1 - (1 - p) ** 8, rtol=1e-4)
    assert (found["complied"] > p).all()
    np.testing.assert_allclose(sum(found.values()), 1, atol=ATOL)
