"""Answers that turn midway, against lists and against what a prefill is judged by."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, world
from jaxsafety.attacks import prefill
from jaxsafety.training.recovery import avertable, recovery
from tests.methods.lists import FILLED, LENGTH, PROMPTS, REFUSALS, REPLIES, padded, pairs, turned

UNSAFE = [True] * len(PROMPTS)
join = jax.jit(recovery, static_argnames="aligned")


def listed(depth, length, *, aligned):
    """Prompt, given tokens and refusal in a row; neither prompt nor given tokens are scored."""
    given = [prompt + reply[:depth] for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    return padded([(before, turned(i, depth, aligned=aligned)) for i, before in enumerate(given)], length)


def assert_same(got, expected):
    """Tokens and targets where something is scored, and everywhere before."""
    np.testing.assert_array_equal(got.mask, expected.mask)
    last = np.where(np.asarray(got.mask), np.arange(got.mask.shape[1]), -1).max(1)
    for row, end in enumerate(last + 1):
        for leaf in ("tokens", "targets"):
            np.testing.assert_array_equal(getattr(got, leaf)[row, :end], getattr(expected, leaf)[row, :end])


@pytest.mark.parametrize("length", [LENGTH, 8, 40])
@pytest.mark.parametrize("depth", range(4))
def test_a_refusal_is_written_behind_the_given_tokens_and_cut_off_at_the_end(depth, length):
    batch = pairs(unsafe=UNSAFE, length=length)
    # The last reply has one token.
    got = join(batch.chosen, batch.rejected, depth=jnp.asarray([depth] * 4 + [min(depth, 1)]), aligned=False)
    assert_same(
        jax.tree.map(lambda leaf: leaf[:4], got), jax.tree.map(lambda x: x[:4], listed(depth, length, aligned=False))
    )
    assert length > 8 or depth < 3 or np.sum(got.mask) < sum(map(len, REFUSALS))


@pytest.mark.parametrize("depth", range(4))
def test_an_aligned_refusal_stands_where_it_would(depth):
    batch = pairs(unsafe=UNSAFE, aligned=True)
    got = join(batch.chosen, batch.rejected, depth=jnp.full(len(PROMPTS), depth), aligned=True)
    assert_same(got, listed(depth, LENGTH, aligned=True))
    assert np.asarray(got.mask).sum() == sum(max(len(one) - depth, 0) for one in FILLED)


def test_of_the_world_it_is_what_a_prefill_is_judged_by(tiny_world):
    """Bit for bit, of prompts that are unsafe in their second block alone, too."""
    draw = partial(world.batch_at, tiny_world, "unsafe", step=0, batch_size=32, late_probability=0.5)
    trial = jax.jit(lambda key: draw(key=key))(keys.root(5))
    batch = world.preferences(trial)
    assert batch.aligned and len(set(np.asarray(batch.chosen.mask).argmax(1) - np.asarray(trial.last))) > 1
    for depth in (0, 1, 4, 7):
        got = join(batch.chosen, batch.rejected, depth=jnp.full(32, depth), aligned=batch.aligned)
        expected = prefill.prefilled(trial.complied, trial.refused, depth=depth)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("aligned", [False, True])
def test_nothing_given_is_the_preferred_answer_bit_for_bit(aligned):
    batch = pairs(unsafe=[True, False, True, False, True], aligned=aligned)
    got = join(batch.chosen, batch.rejected, depth=jnp.zeros(len(PROMPTS), int), aligned=aligned)
    jax.tree.map(np.testing.assert_array_equal, got, batch.chosen)


def test_an_answer_is_averted_at_every_token_but_the_one_that_ends_it():
    rejected = pairs(unsafe=UNSAFE).rejected
    found = np.asarray(avertable(rejected))
    for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        np.testing.assert_array_equal(np.flatnonzero(found[row]), len(prompt) - 1 + np.arange(len(reply) - 1))


def test_bad_arguments_are_named():
    batch = pairs(unsafe=UNSAFE)
    with pytest.raises(ValueError, match="depth: got -1, expected at least 0"):
        recovery(batch.chosen, batch.rejected, depth=jnp.full(len(PROMPTS), -1), aligned=True)
    with pytest.raises(ValueError, match=r"chosen has shape \(5, 14\) and rejected \(5, 15\)"):
        recovery(batch.chosen, pairs(unsafe=UNSAFE, length=15).rejected, depth=jnp.zeros(5, int), aligned=False)
