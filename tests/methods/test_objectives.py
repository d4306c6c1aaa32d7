"""Objectives: closed relations between them, oracles, shapes, gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety import keys, losses, methods, world
from jaxsafety.models import gpt
from jaxsafety.training import objective
from jaxsafety.training.branching import whole
from jaxsafety.types import Batch, Model, Output, PreferenceBatch
from tests.methods.bound import bound, next_token

# Two float32 programs that sum the same terms in another order.
RTOL = 2e-5
LOG_TWO = np.log(2)


def draw(world_, batch_size) -> PreferenceBatch:
    drawn = partial(world.mixed_at, world_, step=0, batch_size=batch_size, p_unsafe=0.5, mix="prompt")
    return jax.jit(lambda key: world.preferences(drawn(key=key)))(keys.root(0))


@pytest.fixture(scope="module")
def batch(tiny_world) -> PreferenceBatch:
    return draw(tiny_world, 8)


@pytest.fixture(scope="module")
def model(tiny_config, forward) -> Model:
    """Whose forward pass is compiled once."""
    return gpt.model(tiny_config)._replace(
        apply=lambda params, tokens: Output(forward(params, tokens), {}), branches=None
    )


@pytest.fixture(scope="module")
def forward(tiny_config):
    return jax.jit(lambda params, tokens: gpt.apply(params, tokens, config=tiny_config).logits)


@pytest.fixture(scope="module")
def other(tiny_config):
    return gpt.init(tiny_config, key=keys.root(7))


@pytest.fixture(scope="module")
def gradients(model, tiny_gpt, batch):
    """Those of all losses that tests compare; one program, in which they share the passes through the model."""
    unlearn = partial(bound, "unlearn", model, reduction="sum")
    compared = {
        "sft": bound("sft", model),
        "dpo": bound("dpo", model, reference=tiny_gpt, reduction="sum"),
        "unlearn": unlearn(),
        "no ascent": unlearn(weight_rejected=0.0),
        "bounded ascent": unlearn(weight_rejected=5.0, ascent_bound=1e-3),
        "bounded, no ascent": unlearn(weight_rejected=0.0, ascent_bound=1e-3),
    }

    @jax.jit
    def run(params, batch):
        return {name: jax.grad(lambda p, loss=loss: loss(p, batch)[0])(params) for name, loss in compared.items()}

    return jax.device_get(run(tiny_gpt, batch))


def side_logprobs(forward, params, side: Batch):
    """Summed response log-probs in float64."""
    logits = np.asarray(forward(params, side.tokens), np.float64)
    log_softmax = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    picked = np.take_along_axis(log_softmax, np.asarray(side.targets)[..., None], -1)[..., 0]
    return np.where(side.mask, picked, 0).sum(1), np.asarray(side.mask).sum(1)


def test_next_token_matches_numpy(forward, model, tiny_gpt, batch):
    value, metrics = next_token(model)(tiny_gpt, batch.chosen)
    total, count = side_logprobs(forward, tiny_gpt, batch.chosen)
    np.testing.assert_allclose(value, -total.sum() / count.sum(), rtol=RTOL)
    assert 0 <= metrics["token_accuracy"] <= 1


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_dpo_matches_numpy(forward, model, tiny_gpt, other, batch, reduction):
    weights = {"weight_chosen": 0.3, "weight_rejected": 0.05}
    loss = bound("dpo", model, reference=other, reduction=reduction, **weights)
    value, metrics = loss(tiny_gpt, batch)
    margins = []
    for side in (batch.chosen, batch.rejected):
        (policy, count), (reference, _) = (side_logprobs(forward, p, side) for p in (tiny_gpt, other))
        margins.append((policy - reference) / (count if reduction == "mean" else 1))
    logits = 0.3 * margins[0] - 0.05 * margins[1]
    np.testing.assert_allclose(value, np.logaddexp(0, -logits).mean(), rtol=RTOL)
    np.testing.assert_allclose(metrics["rewards/margins"], logits.mean(), rtol=1e-3, atol=1e-5)


def test_dpo_at_the_reference_is_log_two(forward, model, tiny_gpt, batch):
    loss = bound("dpo", model, reference=tiny_gpt, reduction="sum")
    value, metrics = loss(tiny_gpt, batch)
    np.testing.assert_allclose(value, LOG_TWO, rtol=RTOL)
    assert metrics["rewards/margins"] == 0


def test_dpo_sends_no_gradient_into_the_reference(forward, model, tiny_gpt, other, batch):
    def value(reference):
        return bound("dpo", model, reference=reference, reduction="sum")(tiny_gpt, batch)[0]

    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.device_get(jax.jit(jax.grad(value))(other))))


def test_unlearning_without_ascent_is_nll_of_the_preferred_side(forward, model, tiny_gpt, batch):
    loss = bound("unlearn", model, weight_rejected=0.0, reduction="sum")
    total, _ = side_logprobs(forward, tiny_gpt, batch.chosen)
    np.testing.assert_allclose(loss(tiny_gpt, batch)[0], -total.mean(), rtol=RTOL)


def test_unlearning_without_ascent_has_the_gradient_of_sft(gradients, batch):
    """Up to the constant between per-prompt and per-token means."""
    scale = np.asarray(batch.chosen.mask).sum() / batch.chosen.mask.shape[0]
    scaled = jax.tree.map(lambda g: g * scale, gradients["sft"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), gradients["no ascent"], scaled)


def test_unlearning_matches_numpy(forward, model, tiny_gpt, batch):
    loss = bound("unlearn", model, weight_chosen=0.7, weight_rejected=0.2, reduction="mean")
    (chosen, n_chosen), (rejected, n_rejected) = (
        side_logprobs(forward, tiny_gpt, side) for side in (batch.chosen, batch.rejected)
    )
    expected = (-0.7 * chosen / n_chosen + 0.2 * rejected / n_rejected).mean()
    np.testing.assert_allclose(loss(tiny_gpt, batch)[0], expected, rtol=RTOL)


def test_bounded_ascent_stops_pushing(gradients):
    """With a bound below every token's NLL the dispreferred side has no gradient left."""
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gradients["bounded ascent"], gradients["bounded, no ascent"])


