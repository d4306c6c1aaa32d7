"""The readings of JB-MisGen beside the condition of that name, and beside what a released pool holds."""

import jax
import numpy as np
import pytest

from jaxsafety import keys, world
from jaxsafety.attacks import misgen

DRAWS = 512
# Five standard errors of the share below from 512.
SHARE_ATOL = 0.035


@pytest.fixture(scope="module")
def drawn(tiny_world):
    """The same keys in every reading."""
    own = {reading: misgen.condition(misgen.Config(reading)) for reading in ("drawn", "released")}

    @jax.jit
    def draw(key):
        how = {"key": key, "step": 0, "batch_size": DRAWS}
        return {name: world.batch_at(tiny_world, one, **how) for name, one in ({"defined": "jb_misgen"} | own).items()}

    return jax.device_get(draw(keys.root(0)))


def test_the_pool_as_drawn_is_the_condition_but_for_what_is_drawn_again(drawn):
    """P(no task is unsafe): all four are the one harmless duplicate of three, or the anchor and three of them."""
    asks = drawn["drawn"].unsafe
    np.testing.assert_array_equal(drawn["drawn"].prompt.letters, drawn["defined"].prompt.letters)
    same = (drawn["drawn"].prompt.tasks == drawn["defined"].prompt.tasks).all(axis=1)
    assert same[asks].all() and not same[~asks].any() and drawn["defined"].unsafe.all()
    np.testing.assert_allclose((~asks).mean(), 0.5 * (1 / 3**4 + 1 / 3**3), atol=SHARE_ATOL)


def test_the_released_pool_holds_ordinary_safe_operators(tiny_world, drawn):
    trial, spec = drawn["released"], tiny_world.spec
    assert not trial.unsafe.any()
    np.testing.assert_array_equal(trial.prompt.letters, drawn["defined"].prompt.letters)
    for i in range(DRAWS):
        safe = {spec.operators[0], *spec.policies[int(trial.prompt.pcfg[i])].safe("safe")}
        assert {spec.tokens[task] for task in trial.prompt.tasks[i]} <= safe


@pytest.mark.usefixtures("unchecked")
def test_the_prompts_are_judged_as_they_are():
    assert misgen.attack(None, misgen.Config(), point={}, key=None) == misgen.Attacked()
