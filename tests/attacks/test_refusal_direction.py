"""The refusal direction: candidates of a model of two layers by hand, and weights against a hook on a Llama."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.attacks import refusal_direction
from jaxsafety.linalg import refusing
from jaxsafety.linalg.refusing import REASONS, Scores
from jaxsafety.models import llama
from jaxsafety.types import Batch, Model, Output, Target, Trial

# float32 sums of a few numbers of order 10.
ATOL = 1e-5
# Products of matrices through two layers, in another order.
RTOL = 1e-4
SAFE, UNSAFE, REFUSES, COMPLIES, WIDTH = 0, 1, 2, 3, 3
# By token, the stream: towards refusing it is the first axis, towards complying the second.
EMBED = np.array([[-2, 1, 0], [3, 1, 0], [0, 0, 1], [0, 0, 2]], np.float32)
# Both ways are read of the same stream; the other tokens are far less likely.
UNEMBED = np.array([[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], np.float32)
OFFSETS = np.array([-50, -50, 0, 0], np.float32)


def apply(params, inputs, *, at=None, sites=(), positions=None, edit=None, **_):
    """Two layers that hand on what they get, the second one three times as large."""
    h, seen = jnp.asarray(params["embed"])[inputs], []
    for layer in range(2):
        h = h * (1 + 2 * layer)
        if edit is not None:
            h = edit("hook_resid_post", jnp.int32(layer), jnp.zeros(inputs.shape, int), h)
        seen.append(jnp.take_along_axis(h, positions[..., None], axis=1) if positions is not None else h)
    rows = h if at is None else jnp.take_along_axis(h, at[..., None], axis=1)
    return Output(rows @ UNEMBED + OFFSETS[None, None], {site: jnp.stack(seen) for site in sites})


MODEL, PARAMS = Model(None, apply, None), {"embed": EMBED}


def trial(token, count=4):
    """Prompts of one token, answered by one."""
    sides = [
        Batch(*(jnp.tile(jnp.asarray(row), (count, 1)) for row in ([token, answer], [answer, 0], [True, False])))
        for answer in (COMPLIES, REFUSES)
    ]
    last = jnp.zeros(count, jnp.int32)
    return Trial(*sides, jnp.stack([sides[0].mask] * 2, axis=1), jnp.full(count, token == UNSAFE), last, None)


PAIRS = jax.tree.map(lambda *sides: jnp.stack(sides), trial(SAFE), trial(UNSAFE))


@pytest.fixture(scope="module")
def found():
    return jax.device_get(jax.jit(lambda params: refusal_direction.select(MODEL, params, PAIRS, depth=0.5))(PARAMS))


def test_candidates_are_differences_of_means(found):
    np.testing.assert_allclose(found.directions[:, 0], [[5, 0, 0], [15, 0, 0]], atol=ATOL)


def test_scores_are_those_by_hand(found):
    # Ablated, what is left says to comply, three times 1; added, safe prompts have -6 + 3 * 5 or -6 + 15 for refusing.
    np.testing.assert_allclose(found.scores.bypass[:, 0], [-3, -3], atol=ATOL)
    np.testing.assert_allclose(found.scores.induce[:, 0], [9 - 3, 9 - 3], atol=ATOL)
    before, after = (np.exp([score, 3.0]) / np.exp([score, 3.0]).sum() for score in (-6.0, 0.0))
    np.testing.assert_allclose(found.scores.kl, np.full((2, 1), (before * np.log(before / after)).sum()), atol=ATOL)


def test_the_best_is_the_one_that_is_kept_and_the_other_says_why(found):
    assert [REASONS[one] for one in found.ranking.reason] == ["kept", "too late a layer"]
    np.testing.assert_array_equal(found.ranking.order, [0, 1])


def test_ranking_keeps_what_passes_and_goes_by_bypass():
    scores = Scores(
        bypass=jnp.asarray([[-1.0, -5.0], [-2.0, -9.0], [-8.0, jnp.nan]]),
        induce=jnp.asarray([[1.0, 0.0], [2.0, 3.0], [4.0, 1.0]]),
        kl=jnp.asarray([[0.05, 0.0], [0.1, 0.2], [0.0, 0.0]]),
    )
    found = jax.jit(lambda given: refusing.ranked(given, most_kl=0.1, depth=2 / 3))(scores)
    expected = [0, 3, 0, 4, 2, 1]
    np.testing.assert_array_equal(found.reason, expected)
    np.testing.assert_array_equal(found.order, [2, 0, 3, 4, 1, 5])


def test_where_none_is_kept_the_best_of_all_is_used_and_told():
    target = Target(MODEL, PARAMS, PARAMS, trial(UNSAFE), 0, PAIRS)
    config = refusal_direction.Config(most_kl=1e-9)

    @jax.jit
    def run(key):
        done = refusal_direction.attack(target, config, point={"strength": jnp.float32(1)}, key=key)
        return apply(PARAMS, trial(UNSAFE).complied.tokens, edit=done.edit).logits[:, 0], done.metrics

    logits, metrics = run(jax.random.key(0))
    assert not metrics["kept"].any() and not metrics["layer"].any()
    np.testing.assert_allclose(logits[:, REFUSES], 0, atol=ATOL)
    np.testing.assert_allclose(logits[:, COMPLIES], 3, atol=ATOL)


@pytest.mark.parametrize(("strength", "refuses"), [(0.0, 9.0), (1.0, -6.0)])
def test_the_difference_is_subtracted_at_its_layer(strength, refuses):
    target = Target(MODEL, PARAMS, PARAMS, trial(UNSAFE), 0, PAIRS)
    config = refusal_direction.Config(how="add", depth=0.5)
    done = refusal_direction.attack(target, config, point={"strength": jnp.float32(strength)}, key=jax.random.key(0))
    logits = apply(PARAMS, trial(UNSAFE).complied.tokens, edit=done.edit).logits[:, 0]
    # An unsafe prompt becomes a safe one: 3 - 5, and the second layer three times that.
    np.testing.assert_allclose(logits[:, REFUSES], refuses, atol=ATOL)


def test_one_pair_is_not_enough():
    with pytest.raises(ValueError, match="held_out: got 1 pair of prompts, expected at least 2"):
        refusal_direction.select(MODEL, PARAMS, jax.tree.map(lambda leaf: leaf[:, :1], PAIRS))


def test_orthogonal_weights_do_as_ablation_at_every_layer_and_position():
    config = llama.LlamaConfig(
        vocab_size=7, max_tokens=6, layers=2, heads=2, width=8, kv_heads=1, mlp_width=12, head_width=4
    )
    params = jax.jit(lambda key: llama.init(config, key=key))(jax.random.key(0))
    # Far from where it begins, so that every matrix matters.
    params = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim > 1 else leaf, params)
    unit = refusal_direction.unit(jax.random.normal(jax.random.key(1), (8,)))
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6]])

    @jax.jit
    def both(params):
        weights = refusal_direction.orthogonalised(params, unit)
        hook = jax.tree_util.Partial(refusing.removed, unit=unit)
        edits = (params, hook), (weights, None), (params, None)
        return [llama.apply(one, tokens, config=config, edit=edit).logits for one, edit in edits], weights

    (ablated, edited, plain), weights = jax.device_get(both(params))
    np.testing.assert_allclose(edited, ablated, rtol=RTOL, atol=RTOL)
    assert np.abs(plain - ablated).max() > 0.1
    for leaf in (weights["embed"], weights["blocks"]["attn"]["o"], weights["blocks"]["mlp"]["down"]):
        np.testing.assert_allclose(leaf @ unit, 0, atol=ATOL)
    np.testing.assert_array_equal(weights["blocks"]["attn"]["q"], params["blocks"]["attn"]["q"])
