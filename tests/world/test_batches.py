"""The draws of a world's batches: their independence, preferences, mixtures that are none."""

import jax
import numpy as np
import pytest

from jaxsafety import keys, world


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.fixture(scope="module")
def draw_safe(tiny_world):
    return jax.jit(lambda key, step: world.batch_at(tiny_world, "safe", key=key, step=step, batch_size=16))


def test_a_draw_is_a_function_of_key_and_step(draw_safe, key):
    first, again = draw_safe(key, 4), draw_safe(key, 4)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for other in (draw_safe(key, 5), draw_safe(keys.root(1), 4)):
        assert not np.array_equal(first.prompt.letters, other.prompt.letters)


def test_streams_draw_different_data_at_the_same_step(draw_safe, key):
    letters = [np.asarray(draw_safe(keys.stream(key, name), 0).prompt.letters) for name in ("evaluate", "tune")]
    assert not np.array_equal(*letters)


def test_keys_of_single_prompts_are_never_shared_between_training_and_evaluation(key):
    """A batch splits its step's key per prompt: no prompt of one stream may meet one of another."""
    seen = set()
    for name in ("pretrain", "tune", "evaluate"):
        for step in range(3):
            for one in jax.random.split(keys.at_step(keys.stream(key, name), step), 16):
                seen.add(bits(one))
    assert len(seen) == 3 * 3 * 16


def test_preferences_swap_the_answers_of_unsafe_prompts(draw_safe, key):
    trial = jax.device_get(draw_safe(key, 0))
    trial = trial.replace(unsafe=np.arange(16) % 2 == 0)
    pair = jax.device_get(jax.jit(world.preferences)(trial))
    for i in range(16):
        chosen, rejected = (trial.refused, trial.complied) if i % 2 == 0 else (trial.complied, trial.refused)
        for side, expected in ((pair.chosen, chosen), (pair.rejected, rejected)):
            for name in ("tokens", "targets", "mask"):
                np.testing.assert_array_equal(getattr(side, name)[i], getattr(expected, name)[i])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mix": "promt"}, "^unknown mix 'promt': expected one of prompt, batch; did you mean 'prompt'"),
        ({"p_unsafe": 1.5}, r"^p_unsafe must be in \[0, 1\], got 1.5$"),
    ],
)
def test_a_mixture_that_is_none_is_refused(tiny_world, given, message):
    how = {"step": 0, "batch_size": 2, "p_unsafe": 0.5, "mix": "prompt"} | given
    with pytest.raises(ValueError, match=message):
        world.mixed_at(tiny_world, key=keys.root(0), **how)
