"""Text of a model without a cache, and that teacher-forced exact match of a whole block is its verdict."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import losses
from jaxsafety.models import generation, gpt
from jaxsafety.models.adapter import adapted

WINDOW, START, COUNT, VOCAB = 8, 3, 4, 3


def markov(params, tokens):
    """A causal model that looks at the last token and its position only: a random one is often right by chance."""
    return params["table"][jnp.arange(tokens.shape[1])[None, :], tokens]


MARKOV = adapted(markov, max_tokens=WINDOW)


@pytest.fixture(scope="module")
def table():
    return {"table": jax.random.normal(jax.random.key(0), (WINDOW, VOCAB, VOCAB))}


@partial(jax.jit, static_argnames=("model", "count"))
def generate(params, tokens, mask, *, model=MARKOV, count=COUNT):
    return generation.generate((params, model), tokens, mask=mask, count=count, pad=1)


def write(params, tokens, starts, **options):
    """The tokens from ``starts`` on, and the text with them; places beyond the window are dropped."""
    written = np.asarray(generate(params, tokens, np.arange(WINDOW)[None] < np.asarray(starts)[:, None], **options))
    text = np.array(tokens)
    for row, (start, own) in enumerate(zip(starts, written, strict=True)):
        text[row, start : start + COUNT] = own[: WINDOW - start]
    return written, text


def block(rows, starts, count=COUNT):
    """Mask ``[b, t]`` over targets (shifted by one) of the ``count`` tokens from ``starts`` on."""
    place = np.arange(WINDOW - 1)[None, :] + 1
    return jnp.asarray((place >= starts[:, None]) & (place < starts[:, None] + count)).reshape(rows, -1)


def teacher_forced(model, params, sequence, mask):
    ok = losses.correct(model.apply(params, sequence[:, :-1]).logits, sequence[:, 1:])
    return np.asarray(losses.exact_match(ok, mask))


def test_the_written_block_is_the_target_exactly_where_teacher_forcing_matches(table):
    rng = np.random.default_rng(0)
    rows = 2000
    sequence = jnp.asarray(rng.integers(0, VOCAB, (rows, WINDOW)), jnp.int32)
    starts = np.asarray(rng.integers(1, START + 1, rows))
    _, text = write(table, sequence, starts)
    matches = teacher_forced(MARKOV, table, sequence, block(rows, starts))
    np.testing.assert_array_equal(np.all(text == sequence, axis=1), matches)
    # Either verdict occurs: 3^-4 of 2 000 random targets are right by chance.
    assert 5 < matches.sum() < 100


@pytest.fixture(scope="module")
def lively(tiny_gpt):
    """Weights that are large enough for continuations that differ from prompt to prompt."""
    return jax.tree.map(lambda leaf: 20 * leaf if leaf.ndim > 1 else leaf, tiny_gpt)


def test_a_gpt_writes_what_whole_passes_of_every_row_alone_say(tiny_config, lively):
    """And its answer is the target, or differs from it in one token, as teacher forcing finds."""
    model = gpt.model(replace(tiny_config, unroll=1))
    prompts = jax.random.randint(jax.random.key(2), (6, WINDOW), 0, tiny_config.vocab_size)
    starts = np.asarray([2, 3, 4, 2, 3, 4])
    written, text = write(lively, prompts, starts, model=model)
    run = jax.jit(lambda tokens: model.apply(lively, tokens).logits)
    for row, start in enumerate(starts):
        own = np.zeros(WINDOW, np.int32)
        own[:start] = prompts[row, :start]
        for place in range(start, start + COUNT):
            own[place] = run(own[None])[0, place - 1].argmax()
        np.testing.assert_array_equal(written[row], own[start : start + COUNT])
    assert len({tuple(row) for row in written.tolist()}) > 2
    mask = block(6, starts)
    assert teacher_forced(model, lively, jnp.asarray(text), mask).all()
    other = text.copy()
    other[np.arange(6), starts + 1] = (other[np.arange(6), starts + 1] + 1) % tiny_config.vocab_size
    assert not teacher_forced(model, lively, jnp.asarray(other), mask).any()


def test_padding_may_stand_anywhere(table):
    packed = jnp.asarray([[1, 2, 0, 0, 0, 0, 0, 0], [2, 0, 1, 0, 0, 0, 0, 0]])
    places = [[1, 4, 7], [0, 1, 5]]
    tokens, mask = np.zeros((2, 2, WINDOW), np.int32)
    for row, own in enumerate(places):
        tokens[row, own], mask[row, own] = packed[row, :3], 1
    written, _ = write(table, packed, [3, 3])
    np.testing.assert_array_equal(generate(table, jnp.asarray(tokens), mask.astype(bool)), written)


def test_what_stands_after_the_prompt_is_not_looked_at(table):
    tokens = jax.random.randint(jax.random.key(1), (2, WINDOW), 0, VOCAB)
    other = tokens.at[:, START:].set((tokens[:, START:] + 1) % VOCAB)
    np.testing.assert_array_equal(*(write(table, given, [START, START])[0] for given in (tokens, other)))


def test_a_row_ends_with_its_window_and_the_others_go_on(table):
    silent = {"table": jnp.zeros((WINDOW, VOCAB, VOCAB)).at[:, :, 0].set(1.0)}
    written, text = write(silent, jnp.full((2, WINDOW), 2, jnp.int32), [2, 6])
    # The last token of a window is read, and what it says lies beyond.
    np.testing.assert_array_equal(written, [[0, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(text, [[2, 2, 0, 0, 0, 0, 2, 2], [2, 2, 2, 2, 2, 2, 0, 0]])


def test_a_model_that_is_not_finite_writes_nothing(table):
    written, _ = write(jax.tree.map(lambda leaf: leaf * jnp.nan, table), jnp.zeros((2, WINDOW), jnp.int32), [2, 3])
    np.testing.assert_array_equal(written, np.ones((2, COUNT)))
