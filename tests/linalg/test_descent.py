"""Steps of norm one and projections onto a ball, against NumPy and at their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.linalg import descent

VECTORS = jnp.float32([[3.0, -4.0], [0.0, 0.0], [0.3, 0.4], [1e-30, 0.0]])


def test_vectors_have_norm_one_however_small_and_zero_stays_zero():
    np.testing.assert_allclose(descent.unit(VECTORS), [[0.6, -0.8], [0, 0], [0.6, 0.8], [1, 0]], rtol=1e-6)


@pytest.mark.parametrize(("radius", "expected"), [(1.0, [[0.6, -0.8], [0, 0], [0.3, 0.4], [1e-30, 0]]), (0.0, 0.0)])
def test_the_nearest_point_of_a_ball(radius, expected):
    np.testing.assert_allclose(
        descent.projected(VECTORS, radius=radius), np.broadcast_to(expected, VECTORS.shape), rtol=1e-6, atol=1e-20
    )


def test_both_have_gradients_at_zero():
    for function in (descent.unit, lambda x: descent.projected(x, radius=0.5)):
        assert np.isfinite(jax.grad(lambda x, f=function: jnp.sum(f(x)))(jnp.zeros((1, 2)))).all()
