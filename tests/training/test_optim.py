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


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_peak_may_be_traced_and_scales_the_update(tiny_gpt, algorithm):
    config = OptimConfig(algorithm=algorithm, warmup=0.0, weight_decay=0.0)
    grads = jax.tree.map(jnp.ones_like, tiny_gpt)

    @jax.jit
    def first_update(peak):
        optimizer = optim.make_optimizer(config, peak_lr=peak, total_steps=10)
        return optimizer.update(grads, optimizer.init(tiny_gpt), tiny_gpt)[0]

    small, large = first_update(1e-3), first_update(2e-3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=RTOL), large, jax.tree.map(lambda u: 2 * u, small))


def test_muon_treats_every_layer_as_its_own_matrix(tiny_gpt):
    """Orthogonalising the stack equals orthogonalising each layer alone."""
    config = OptimConfig(algorithm="muon", warmup=0.0, weight_decay=0.0, clip_norm=np.inf)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), tiny_gpt)
    optimizer = optim.make_optimizer(config, peak_lr=0.02, total_steps=10)
    stacked = optimizer.update(grads, optimizer.init(tiny_gpt), tiny_gpt)[0]["blocks"]["mlp"]["up"]
    alone = muon(0.02, beta=config.momentum)
    for layer in range(stacked.shape[0]):
        weight = {"w": tiny_gpt["blocks"]["mlp"]["up"][layer]}
        update = alone.update({"w": grads["blocks"]["mlp"]["up"][layer]}, alone.init(weight), weight)[0]["w"]
        np.testing.assert_allclose(stacked[layer], update, rtol=RTOL, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_only_matrices_decay(tiny_gpt, algorithm):
    config = OptimConfig(algorithm=algorithm, warmup=0.0, weight_decay=0.1)
    ones = jax.tree.map(jnp.ones_like, tiny_gpt)
    optimizer = optim.make_optimizer(config, peak_lr=1.0, total_steps=10)
    zero = jax.tree.map(jnp.zeros_like, tiny_gpt)
    updates = tree.flatten(optimizer.update(zero, optimizer.init(ones), ones)[0])
    decayed = {path for path, update in updates.items() if jnp.any(update != 0)}
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
