"""Steering along a direction of refusing, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import world
from jaxsafety.attacks import steering
from jaxsafety.linalg.contrasts import direction
from jaxsafety.models import gpt
from jaxsafety.types import Target

# float32 sums over a few tens of numbers of order 1.
ATOL = 1e-5


def test_it_turns_and_keeps_the_norm():
    h = jnp.asarray([[[3.0, 0.0], [0.0, 4.0]]])
    found = steering.steered(h, jnp.asarray([0.0, 1.0]), alpha=1.0)
    # (3, 3) of norm 3, and (0, 8) of norm 4.
    np.testing.assert_allclose(found[0], [[3 / np.sqrt(2)] * 2, [0, 4]], atol=ATOL)
    away = steering.steered(h, jnp.asarray([0.0, 1.0]), alpha=-1.0)
    np.testing.assert_allclose(away[0], [[3 / np.sqrt(2), -3 / np.sqrt(2)], [0, 0]], atol=ATOL)


def test_not_at_all_is_the_activation_bit_for_bit():
    h = jax.random.normal(jax.random.key(0), (2, 3, 5))
    np.testing.assert_array_equal(steering.steered(h, jnp.full(5, 0.3), alpha=jnp.float32(0)), h)


@pytest.mark.parametrize("level", ["prompts", "answers"])
def test_differences_are_read_where_they_are_said_to_be(tiny_config, tiny_gpt, tiny_world, key, level):
    model = gpt.model(tiny_config)
    safe, unsafe = (world.batch_at(tiny_world, name, key=key, step=0, batch_size=3) for name in ("safe", "unsafe"))
    held_out = jax.tree.map(lambda *sides: jnp.stack(sides), safe, unsafe)
    found = steering.differences(model, tiny_gpt, held_out, level=level)

    def read(tokens):
        return np.asarray(model.apply(tiny_gpt, tokens, sites=("hook_resid_post",)).activations["hook_resid_post"])

    for i in range(3):
        if level == "prompts":
            first, second = (read(one.complied.tokens)[:, i, one.last[i]] for one in (unsafe, safe))
        else:
            sides = (unsafe.refused, unsafe.complied)
            first, second = (read(side.tokens)[:, i, np.flatnonzero(side.mask[i])].mean(axis=1) for side in sides)
        np.testing.assert_allclose(found[:, i], first - second, atol=ATOL)


def test_every_layer_is_moved_along_its_own_direction(tiny_config, tiny_gpt, tiny_world, key):
    model, config = gpt.model(tiny_config), steering.Config()
    trial = world.batch_at(tiny_world, "unsafe", key=key, step=1, batch_size=2)
    pairs = [world.batch_at(tiny_world, name, key=key, step=0, batch_size=3) for name in ("safe", "unsafe")]
    held_out = jax.tree.map(lambda *sides: jnp.stack(sides), *pairs)
    target = Target(model, tiny_gpt, tiny_gpt, trial, 0, held_out)

    def run(alpha):
        done = steering.attack(target, config, point={"alpha": jnp.float32(alpha)}, key=key)
        tokens = trial.complied.tokens
        return model.apply(tiny_gpt, tokens, edit=done.edit, sites=("hook_resid_post",)).activations["hook_resid_post"]

    plain, far = (np.asarray(run(alpha), np.float64) for alpha in (0.0, 1e6))
    untouched = model.apply(tiny_gpt, trial.complied.tokens, sites=("hook_resid_post",)).activations
    np.testing.assert_array_equal(plain, untouched["hook_resid_post"])
    # So far that nothing else is left of it.
    units = np.asarray(direction(steering.differences(model, tiny_gpt, held_out, level="prompts")))
    turned = far / np.linalg.norm(far, axis=-1, keepdims=True)
    np.testing.assert_allclose(turned, np.broadcast_to(units[:, None, None], turned.shape), atol=1e-4)
