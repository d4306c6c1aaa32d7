"""Greedy decoding, and that teacher-forced exact match of a whole block is its verdict."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import decode, losses
from jaxsafety.models import gpt

WINDOW, START, COUNT, VOCAB = 8, 3, 4, 3


def markov(params, tokens):
    """A causal model that looks at the last token and its position only: a random one is often right by chance."""
    return params["table"][jnp.arange(tokens.shape[1])[None, :], tokens]


@pytest.fixture(scope="module")
def table():
    return {"table": jax.random.normal(jax.random.key(0), (WINDOW, VOCAB, VOCAB))}


def block(rows, starts, count=COUNT):
    """Mask ``[b, t]`` over targets (shifted by one) of the ``count`` tokens from ``starts`` on."""
    place = np.arange(WINDOW - 1)[None, :] + 1
    return jnp.asarray((place >= starts[:, None]) & (place < starts[:, None] + count)).reshape(rows, -1)


def teacher_forced(forward, params, sequence, mask):
    ok = losses.correct(forward(params, sequence[:, :-1]), sequence[:, 1:])
    return np.asarray(losses.exact_match(ok, mask))


def test_the_decoded_block_is_the_target_exactly_where_teacher_forcing_matches(table):
    rng = np.random.default_rng(0)
    rows = 2000
    sequence = jnp.asarray(rng.integers(0, VOCAB, (rows, WINDOW)), jnp.int32)
    starts = np.asarray(rng.integers(1, START + 1, rows))
    decoded = decode.greedy(markov, table, tokens=sequence, start=jnp.asarray(starts, jnp.int32), count=COUNT)
    matches = teacher_forced(markov, table, sequence, block(rows, starts))
    np.testing.assert_array_equal(np.all(decoded == sequence, axis=1), matches)
    # Either verdict occurs: 3^-4 of 2 000 random targets are right by chance.
    assert 5 < matches.sum() < 100


def test_the_same_for_a_gpt_whose_answer_is_the_target_or_differs_in_one_token(tiny_config, tiny_gpt):
    forward = jax.jit(partial(gpt.forward, config=tiny_config))
    prompts = jax.random.randint(jax.random.key(2), (6, WINDOW), 0, tiny_config.vocab_size)
    starts = np.asarray([2, 3, 4, 2, 3, 4])
    answers = decode.greedy(forward, tiny_gpt, tokens=prompts, start=jnp.asarray(starts, jnp.int32), count=COUNT)
    mask = block(6, starts)
    assert teacher_forced(forward, tiny_gpt, answers, mask).all()
    for place in range(COUNT):
        at = (np.arange(6), starts + place)
        other = answers.at[at].set((answers[at] + 1) % tiny_config.vocab_size)
        assert not teacher_forced(forward, tiny_gpt, other, mask).any()


def test_what_stands_after_the_prompt_is_not_looked_at(table):
    tokens = jax.random.randint(jax.random.key(1), (5, WINDOW), 0, VOCAB)
    other = tokens.at[:, START:].set((tokens[:, START:] + 1) % VOCAB)
    start = jnp.full(5, START, jnp.int32)
    count = WINDOW - START
    decoded = [decode.greedy(markov, table, tokens=given, start=start, count=count) for given in (tokens, other)]
    np.testing.assert_array_equal(*decoded)
    np.testing.assert_array_equal(decoded[0][:, :START], tokens[:, :START])


def test_only_the_asked_places_are_written_and_places_beyond_the_window_dropped(table):
    tokens = jnp.full((2, WINDOW), 2, jnp.int32)
    silent = {"table": jnp.zeros((WINDOW, VOCAB, VOCAB)).at[:, :, 0].set(1.0)}
    decoded = decode.greedy(markov, silent, tokens=tokens, start=jnp.asarray([2, 6], jnp.int32), count=3)
    np.testing.assert_array_equal(decoded, [[2, 2, 0, 0, 0, 2, 2, 2], [2, 2, 2, 2, 2, 2, 0, 0]])