def test_dpo_near_the_reference_is_parallel_to_unlearning(gradients):
    """At policy == reference the slope of the sigmoid is 1/2 everywhere."""
    halved = jax.tree.map(lambda g: g / 2, gradients["unlearn"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), gradients["dpo"], halved)


@pytest.mark.parametrize("kind", ["sft", "dpo", "unlearn"])
def test_gradients_against_finite_differences(tiny_world, batch, key, kind):
    config = gpt.GPTConfig(
        vocab_size=tiny_world.vocab_size, max_tokens=tiny_world.max_tokens, layers=1, heads=1, width=4
    )
    params = gpt.init(config, key=key)

    model, batch = gpt.model(config), jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf)[:2], batch))
    loss = {
        "sft": bound("sft", model),
        "dpo": bound("dpo", model, reference=params, reduction="mean"),
        "unlearn": bound("unlearn", model, reduction="mean"),
    }[kind]
    value = jax.jit(lambda p: loss(p, batch)[0])
    check_grads(value, (params,), order=1, modes=("rev",), atol=2e-3, rtol=2e-2, eps=1e-2)


def test_masked_positions_do_not_matter(forward, model, tiny_gpt, batch):
    """Targets outside the mask can be anything."""
    replaced = jax.device_put(np.where(batch.chosen.mask, batch.chosen.targets, np.int32(3)))
    scrambled = batch.chosen.replace(targets=replaced)
    loss = next_token(model)
    assert loss(tiny_gpt, batch.chosen)[0] == loss(tiny_gpt, scrambled)[0]


def test_loss_of_a_batch_with_nothing_scored_is_zero(forward, model, tiny_gpt, batch):
    empty = batch.chosen.replace(mask=jax.device_put(np.zeros_like(batch.chosen.mask)))
    assert next_token(model)(tiny_gpt, empty)[0] == 0
    assert losses.quotient(jnp.float32(0), jnp.float32(0)) == 0


@pytest.mark.parametrize("kind", ["dpo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("unlearn", "sft"))])
def test_a_shared_stem_changes_no_loss_and_no_gradient(tiny_config, tiny_gpt, other, batch, kind):
    """What both answers begin with is read once; of it there are no log-probs."""
    given = {"reference": other} if kind == "dpo" else {}
    run = jax.jit(jax.value_and_grad(bound(kind, gpt.model(tiny_config), **given), has_aux=True))
    assert batch.chosen.stem and whole(batch).chosen.stem == 0
    (got, gradient), (expected, expected_gradient) = run(tiny_gpt, batch), run(tiny_gpt, whole(batch))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=RTOL, atol=RTOL), got, expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=RTOL), gradient, expected_gradient)


def test_a_transform_may_change_what_answers_share(batch):
    def swapped(batch, *, key, config):
        return batch.replace(rejected=batch.rejected.replace(tokens=batch.rejected.tokens[::-1]))

    method = methods.load("dpo")._replace(data=swapped)
    changed = objective.transformed(method, batch, None, key=keys.root(0))
    assert (changed.chosen.stem, changed.rejected.stem) == (0, 0) != (batch.chosen.stem, batch.rejected.stem)
