"""The gated recurrent unit against a loop in float64, gate by gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys
from jaxsafety.models import gru

RTOL = 1e-12  # float64
D, F = 3, 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), gru.init(inputs=D, width=F, key=keys.root(0)))


def test_states_are_those_of_a_loop(params):
    x = np.random.default_rng(1).normal(size=(2, 5, D))
    reset, update, candidate = (slice(i * F, (i + 1) * F) for i in range(3))
    expected = np.zeros((2, 5, F))
    for row in range(2):
        h = np.zeros(F)
        for t in range(5):

            def of(gate, h=h, read=x[row, t]):
                return read @ params["reads"][:, gate] + params["bias"][gate], h @ params["keeps"][:, gate]  # fmt: skip

            r, z = sigmoid(sum(of(reset))), sigmoid(sum(of(update)))
            read, kept = of(candidate)
            h = (1 - z) * np.tanh(read + r * kept) + z * h
            expected[row, t] = h
    with jax.enable_x64(True):
        found = gru.gru(params, jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_what_comes_later_changes_nothing(params):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, D)), jnp.float32)
    params = jax.tree.map(jnp.float32, params)
    np.testing.assert_array_equal(gru.gru(params, x)[:, :3], gru.gru(params, x[:, :3]))
