"""Programs that are compiled fast, for what runs once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys
from jaxsafety.engine import programs
from jaxsafety.engine.programs import Grid
from jaxsafety.linalg import svd

# The same float32 sums, fused and contracted otherwise.
RTOL = 1e-5


def lane(_, key, scale):
    drawn = jax.random.normal(key, (3, 8, 5))
    return {"values": svd.decompose(scale * drawn).values, "words": jax.random.bits(key, (4,))}


@pytest.mark.parametrize("strategy", ["map", "vmap", "sharded"])
def test_a_quick_program_computes_the_same(strategy):
    grid = Grid((0, 1), 2, strategy)
    roots, points = jax.vmap(keys.root)(jnp.arange(2)), jnp.array([1.0, 2.0])
    found, expected = (
        programs.program(lane, grid=grid, quick=quick)(grid.zeros(), roots, points) for quick in (True, False)
    )
    np.testing.assert_array_equal(found["words"], expected["words"])
    np.testing.assert_allclose(found["values"], expected["values"], rtol=RTOL)


def test_a_quick_program_may_be_part_of_a_trace():
    """Where compiler options cannot be given: shapes are asked without computing anything."""
    grid = Grid((0, 1), 1, "map")
    run = programs.program(lane, grid=grid, quick=True)
    shapes = jax.eval_shape(lambda: run(grid.zeros(), jax.vmap(keys.root)(jnp.arange(2)), jnp.ones(1)))
    assert shapes["values"].shape == (1, 2, 3, 5)
