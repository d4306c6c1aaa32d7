"""Uncertainty of true answers against NumPy in float64, and models of which is known what misleads them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import analysis, keys, world
from jaxsafety.analysis import uncertainty
from jaxsafety.types import Model, Output, View

# float32 sums of some dozen terms against float64.
RTOL = 1e-5
# Logit of what a model says, others being 0; two conditions of so many prompts.
SURE, PROMPTS = 3.0, 6
ENDINGS = ("", "_right", "_wrong")
# One program, where eager calls would compile one for every operation.
halves, replaced = jax.jit(uncertainty.halves), jax.jit(uncertainty.replaced)


@pytest.fixture(scope="module")
def trials(tiny_world):
    drawn = [world.batch_at(tiny_world, name, key=keys.root(4), step=0, batch_size=PROMPTS, late_probability=0.0)
             for name in ("safe", "unsafe")]  # fmt: skip
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)


@pytest.fixture(scope="module")
def read(trials):
    """Where the letters of the second half are predicted, ``[c, b, t]``, counted from the end of the prompt."""
    found = np.zeros(trials.complied.mask.shape, bool)
    for place in np.ndindex(found.shape[:2]):
        length, last = int(trials.prompt.length[place]), int(trials.last[place])
        found[place][last + length // 2 : last + length] = True
    return found


def measured(apply, trials, params=None, **options):
    """What the analysis says of a model, by metric ``[c, context]``."""
    one = analysis.load("uncertainty")
    view = View(Model(embed=None, apply=apply, decoder=None), params, None, trials=trials)
    found = jax.jit(lambda: one.measure(view, one.Config(**options), key=keys.root(0)))()
    return {metric: np.asarray(values) for (metric, _), values in found.items()}


@pytest.mark.parametrize("size", [64, 2])
def test_what_is_read_of_true_answers_matches_numpy(trials, read, tiny_world, monkeypatch, size):
    """Of a model whose logits are sums over the tokens so far, more of letters; whatever is read at once."""
    monkeypatch.setattr(uncertainty, "_BATCH", size)
    table = (np.random.default_rng(0).normal(size=(tiny_world.vocab_size,) * 2) + is_letter(tiny_world)) / 4
    found = measured(lambda w, x: Output(jnp.cumsum(w[x], axis=1), {}), trials, jnp.asarray(table, jnp.float32))
    for c in range(2):
        logits = table[np.asarray(trials.complied.tokens[c])].cumsum(axis=1)[read[c]]
        targets = np.asarray(trials.complied.targets[c])[read[c]]
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        right, said = logits.argmax(-1) == targets, shares[np.arange(len(targets)), targets]
        assert 0 < right.sum() < len(right)
        for ending, kept in zip(ENDINGS, (right | ~right, right, ~right), strict=True):
            own = {
                "perplexity": math.prod(1 / said[kept]) ** (1 / kept.sum()),
                "entropy": np.mean(np.sum(shares * -np.log(shares), -1)[kept]),
                "probability": np.mean(said[kept]),
            }
            for name, expected in own.items():
                np.testing.assert_allclose(found[name + ending][c, 0], expected, rtol=RTOL)
        np.testing.assert_allclose(found["accuracy"][c, 0], right.mean(), rtol=RTOL)
        rows = np.nonzero(read[c])[0]
        whole = [right[rows == row].all() for row in range(PROMPTS)]
        np.testing.assert_allclose(found["exact_match"][c, 0], np.mean(whole), rtol=RTOL)


def is_letter(world):
    return np.isin(np.arange(world.vocab_size), [world.ids[letter] for letter in world.spec.letters])


def misled(trials, read, believes):
    """A model that is right where letters are read, and nowhere else, until it was given a token that it believes."""
    flat, within = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (trials, jnp.asarray(read)))
    true, targets = flat.complied.tokens, flat.complied.targets
    prompt = jnp.arange(true.shape[1])[None] <= flat.last[:, None]

    def apply(params, tokens):
        asked = jnp.argmax(jnp.all((tokens[:, None] == true[None]) | ~prompt[None], axis=-1), axis=1)
        changed = (tokens != true[asked]) & believes[tokens]
        wrong = jnp.cumsum(changed, axis=1) > 0
        right = within[asked] & ~wrong
        size = believes.shape[0]
        said = jnp.where(right, targets[asked], (targets[asked] + 1) % size)
        return Output(SURE * jax.nn.one_hot(said, size), {})

    return apply


@pytest.mark.parametrize(
    ("believes", "corrupted"), [((), 3), (("false",), 1), (("random",), 1), (("false", "random"), 99)]
)
def test_a_model_is_misled_by_what_it_believes(trials, read, tiny_world, believes, corrupted):
    letters = is_letter(tiny_world)
    mask = ("false" in believes) & letters | ("random" in believes) & ~letters
    found = measured(misled(trials, read, jnp.asarray(mask)), trials, corrupted=corrupted)
    rest = tiny_world.vocab_size - 1
    sure, other = math.exp(SURE) / (math.exp(SURE) + rest), 1 / (math.exp(SURE) + rest)
    entropy = -sure * math.log(sure) - rest * other * math.log(other)
    for place, context in enumerate(uncertainty.CONTEXTS):
        is_right = context not in believes
        own = {"accuracy": is_right, "exact_match": is_right, "entropy": entropy}
        for name, p in (("probability", 1), ("perplexity", -1)):
            own |= {name: (sure if is_right else other) ** p}
            own |= {f"{name}_right": sure**p if is_right else np.nan}
            own |= {f"{name}_wrong": np.nan if is_right else other**p}
        own |= {"entropy_right": entropy if is_right else np.nan, "entropy_wrong": np.nan if is_right else entropy}
        assert set(own) == set(found)
        for name, expected in own.items():
            np.testing.assert_allclose(found[name][:, place], [expected] * 2, rtol=RTOL, err_msg=f"{name} {context}")


def test_prompts_of_which_a_later_block_is_judged_are_left_out(trials, read, tiny_world):
    """A model that is right of the one prompt alone of which the first block is."""
    first = jnp.arange(PROMPTS)[None, :, None] < jnp.array([PROMPTS, 1])[:, None, None]
    late = trials.replace(complied=trials.complied.replace(mask=trials.complied.mask & first))
    apply = misled(trials, read & np.asarray(first), jnp.zeros(tiny_world.vocab_size, bool))
    np.testing.assert_array_equal(measured(apply, late)["exact_match"], np.ones((2, 3)))
    np.testing.assert_allclose(measured(apply, trials)["exact_match"], [[1.0] * 3, [1 / PROMPTS] * 3], rtol=RTOL)


def test_halves_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    letters = rng.random((200, 12)) < 0.6
    letters[0], letters[1] = False, True
    for count in (0, 1, 3, 20):
        chosen, second = jax.device_get(halves(letters, count=count, key=keys.root(count)))
        for row, there in enumerate(letters):
            places = np.nonzero(there)[0]
            first = places[: len(places) // 2]
            np.testing.assert_array_equal(np.nonzero(second[row])[0], places[len(first) :])
            assert chosen[row].sum() == min(count, len(first)) and set(np.nonzero(chosen[row])[0]) <= set(first)


def test_places_and_tokens_are_drawn_alike():
    """Two of five places, and of four tokens the three others: shares of 4000 within five deviations."""
    count, rows = 2, 4000
    chosen, _ = halves(np.ones((rows, 10), bool), count=count, key=keys.root(0))
    spread = math.sqrt(0.4 * 0.6 / rows)
    np.testing.assert_allclose(np.mean(chosen, axis=0), [0.4] * 5 + [0.0] * 5, atol=5 * spread)
    by = np.array([True, False, True, True, True, False])
    tokens = np.full((rows, 1), 2, np.int32)
    drawn = replaced(tokens, tokens > 0, by=by, key=keys.root(1))
    shares = np.bincount(np.ravel(drawn), minlength=6) / rows
    np.testing.assert_allclose(shares, [1 / 3, 0, 0, 1 / 3, 1 / 3, 0], atol=5 * math.sqrt(2 / 9 / rows))


def test_only_marked_tokens_are_replaced_and_none_where_there_is_no_other():
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6) % 3
    places = np.arange(6)[None] % 2 == np.array([[0], [1]])
    drawn = np.asarray(replaced(tokens, places, by=np.array([False, True, False]), key=keys.root(0)))
    np.testing.assert_array_equal(drawn, np.where(places, 1, tokens))
    assert drawn.dtype == tokens.dtype
    same = replaced(tokens, places, by=np.zeros(3, bool), key=keys.root(0))
    np.testing.assert_array_equal(same, tokens)
