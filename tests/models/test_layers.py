"""Layers against NumPy float64 versions written as loops, closed forms and transformation laws."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety.models import layers as nn

F32 = 2e-6  # a few float32 roundings of values of order one
TABLE = 2e-5  # sines of angles up to 200: half a float32 ulp of the angle is 8e-6
GRAD = 5e-3  # finite differences of float32 functions

attention = jax.jit(nn.causal_attention)
layer_norm = jax.jit(nn.layer_norm)
rope_table = jax.jit(nn.rope_table, static_argnums=(0, 1), static_argnames="base")
rotate = jax.jit(nn.rotate)


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_linear_is_affine():
    x, kernel, bias = _normal(0, 5, 3), _normal(1, 3, 4), _normal(2, 4)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    np.testing.assert_allclose(nn.linear(x, kernel, bias=bias), expected, atol=F32)


def test_product_runs_in_the_dtype_of_the_weights_and_returns_float32():
    jaxpr = jax.make_jaxpr(nn.project)(_normal(0, 5, 3), _normal(1, 3, 4).astype(jnp.bfloat16))
    (dot,) = (eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general")
    assert [v.aval.dtype for v in dot.invars] == [jnp.bfloat16, jnp.bfloat16]
    assert dot.outvars[0].aval.dtype == jnp.float32


def test_layer_norm_matches_float64_rows_and_keeps_epsilon():
    # The last row varies by less than sqrt(eps), so a wrong epsilon shows.
    x = jnp.asarray(np.concatenate([3.0 + 10.0 * _normal(0, 4, 6), 1e-3 * _normal(1, 1, 6)]))
    scale, bias = _normal(2, 6), _normal(3, 6)
    actual = layer_norm(x, scale=scale, bias=bias)
    for row, got in zip(np.asarray(x, np.float64), actual, strict=True):
        normal = (row - row.mean()) / math.sqrt(row.var() + 1e-5)
        np.testing.assert_allclose(got, normal * np.asarray(scale) + np.asarray(bias), atol=2 * F32)


def test_layer_norm_of_a_constant_row_is_the_bias():
    bias = _normal(0, 6)
    actual = layer_norm(jnp.full((1, 6), 0.5), scale=jnp.ones(6), bias=bias)
    np.testing.assert_array_equal(actual[0], bias)


def test_gelu_is_the_tanh_approximation_not_the_error_function():
    for x in (-3.0, -0.5, 0.0, 1.0, 2.0):
        expected = 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        assert float(nn.gelu(jnp.float32(x))) == pytest.approx(expected, abs=F32)
    exact = 0.5 * 2.0 * (1 + math.erf(2.0 / math.sqrt(2)))
    assert abs(float(nn.gelu(jnp.float32(2.0))) - exact) > 5e-5


def _attention_oracle(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = np.array([q[b, t, n] @ k[b, u, n] for u in range(t + 1)]) / math.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = sum(w * v[b, u, n] for u, w in enumerate(weights / weights.sum()))
    return out


def test_attention_matches_loops_over_positions_and_heads():
    q, k, v = (2.0 * _normal(seed, 2, 5, 3, 4) for seed in range(3))
    np.testing.assert_allclose(attention(q, keys=k, values=v), _attention_oracle(q, k, v), atol=5 * F32)


def test_attention_survives_scores_beyond_the_range_of_exp():
    q, k, v = (100.0 * _normal(seed, 1, 4, 1, 2) for seed in range(3))
    actual = attention(q, keys=k, values=v)
    np.testing.assert_allclose(actual, _attention_oracle(q, k, v), rtol=1e-3)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(attention(x, keys=k, values=v))))(q)
    assert np.isfinite(gradient).all()


def test_attention_with_equal_scores_is_the_running_mean():
    values = _normal(0, 1, 6, 1, 2)
    zeros = jnp.zeros_like(values)
    expected = np.cumsum(np.asarray(values), axis=1) / np.arange(1, 7)[None, :, None, None]
    np.testing.assert_allclose(attention(zeros, keys=zeros, values=values), expected, atol=F32)


def test_sinusoidal_table_closed_form():
    table = nn.sinusoidal_table(160, 6)
    for position in (0, 1, 17, 159):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            np.testing.assert_allclose(table[position, 2 * i], math.sin(angle), atol=TABLE)
            np.testing.assert_allclose(table[position, 2 * i + 1], math.cos(angle), atol=TABLE)


def test_rope_rotates_pairs_of_halves():
    x = _normal(0, 1, 5, 2, 4)
    actual = rotate(x, rope_table(5, 4, base=100.0))
    for t, n, i in np.ndindex(5, 2, 2):
        turned = complex(x[0, t, n, i], x[0, t, n, i + 2]) * np.exp(1j * t / 100.0 ** (2 * i / 4))
        np.testing.assert_allclose(actual[0, t, n, i], turned.real, atol=F32)
        np.testing.assert_allclose(actual[0, t, n, i + 2], turned.imag, atol=F32)


def test_rope_inner_products_depend_on_distance_only():
    q, k = (jnp.asarray(np.tile(_normal(seed, 1, 1, 1, 8), (1, 40, 1, 1))) for seed in range(2))
    table = rope_table(40, 8)
    products = np.einsum("btnk,bunk->tu", rotate(q, table), rotate(k, table))
    for distance in (-7, 0, 3, 20):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, np.full_like(diagonal, diagonal[0]), atol=TABLE)
    assert abs(products[0, 0] - products[0, 3]) > 0.1


def test_first_position_is_not_rotated():
    x = _normal(0, 1, 1, 2, 4)
    np.testing.assert_array_equal(rotate(x, rope_table(1, 4)), x)


def _attend(x):
    return nn.causal_attention(x, keys=x + 0.1, values=x * x)


CLOSURE = {
    "linear": (lambda x: nn.linear(x, _normal(1, 4, 3), bias=_normal(2, 3)), (5, 4)),
    "layer_norm": (lambda x: nn.layer_norm(x, scale=_normal(1, 4), bias=_normal(2, 4)), (5, 4)),
    "gelu": (nn.gelu, (5, 4)),
    "causal_attention": (_attend, (2, 3, 2, 4)),
    "rotate": (lambda x: nn.rotate(x, nn.rope_table(3, 4)), (2, 3, 2, 4)),
}


@pytest.mark.parametrize("name", CLOSURE)
def test_jit_vmap_and_gradients(name):
    function, shape = CLOSURE[name]
    x = _normal(0, 3, *shape)
    eager = np.stack([function(lane) for lane in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(function))(x), eager, atol=10 * F32)
    check_grads(jax.jit(function), (x[0],), order=1, modes=["fwd", "rev"], atol=GRAD, rtol=GRAD)
