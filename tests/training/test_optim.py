"""Schedules and optimisers: closed forms, traced peaks, per-layer Muon, decay masks."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from jaxsafety import tree
from jaxsafety.training import optim
from jaxsafety.training.optim import OptimConfig

# float32 schedules and five Newton-Schulz iterations.
RTOL = 1e-4


def test_schedule_hits_its_corners():
    config = OptimConfig(warmup=0.2, decay_end=0.8, floor=0.01)
    schedule = optim.unit_schedule(config, total_steps=100)
    at = [float(schedule(step)) for step in (0, 10, 20, 50, 80, 99)]
    np.testing.assert_allclose(at, [0, 0.5, 1.0, 0.505, 0.01, 0.01], rtol=RTOL)


def test_schedule_equals_optax_where_optax_can():
    config = OptimConfig(warmup=0.1, decay_end=1.0, floor=0.1)
    reference = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=100, end_value=0.1)
    got = [optim.unit_schedule(config, total_steps=100)(step) for step in range(0, 100, 7)]
    np.testing.assert_allclose(got, [reference(step) for step in range(0, 100, 7)], rtol=RTOL, atol=1e-6)


def test_no_warmup_starts_at_the_peak():
    assert optim.unit_schedule(OptimConfig(warmup=0.0), total_steps=10)(0) == 1.0


@pytest.mark.parametrize("total_steps", [1, 9])
def test_a_warmup_of_less_than_a_step_is_none(total_steps):
    """A run of one step would be of rate 0."""
    assert optim.unit_schedule(OptimConfig(warmup=0.1), total_steps=total_steps)(0) == 1.0


def first_update(optimizer, grads, params):
    return optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_peak_may_be_traced_and_scales_the_update(tiny_gpt, algorithm):
    config = OptimConfig(algorithm=algorithm, warmup=0.0, weight_decay=0.0)
    grads = jax.tree.map(jnp.ones_like, tiny_gpt)

    @jax.jit
    def update(peak):
        return first_update(optim.make_optimizer(config, peak_lr=peak, total_steps=10), grads, tiny_gpt)

    small, large = update(1e-3), update(2e-3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=RTOL), large, jax.tree.map(lambda u: 2 * u, small))


def test_muon_treats_every_layer_as_its_own_matrix(tiny_gpt):
    """Orthogonalising the stack equals orthogonalising each layer alone."""
    config = OptimConfig(algorithm="muon", warmup=0.0, weight_decay=0.0, clip_norm=np.inf)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), tiny_gpt)
    optimizer = optim.make_optimizer(config, peak_lr=0.02, total_steps=10)
    alone = muon(0.02, beta=config.momentum)
    stacked, update = (jax.jit(partial(first_update, one)) for one in (optimizer, alone))
    updates = stacked(grads, tiny_gpt)["blocks"]["mlp"]["up"]
    for layer in range(updates.shape[0]):
        gradient, weight = ({"w": np.asarray(side["blocks"]["mlp"]["up"])[layer]} for side in (grads, tiny_gpt))
        np.testing.assert_allclose(updates[layer], update(gradient, weight)["w"], rtol=RTOL, atol=1e-6)


def test_factors_of_an_adapter_are_matrices():
    """They decay, and Muon takes them; Adam's first update would be its rate in every entry."""
    draw = np.random.default_rng(0).normal
    ones = {"blocks": {"attn": {"q_lora_a": np.ones((2, 8, 3)), "q_lora_b": np.ones((2, 3, 8))}}}
    grads = jax.tree.map(lambda leaf: draw(size=leaf.shape).astype(np.float32), ones)
    config = OptimConfig(algorithm="muon", warmup=0.0, weight_decay=0.1, clip_norm=np.inf)
    updates, alone = (
        jax.jit(partial(first_update, optimizer))(given, params)
        for optimizer, given, params in (
            (optim.make_optimizer(config, peak_lr=0.02, total_steps=10), grads, ones),
            (muon(0.02, beta=config.momentum, weight_decay=0.1),
             *({"w": side["blocks"]["attn"]["q_lora_a"][1]} for side in (grads, ones))),
        )
    )  # fmt: skip
    np.testing.assert_allclose(updates["blocks"]["attn"]["q_lora_a"][1], alone["w"], rtol=RTOL, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_only_matrices_decay(tiny_gpt, algorithm):
    config = OptimConfig(algorithm=algorithm, warmup=0.0, weight_decay=0.1)
    zero, ones = (jax.tree.map(partial(np.full_like, fill_value=value), tiny_gpt) for value in (0, 1))
    optimizer = optim.make_optimizer(config, peak_lr=1.0, total_steps=10)
    updates = tree.flatten(jax.jit(partial(first_update, optimizer))(zero, ones))
    decayed = {path for path, update in updates.items() if np.any(np.asarray(update) != 0)}
    matrices = {path for path in updates if re.fullmatch(r"blocks/(attn/[qkvo]|mlp/(up|down))", path)}
    assert decayed == (matrices | {"unembed"} if algorithm == "adamw" else matrices)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("warmup", -0.1),
        ("warmup", 1.0),
        ("clip_norm", 0.0),
        ("clip_norm", np.nan),
        ("floor", 2.0),
        ("weight_decay", -1.0),
    ],
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        OptimConfig(**{field: value})
