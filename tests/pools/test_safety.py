"""Safe and unsafe prompts with their answers: the coin that tells which."""

import jax
import numpy as np
import pytest

from jaxsafety.config.fields import at_point
from jaxsafety.pools import safety
from jaxsafety.types import Batch


@pytest.fixture(scope="module")
def draw_tune(tiny_world):
    """Batches by how the coin is tossed; one program, as all the rest is drawn alike."""

    @jax.jit
    def draw(key, step, p):
        fixed = {"key": key, "step": step, "batch_size": 64, "total_steps": 10}
        configs = {mix: at_point(safety.Config(mix=mix), {"p_unsafe": p}) for mix in ("prompt", "batch")}
        return {mix: safety.draw(tiny_world, config, **fixed) for mix, config in configs.items()}

    return lambda *given: jax.device_get(draw(*given))


def refused(built, batch: Batch):
    """Which answers hold a refusal: a block of the first letter throughout."""
    first = built.first_letter
    return np.asarray([(t[m][:-1] == first).all() for t, m in zip(batch.targets, batch.mask, strict=True)])


@pytest.mark.parametrize("mix", ["prompt", "batch"])
@pytest.mark.parametrize("p_unsafe", [0.0, 1.0])
def test_a_certain_coin_gives_one_kind_of_prompt(tiny_world, draw_tune, key, mix, p_unsafe):
    batch = draw_tune(key, 0, p_unsafe)[mix]
    assert (refused(tiny_world, batch.chosen) == bool(p_unsafe)).all()
    assert (refused(tiny_world, batch.rejected) == (not p_unsafe)).all()
    np.testing.assert_array_equal(batch.chosen.tokens[:, :5], batch.rejected.tokens[:, :5])


def test_the_coin_is_tossed_per_prompt_or_per_batch(tiny_world, draw_tune, key):
    drawn = [draw_tune(key, step, 0.5) for step in range(12)]
    unsafe = {
        mix: np.stack([refused(tiny_world, batches[mix].chosen) for batches in drawn]) for mix in ("prompt", "batch")
    }
    assert ((unsafe["prompt"].mean(1) > 0.2) & (unsafe["prompt"].mean(1) < 0.8)).all()
    assert set(unsafe["batch"].mean(1)) == {0.0, 1.0}
