"""One layer's weights out of a stack, in float32: the plain cast of the slice under every transformation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.models.widening import widened

DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]


def _stack(dtype, *lead):
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.standard_normal((*lead, 3, 4)), dtype),
        "b": {"c": jnp.asarray(rng.random((*lead, 3)))},
    }


def _scanned(take, stacked):
    """A product over layers of something nonlinear in each layer's weights."""

    def layer(carry, scanned):
        weights = take(*scanned)
        return carry * jnp.tanh(weights["a"]) + weights["b"]["c"], None

    carry = jnp.ones(4)
    return jax.lax.scan(layer, carry, (stacked, jnp.arange(3)))[0]


def _plain(stacked):
    return _scanned(lambda weights, _: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights), stacked)


def _widened(stacked):
    return _scanned(lambda weights, index: widened(weights, stacked=stacked, index=index), stacked)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_both_modes_of_derivatives_are_the_plain_casts(dtype):
    stacked = _stack(dtype)
    direction = jax.tree.map(lambda leaf: jnp.flip(leaf), stacked)
    for transform in (
        lambda f: f(stacked),
        lambda f: jax.grad(lambda s: f(s).sum())(stacked),
        lambda f: jax.jvp(f, (stacked,), (direction,)),
    ):
        got, expected = (jax.jit(partial(transform, f))() for f in (_widened, _plain))
        for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_is_jitted_and_vmapped_is_looped(dtype):
    stacked = _stack(dtype, 2)
    lanes = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(2)]
    looped = np.stack([jax.jit(_plain)(lane) for lane in lanes])
    np.testing.assert_array_equal(jax.jit(jax.vmap(_widened))(stacked), looped)
    np.testing.assert_allclose(_widened(lanes[0]), looped[0], rtol=1e-6)
