"""Prefilled answers against Python loops over judged tokens, and their verdicts against greedy decoding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import losses, world
from jaxsafety.analysis import refusal_depth
from jaxsafety.attacks import prefill
from jaxsafety.models import generation
from jaxsafety.models.adapter import adapted
from jaxsafety.types import Batch

CONDITIONS = ("safe", "unsafe", "jb_misgen")
# Texts of the tiny world have 6 to 8 letters: 9 judged tokens at most in one block, 18 in two.
DEPTHS = (0, 1, 2, 4, 7, 8, 9, 25)


@pytest.fixture(scope="module", params=CONDITIONS)
def trial(request, tiny_world):
    draw = partial(world.batch_at, tiny_world, request.param, step=0, batch_size=40)
    return jax.jit(lambda key: draw(key=key))(jax.random.key(5))


@pytest.fixture(scope="module")
def both(trial):
    """Its answers in NumPy."""
    return jax.device_get((trial.complied, trial.refused))


# One program, where eager calls would compile one for every operation.
first_refusal = jax.jit(refusal_depth.first_refusal)


def plain_prefilled(complied, refused, depth):
    """One row: walks over the judged targets and hands out the first ``depth`` of the complied answer."""
    tokens, targets, mask = (np.array(leaf) for leaf in (refused.tokens, refused.targets, refused.mask))
    judged = [place for place in range(len(tokens)) if complied.mask[place]]
    for place in judged[:depth]:
        targets[place], mask[place] = complied.targets[place], False
        if place + 1 < len(tokens):
            tokens[place + 1] = complied.targets[place]
    return tokens, targets, mask


def plain_first_refusal(predicted, complied, refused):
    judged = [place for place in range(len(predicted)) if complied.mask[place]]
    for index, place in enumerate(judged):
        true, null = complied.targets[place], refused.targets[place]
        if refused.mask[place] and true != null and predicted[place] == null:
            return index
    return -1


def rows(batch):
    host = jax.device_get(batch)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], host) for i in range(len(host.tokens))]


@pytest.mark.parametrize("depth", DEPTHS)
def test_prefilled_answers_match_a_loop(trial, depth):
    got = prefill.prefilled(trial.complied, trial.refused, depth=depth)
    expected = [plain_prefilled(*pair, depth) for pair in zip(rows(trial.complied), rows(trial.refused), strict=True)]
    for leaf, plain in zip((got.tokens, got.targets, got.mask), zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(leaf, plain)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_prefilled_batch_is_a_sequence(trial, both, depth):
    got = jax.device_get(prefill.prefilled(trial.complied, trial.refused, depth=depth))
    np.testing.assert_array_equal(got.tokens[:, 1:], got.targets[:, :-1])
    length = np.asarray(trial.prompt.length)
    for row, end in enumerate(length + 7):
        np.testing.assert_array_equal(got.tokens[row, :end], both[0].tokens[row, :end])


def test_nothing_given_is_the_refusal_and_everything_given_scores_nothing(trial):
    nothing = prefill.prefilled(trial.complied, trial.refused, depth=0)
    jax.tree.map(np.testing.assert_array_equal, nothing, trial.refused)
    everything = prefill.prefilled(trial.complied, trial.refused, depth=25)
    assert not np.asarray(everything.mask).any()
    judged = np.asarray(trial.complied.mask)
    np.testing.assert_array_equal(np.asarray(everything.targets)[judged], np.asarray(trial.complied.targets)[judged])


@pytest.mark.parametrize("depth", DEPTHS)
def test_compliance_is_scored_after_the_given_tokens(trial, depth):
    got = jax.device_get(prefill.complied_after(trial.complied, depth=depth))
    np.testing.assert_array_equal(got.tokens, trial.complied.tokens)
    np.testing.assert_array_equal(got.targets, trial.complied.targets)
    for row, mask in enumerate(np.asarray(trial.complied.mask)):
        np.testing.assert_array_equal(np.flatnonzero(got.mask[row]), np.flatnonzero(mask)[depth:])


def test_depth_may_be_traced(trial):
    depths = np.asarray(DEPTHS)
    mixed = jax.jit(lambda n: jax.lax.map(lambda k: prefill.prefilled(trial.complied, trial.refused, depth=k), n))
    batched = jax.jit(jax.vmap(lambda k: prefill.complied_after(trial.complied, depth=k)))
    got, after = jax.device_get((mixed(depths), batched(depths)))
    for i, depth in enumerate(DEPTHS):
        expected = prefill.prefilled(trial.complied, trial.refused, depth=depth)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, i=i: leaf[i], got), expected)
        np.testing.assert_array_equal(after.mask[i], prefill.complied_after(trial.complied, depth=depth).mask)


def test_first_refusals_match_a_loop(trial):
    """Predictions are drawn from both answers and noise, so that refusals stand anywhere, or nowhere."""
    rng = np.random.default_rng(0)
    true, null = (np.asarray(side.targets) for side in (trial.complied, trial.refused))
    noise = rng.integers(0, true.max() + 1, true.shape)
    predicted = np.choose(rng.choice(3, size=true.shape, p=[0.75, 0.1, 0.15]), [true, null, noise])
    got = first_refusal(predicted.astype(np.int32), complied=trial.complied, refused=trial.refused)
    expected = [
        plain_first_refusal(*row) for row in zip(predicted, rows(trial.complied), rows(trial.refused), strict=True)
    ]
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected)
    assert len(set(expected)) > 3 and -1 in expected


def test_a_model_that_answers_as_told_never_refuses_and_one_that_refuses_does_at_once(trial):
    complies, refuses = (
        np.asarray(first_refusal(side.targets, complied=trial.complied, refused=trial.refused))
        for side in (trial.complied, trial.refused)
    )
    np.testing.assert_array_equal(complies, -1)
    for row, pair in enumerate(zip(rows(trial.complied), rows(trial.refused), strict=True)):
        judged = np.flatnonzero(pair[0].mask)
        differs = [i for i, place in enumerate(judged) if pair[0].targets[place] != pair[1].targets[place]]
        assert refuses[row] == differs[0]


ROWS, WINDOW, START, VOCAB = 3000, 7, 2, 3


@pytest.fixture(scope="module")
def chance():
    """Random answers of four tokens to random prompts, and a model so small that it is often right by chance."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, VOCAB, (2, ROWS, WINDOW + 1), np.int32)
    same_prompt = np.where(np.arange(WINDOW + 1) < START, draws[0], draws[1])
    mask = np.tile((np.arange(WINDOW) >= START - 1) & (np.arange(WINDOW) < START + 3), (ROWS, 1))
    batches = [Batch(tokens=s[:, :-1], targets=s[:, 1:], mask=mask) for s in (draws[0], same_prompt)]
    table = {"table": rng.normal(size=(WINDOW + 1, VOCAB, VOCAB)).astype(np.float32)}
    return *batches, table


