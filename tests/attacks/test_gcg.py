"""Greedy coordinate gradient: against every token tried, first choices by hand, and prompts of the world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import world
from jaxsafety.attacks import gcg
from jaxsafety.models import gpt
from jaxsafety.types import Target

# float32 against float64, over a softmax.
RTOL = 1e-5
ROWS, WINDOW, PLACES, WIDTH, WORDS = 3, 7, 2, 4, 6
RNG = np.random.default_rng(1)
TABLE, WEIGHTS = RNG.normal(size=(WORDS, WIDTH)), RNG.normal(size=(WIDTH, WORDS))
TOKENS, TARGETS = RNG.integers(0, WORDS, (2, ROWS, WINDOW))
AT = np.array([1, 2, 3])
MASK = (np.arange(WINDOW)[None] > AT[:, None]) & (np.arange(WINDOW)[None] < WINDOW - PLACES)
ALLOWED = np.arange(WORDS) > 1


def forward(inputs):
    """Logits are of the squares of the sum so far: what one token does depends on the others."""
    return jnp.cumsum(inputs, axis=1) ** 2 @ jnp.float32(WEIGHTS)


def loss(row, inserted):
    """Mean NLL of one row with these tokens inserted, as lists."""
    tokens = [*TOKENS[row, : AT[row]], *inserted, *TOKENS[row, AT[row] :]][:WINDOW]
    logits = np.cumsum(TABLE[tokens], axis=0) ** 2 @ WEIGHTS
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    places = np.flatnonzero(MASK[row])
    return -logprobs[places + len(inserted), TARGETS[row, places]].mean()


def run(count, *, steps=1, top_k=WORDS, candidates=300, max_count=PLACES, key=0):
    arrays = {"table": jnp.float32(TABLE), "allowed": jnp.asarray(ALLOWED), "mask": jnp.asarray(MASK)}
    arrays |= {name: jnp.asarray(one, jnp.int32) for name, one in (("targets", TARGETS), ("at", AT))}
    sizes = {"max_count": max_count, "steps": steps, "top_k": top_k, "candidates": candidates}

    def searched(count, key):
        return gcg.search(forward, jnp.asarray(TOKENS, jnp.int32), count=count, key=key, **arrays, **sizes)

    return jax.device_get(jax.jit(searched)(jnp.int32(count), jax.random.key(key)))


def test_one_step_with_every_exchange_finds_the_best_token():
    found, start = run(1), run(1, steps=0)
    for row in range(ROWS):
        every = {token: loss(row, [token]) for token in np.flatnonzero(ALLOWED)}
        assert found.tokens[row, 0] == min(every, key=every.get)
        np.testing.assert_allclose(found.loss[1, row], min(every.values()), rtol=RTOL)
        np.testing.assert_allclose(found.loss[0, row], every[start.tokens[row, 0]], rtol=RTOL)


def test_the_first_choice_is_the_token_that_the_gradient_promises_most():
    found, start = run(1, top_k=1, candidates=1), run(1, steps=0)
    for row in range(ROWS):
        first = start.tokens[row, 0]
        tokens = [*TOKENS[row, : AT[row]], first, *TOKENS[row, AT[row] :]][:WINDOW]
        hidden = np.cumsum(TABLE[tokens], axis=0)
        logits = hidden**2 @ WEIGHTS
        share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        places, slope = np.flatnonzero(MASK[row]), np.zeros(WIDTH)
        for place in places:
            apart = share[place + 1] - np.eye(WORDS)[TARGETS[row, place]]
            slope += 2 * hidden[place + 1] * (WEIGHTS @ apart) / len(places)
        promised = min(np.flatnonzero(ALLOWED), key=lambda token, slope=slope: slope @ TABLE[token])
        better = loss(row, [promised]) < loss(row, [first])
        assert found.tokens[row, 0] == (promised if better else first)


def test_the_loss_is_that_of_what_was_found_and_never_rises():
    found = run(2, steps=6, top_k=3, candidates=4)
    assert (np.diff(found.loss, axis=0) <= 0).all() and (found.loss[-1] < found.loss[0]).any()
    for row in range(ROWS):
        np.testing.assert_allclose(found.loss[-1, row], loss(row, found.tokens[row]), rtol=RTOL)
    assert ALLOWED[found.tokens].all()


def test_places_from_the_count_on_stay_and_none_is_the_prompt_alone():
    start, one, none = run(2, steps=0), run(1, steps=3), run(0, steps=3)
    np.testing.assert_array_equal(one.tokens[:, 1], start.tokens[:, 1])
    np.testing.assert_array_equal(none.tokens, start.tokens)
    expected = [loss(row, []) for row in range(ROWS)]
    np.testing.assert_allclose(none.loss, np.tile(expected, (4, 1)), rtol=RTOL)


@pytest.mark.parametrize(("given", "message"), [({"top_k": 7}, "top_k: got 7, expected from 1 to 6"),
                                                ({"candidates": 0}, "candidates: got 0")])  # fmt: skip
def test_bad_numbers_are_one_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        run(1, **given)


@pytest.mark.slow
def test_words_are_what_prompts_hold_apart_from_their_form(tiny_world, key):
    trials = jax.vmap(lambda k: world.batch_at(tiny_world, "safe", key=k, step=0, batch_size=16))(
        jax.random.split(key, 2)
    )
    found = np.flatnonzero(gcg.words(trials, size=tiny_world.vocab_size))
    assert not set(found) & set(tiny_world.special.values())
    assert {tiny_world.ids[letter] for letter in tiny_world.spec.letters} <= set(found)


@pytest.mark.slow
def test_an_attack_inserts_words_before_the_last_token_of_the_prompt(tiny_config, tiny_gpt, tiny_world, key):
    model, trial = gpt.model(tiny_config), world.batch_at(tiny_world, "unsafe", key=key, step=0, batch_size=2)
    pair = [world.batch_at(tiny_world, name, key=key, step=1, batch_size=4) for name in ("safe", "unsafe")]
    target = Target(model, tiny_gpt, tiny_gpt, trial, tiny_world.special["stop"], jax.tree.map(
        lambda *sides: jnp.stack(sides), *pair))  # fmt: skip
    config = gcg.Config(steps=4, candidates=4, count=(0, 2), tokens="words")
    done = jax.device_get(
        jax.jit(lambda count: gcg.attack(target, config, point={"count": count}, key=key)._asdict())(jnp.int32(2))
    )
    changed, plain = done["trial"], jax.device_get(trial)
    np.testing.assert_array_equal(changed.last, plain.last + 2)
    for row, last in enumerate(plain.last):
        for side in ("complied", "refused"):
            before, after = getattr(plain, side).tokens[row], getattr(changed, side).tokens[row]
            np.testing.assert_array_equal(after[:last], before[:last])
            np.testing.assert_array_equal(after[last + 2 :], before[last:-2])
        inserted = changed.complied.tokens[row, last : last + 2]
        np.testing.assert_array_equal(changed.refused.tokens[row, last : last + 2], inserted)
        assert not set(inserted) & set(tiny_world.special.values())
    assert set(done["metrics"]) == {f"loss_{step}" for step in range(5)}
    assert (done["metrics"]["loss_4"] <= done["metrics"]["loss_0"]).all()
