"""Perturbed prompts: steps against NumPy, what may move, and an attacker who keeps hidden states where they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import world
from jaxsafety.attacks import embedding_pgd
from jaxsafety.models import gpt
from jaxsafety.types import Target

# float32 against float64 over a few steps.
RTOL, ATOL = 1e-4, 1e-5
ROWS, TOKENS, WIDTH, WORDS, STEPS, RADIUS = 2, 4, 3, 5, 4, 0.5
RNG = np.random.default_rng(0)
EMBEDDINGS, WEIGHTS, REFERENCE = (
    RNG.normal(size=shape) for shape in ((ROWS, TOKENS, WIDTH), (WIDTH, WORDS), (ROWS, TOKENS, WIDTH))
)
TARGETS = RNG.integers(0, WORDS, (ROWS, TOKENS))
PROMPT = np.array([[True, True, False, False], [True, False, False, False]])
MASK = np.array([[False, True, True, False], [True, True, True, False]])


def forward(inputs):
    """A causal linear model: its hidden states are sums of what has come."""
    hidden = jnp.cumsum(inputs, axis=1)
    return hidden @ jnp.float32(WEIGHTS), hidden


def run(embeddings=EMBEDDINGS, steps=STEPS, radius=RADIUS, match=0.0, reference=REFERENCE, mask=MASK):
    given = {"targets": jnp.asarray(TARGETS), "mask": jnp.asarray(mask), "prompt": jnp.asarray(PROMPT)}
    moved = {"radius": radius, "match": match, "reference": jnp.float32(reference)}
    call = jax.jit(lambda x, more: embedding_pgd.perturb(forward, x, steps=steps, **given, **more))
    return jax.device_get(call(jnp.float32(embeddings), moved))


def plain(match):
    """The same by hand: gradients of a softmax of sums, row by row."""
    added, curve = np.zeros_like(EMBEDDINGS), []
    for _ in range(STEPS):
        hidden = np.cumsum(EMBEDDINGS + added, axis=1)
        share = np.exp(hidden @ WEIGHTS)
        share /= share.sum(axis=-1, keepdims=True)
        slope, told = np.zeros_like(added), []
        for row in range(ROWS):
            places = np.flatnonzero(MASK[row])
            apart = (hidden - REFERENCE)[row, places]
            size = (REFERENCE[row, places] ** 2).sum()
            nll = -np.log(share[row, places, TARGETS[row, places]]).mean()
            told.append(nll + match * (apart**2).sum() / size)
            of_hidden = (share[row, places] - np.eye(WORDS)[TARGETS[row, places]]) @ WEIGHTS.T / len(places)
            of_hidden = of_hidden + match * 2 * apart / size
            for place, one in zip(places, of_hidden, strict=True):
                slope[row, : place + 1] += one
        curve.append(told)
        moved = added - 2 * RADIUS / STEPS * slope / np.linalg.norm(slope, axis=-1, keepdims=True).clip(1e-30)
        norm = np.linalg.norm(moved, axis=-1, keepdims=True)
        added = np.where(PROMPT[..., None], moved * np.minimum(1, RADIUS / norm.clip(1e-30)), 0)
    return added, np.array(curve)


@pytest.mark.parametrize("match", [0.0, 2.0])
def test_steps_are_those_by_hand(match):
    found, (added, curve) = run(match=match), plain(match)
    np.testing.assert_allclose(found.added, added, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(found.loss, curve, rtol=RTOL)
    assert (found.loss[-1] < found.loss[0]).all()


def test_nothing_outside_of_the_prompt_or_the_ball_is_moved():
    found = run(steps=9)
    norms = np.linalg.norm(found.added, axis=-1)
    assert (norms[~PROMPT] == 0).all() and (norms <= RADIUS * (1 + 1e-6)).all() and (norms[PROMPT] > 0).all()


def test_no_radius_is_nothing_at_all():
    np.testing.assert_array_equal(run(radius=0.0).added, 0)


def test_rows_do_not_influence_each_other_and_unmarked_places_count_for_nothing():
    other, hidden = EMBEDDINGS.copy(), REFERENCE.copy()
    other[1], hidden[~MASK] = other[1] + 7, np.nan
    found, expected = run(other, match=1.0, reference=hidden), run(match=1.0)
    np.testing.assert_array_equal(found.added[0], expected.added[0])
    assert np.isfinite(found.loss).all() and np.any(found.added[1] != expected.added[1])


def test_the_distance_is_relative_and_has_a_gradient_where_nothing_is_marked():
    hidden, reference = jnp.float32(EMBEDDINGS), jnp.float32(REFERENCE)
    found = embedding_pgd.distance(hidden, reference, mask=jnp.asarray(MASK))
    expected = [((EMBEDDINGS - REFERENCE)[i][MASK[i]] ** 2).sum() / (REFERENCE[i][MASK[i]] ** 2).sum() for i in (0, 1)]
    np.testing.assert_allclose(found, expected, rtol=RTOL)
    none = jnp.zeros_like(jnp.asarray(MASK))
    slope = jax.grad(lambda h: embedding_pgd.distance(h, reference, mask=none).sum())(hidden)
    np.testing.assert_array_equal(slope, 0)


def test_an_adaptive_attack_stays_nearer_to_the_model_before_tuning():
    found = [run(match=match).added for match in (0.0, 50.0)]
    apart = [
        embedding_pgd.distance(
            forward(jnp.float32(EMBEDDINGS + one))[1], jnp.float32(REFERENCE), mask=jnp.asarray(MASK)
        )
        for one in found
    ]
    assert (apart[1] < apart[0]).all()


def test_bad_numbers_are_one_sentence():
    for given, message in (({"radius": -1.0}, "radius: got -1.0"), ({"steps": 0}, "steps: got 0")):
        with pytest.raises(ValueError, match=message):
            embedding_pgd.perturb(
                forward, jnp.float32(EMBEDDINGS), targets=jnp.asarray(TARGETS), mask=jnp.asarray(MASK),
                prompt=jnp.asarray(PROMPT), **({"radius": 1.0, "steps": 1} | given),
            )  # fmt: skip


@pytest.mark.slow
def test_either_answer_follows_the_same_prompt(tiny_config, tiny_gpt, tiny_world, key):
    model, trial = gpt.model(tiny_config), world.batch_at(tiny_world, "unsafe", key=key, step=0, batch_size=2)
    # As it begins, a prompt hardly moves the answer.
    params, base = (jax.tree.map(lambda leaf, by=by: by * leaf if leaf.ndim > 1 else leaf, tiny_gpt) for by in (8, 6))

    @jax.jit
    def run(params, base):
        target = Target(model, params, base, trial, 0)
        config = embedding_pgd.Config(steps=3, match=1.0, layer=0)
        done = embedding_pgd.attack(target, config, point={"radius": jnp.float32(0.5)}, key=key)
        sides = [(getattr(one, side).tokens for one in (trial, done.trial)) for side in ("complied", "refused")]
        return [after - model.embed(params, before) for before, after in sides], done.metrics

    (first, second), metrics = jax.device_get(run(params, base))
    np.testing.assert_allclose(first, second, atol=ATOL)
    moved = np.arange(first.shape[1])[None] <= np.asarray(trial.last)[:, None]
    assert (np.abs(first).max(axis=-1)[~moved] == 0).all()
    assert (metrics["loss_end"] < metrics["loss_start"]).all() and (metrics["norm"] > 0.1).all()