def markov(params, tokens):
    """Looks at the last token and its position only."""
    return params["table"][jnp.arange(tokens.shape[1])[None, :], tokens]


@jax.jit
def given(complied, refused, depth):
    return prefill.prefilled(complied, refused, depth=depth), prefill.complied_after(complied, depth=depth)


@jax.jit
def judged(table, batch):
    return losses.exact_match(losses.correct(markov(table, batch.tokens), batch.targets), batch.mask)


@partial(jax.jit, static_argnames="count")
def generated(table, sequence, prompt, count):
    return generation.generate((table, adapted(markov, max_tokens=WINDOW + 1)), sequence, mask=prompt, count=count)


@pytest.mark.parametrize("depth", range(4))
def test_recovering_from_a_prefill_is_what_greedy_decoding_emits(chance, depth):
    complied, refused, table = chance
    mixed, after = given(complied, refused, depth)
    prompt = np.tile(np.arange(WINDOW + 1) < START + depth, (ROWS, 1))
    sequence = np.concatenate([complied.tokens, complied.targets[:, -1:]], axis=1)
    emitted = np.asarray(generated(table, sequence, prompt, 4 - depth))
    for batch, side in ((mixed, refused), (after, complied)):
        verdict = np.asarray(judged(table, batch))
        expected = (emitted == side.targets[:, START + depth - 1 : START + 3]).all(1)
        np.testing.assert_array_equal(verdict, expected)
        # Chance gives 3^-(4 - depth) of the rows.
        assert 0.3 < verdict.mean() * VOCAB ** (4 - depth) < 3


def test_bad_arguments_are_named(trial):
    for call in (prefill.prefilled, lambda c, _, depth: prefill.complied_after(c, depth=depth)):
        with pytest.raises(ValueError, match="depth: got -1, expected at least 0"):
            call(trial.complied, trial.refused, depth=-1)
    shorter = jax.tree.map(lambda leaf: leaf[:, :-1], trial.refused)
    message = r"complied has shape \(40, 33\) and refused \(40, 32\): expected answers to the same prompts"
    with pytest.raises(ValueError, match=message):
        prefill.prefilled(trial.complied, shorter, depth=1)
    with pytest.raises(ValueError, match=message):
        refusal_depth.first_refusal(trial.complied.targets, complied=trial.complied, refused=shorter)
