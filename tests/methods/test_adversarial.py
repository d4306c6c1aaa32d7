"""Latent adversarial training: its adversary in closed form, and the loss without one, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety.methods import adversarial
from jaxsafety.types import Unsupported
from tests.methods import lists
from tests.methods.bound import bound
from tests.methods.gpts import BATCH, MODEL, PARAMS, UNSAFE, misread
from tests.methods.lists import LENGTH, pairs

# float32 sums in another order.
RTOL = 1e-5
SLOPES = np.array([[[3.0, -4.0], [0.0, 2.0], [1.0, 1.0]], [[0.0, 0.0], [5.0, 12.0], [1.0, 0.0]]])
PLACES = np.array([[True, True, False], [True, True, False]])
SITES = pytest.mark.parametrize("site", ["embeddings", "layer"])


def linear(moved):
    return jnp.sum(moved * jnp.float32(SLOPES), axis=(1, 2)) + jnp.float32([1.0, -1.0])


@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_of_a_linear_objective_the_worst_is_against_its_gradient(radius):
    """A place without a gradient stays, and so does one that may not be moved."""
    norms = np.linalg.norm(SLOPES, axis=-1, keepdims=True)
    expected = -radius * np.where(PLACES[..., None], SLOPES / np.where(norms > 0, norms, 1), 0)
    found, start = adversarial.perturbation(linear, jnp.asarray(PLACES), width=2, radius=radius, steps=4)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(start, [1, -1])


def test_a_near_minimum_is_found_inside_the_ball():
    """Steps of constant length circle about it, at most one of them away."""
    goal = jnp.float32([[[0.3, -0.2]]])
    found, _ = adversarial.perturbation(
        lambda moved: jnp.sum((moved - goal) ** 2, axis=(1, 2)), jnp.ones((1, 1), bool), width=2, radius=1.0, steps=40
    )
    assert np.linalg.norm(found - goal) <= 2 / 40


@pytest.mark.parametrize(
    ("given", "message"),
    [({"steps": 0}, "steps: got 0, expected at least 1"), ({"radius": -1.0}, "radius: got -1.0, expected at least 0")],
)
def test_an_adversary_that_is_none_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        adversarial.perturbation(linear, jnp.asarray(PLACES), width=2, **({"radius": 1.0, "steps": 1} | given))


def value(params, batch=BATCH, **options):
    return bound("adversarial", MODEL, **({"inner_steps": 3, "layer": 0.5} | options))(params, batch)


def nll(params, tokens):
    """Of every target, float64."""
    logits = np.asarray(jax.jit(MODEL.apply)(params, tokens.tokens).logits, float)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logprobs, np.asarray(tokens.targets)[..., None], -1)[..., 0]


@SITES
def test_without_a_ball_it_is_the_likelihood_of_either_kind(site):
    """And the harmful answers' as far down as the bound."""
    chosen, rejected = nll(PARAMS, BATCH.chosen), nll(PARAMS, BATCH.rejected)
    kinds = [np.asarray(BATCH.chosen.mask) & own[:, None] for own in (UNSAFE, ~UNSAFE)]
    harmful = np.asarray(BATCH.rejected.mask) & UNSAFE[:, None]
    expected = sum(chosen[mask].mean() for mask in kinds) - 0.3 * np.minimum(rejected, 2.5)[harmful].mean()
    found, metrics = jax.jit(lambda p: value(p, site=site, radius=0.0, away=0.3, ascent_bound=2.5))(PARAMS)
    np.testing.assert_allclose(found, expected, rtol=RTOL)
    means = [row[mask].mean() for row, mask in zip(rejected, np.asarray(BATCH.rejected.mask), strict=True)]
    for when in ("before", "after"):
        np.testing.assert_allclose(metrics[f"harmful_nll/{when}"], np.mean(np.array(means)[UNSAFE]), rtol=RTOL)


@SITES
def test_the_adversary_makes_harmful_answers_likelier_by_its_radius(site):
    radii = jnp.float32([0.0, 0.1, 0.5])
    _, metrics = jax.jit(jax.vmap(lambda radius: value(PARAMS, site=site, radius=radius)))(radii)
    after = np.asarray(metrics["harmful_nll/after"])
    assert (np.diff(after) < -1e-3).all()
    np.testing.assert_allclose(metrics["harmful_nll/before"], after[0], rtol=RTOL)


def test_a_safe_prompt_is_not_moved():
    safe = pairs(unsafe=[False] * len(UNSAFE))
    found = jax.jit(lambda p: value(p, safe, radius=0.5)[0])(PARAMS)
    np.testing.assert_allclose(found, bound("sft", MODEL)(PARAMS, safe)[0], rtol=RTOL)


def test_padding_and_what_is_not_scored_change_neither_value_nor_gradient():
    slope = jax.jit(jax.value_and_grad(lambda params, batch: value(params, batch)[0]))
    expected = slope(PARAMS, BATCH)
    other = BATCH.replace(chosen=misread(BATCH.chosen), rejected=misread(BATCH.rejected))
    jax.tree.map(np.testing.assert_array_equal, slope(PARAMS, other), expected)
    np.testing.assert_allclose(slope(PARAMS, pairs(unsafe=UNSAFE, length=LENGTH + 6))[0], expected[0], rtol=RTOL)


@pytest.mark.parametrize("site", ["embeddings", pytest.param("layer", marks=pytest.mark.slow)])
def test_gradients_are_those_of_a_fixed_perturbation(site, monkeypatch):
    """In units of norms that do not move, either."""
    config = adversarial.Config(site=site, inner_steps=3, layer=0.5)
    found = jax.jit(lambda p: adversarial._found(MODEL, p, BATCH, config))(PARAMS)
    expected = jax.jit(jax.grad(lambda p: value(p, site=site)[0]))(PARAMS)
    monkeypatch.setattr(adversarial, "_found", lambda *_: found)
    fixed = jax.jit(jax.grad(lambda p: value(p, site=site)[0]))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fixed, expected)
    monkeypatch.setattr(adversarial, "norm", lambda h, axis: jnp.ones(h.shape[:-1]))
    check_grads(
        jax.jit(lambda p: value(p, site=site)[0]), (PARAMS,), order=1, modes=("rev",), atol=2e-3, rtol=2e-2, eps=1e-2
    )


def test_a_model_without_an_inside_is_refused():
    with pytest.raises(Unsupported, match="embed: this model has none"):
        bound("adversarial", lists.MODEL)(lists.PARAMS, BATCH)
