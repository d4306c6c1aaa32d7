"""Layers against NumPy float64 versions written as loops, closed forms and transformation laws."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety.models import layers as nn

F32 = 2e-6  # a few float32 roundings of values of order one
TABLE = 2e-5  # sines of angles up to 200: half a float32 ulp of the angle is 8e-6
GRAD = 5e-3  # finite differences of float32 functions
U16 = 2**-8  # bfloat16 has 8 significant bits: rounding moves a number by at most this share of it
PRODUCT16 = 2 * U16 + U16**2  # so a product of two rounded numbers is off by at most this share
GRAD16 = 2**-5  # of a gradient's norm: some tens of roundings of U16 / 2, which partly cancel

attention = jax.jit(nn.causal_attention)
layer_norm = jax.jit(nn.layer_norm)
rope_table = jax.jit(nn.rope_table, static_argnums=(0, 1), static_argnames="base")
rotate = jax.jit(nn.rotate)
grouped = jax.jit(nn.grouped_attention)
visibility = jax.jit(nn.visibility, static_argnames="window")
real_positions = jax.jit(nn.real_positions)


def _normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("shape", [(3, 4), (4, 3)], ids=["wide", "tall"])
def test_linear_is_affine_and_so_is_its_gradient(shape):
    x, kernel, bias, cotangent = (
        _normal(0, 5, shape[0]),
        _normal(1, *shape),
        _normal(2, shape[1]),
        _normal(3, 5, shape[1]),
    )
    actual, transpose = jax.vjp(lambda *args: nn.linear(args[0], args[1], bias=args[2]), x, kernel, bias)
    x, kernel, bias, ct = (np.asarray(array, np.float64) for array in (x, kernel, bias, cotangent))
    np.testing.assert_allclose(actual, x @ kernel + bias, atol=F32)
    for got, expected in zip(transpose(cotangent), (ct @ kernel.T, x.T @ ct, ct.sum(0)), strict=True):
        np.testing.assert_allclose(got, expected, atol=2 * F32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tall_linear_map_is_the_projection_under_vmap_too(dtype):
    def gradients(project):
        def loss(x, kernel):
            return jnp.sum(jnp.tanh(project(x, kernel)))

        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1))))(_normal(0, 2, 5, 4), _normal(1, 2, 4, 3))

    tall = gradients(lambda x, kernel: nn.linear(x, kernel, bias=jnp.zeros(3), dtype=dtype))
    for got, expected in zip(tall, gradients(partial(nn.project, dtype=dtype)), strict=True):
        np.testing.assert_allclose(got, expected, atol=F32)


# Every product of the models, and shapes of its operands. Two are attention's backward pass as XLA sees it.
PRODUCTS = {
    "ri,io->ro": ((6, 5), (5, 4)),
    "btnk,bunk->bntu": ((2, 7, 3, 4), (2, 7, 3, 4)),
    "bntu,bunk->btnk": ((2, 3, 7, 7), (2, 7, 3, 4)),
    "btnk,bntu->bunk": ((2, 7, 3, 4), (2, 3, 7, 7)),
    "bntu,btnk->bunk": ((2, 3, 7, 7), (2, 7, 3, 4)),
    "ri,oi->ro": ((6, 5), (4, 5)),
    "btgjk,bugk->bgjtu": ((2, 7, 3, 2, 4), (2, 5, 3, 4)),
    "bgjtu,bugk->btgjk": ((2, 3, 2, 7, 5), (2, 5, 3, 4)),
}


def _rounded(x):
    """To bfloat16 by NumPy, whose conversion is another one than XLA's."""
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float64)


@cache
def _value_and_gradients(spec, dtype):
    def run(left, right, cotangent):
        value, transpose = jax.vjp(partial(nn.product, spec, dtype=dtype), left, right)
        return value, *transpose(cotangent)

    return jax.jit(run)


def _operands(spec):
    left, right = (_normal(seed, *shape) for seed, shape in enumerate(PRODUCTS[spec]))
    return left, right, _normal(2, *np.einsum(spec, left, right).shape)


def _product_oracle(spec, left, right, cotangent):
    """Value and both gradients in float64; each gradient is the derivative of the sum over ``cotangent * value``."""
    (one, other), result = spec.split("->")[0].split(","), spec.split("->")[1]
    return (
        np.einsum(f"{one},{other}->{result}", left, right),
        np.einsum(f"{other},{result}->{one}", right, cotangent),
        np.einsum(f"{one},{result}->{other}", left, cotangent),
    )


@pytest.mark.parametrize("spec", PRODUCTS)
def test_bfloat16_products_are_those_of_rounded_factors_in_both_passes(spec):
    given = _operands(spec)
    expected = _product_oracle(spec, *map(_rounded, given))
    for got, exact in zip(_value_and_gradients(spec, "bfloat16")(*given), expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, exact, atol=5 * F32)


@pytest.mark.parametrize(("dtype", "share"), [("float32", F32), ("bfloat16", PRODUCT16)])
@pytest.mark.parametrize("spec", PRODUCTS)
def test_products_are_off_by_no_more_than_their_factors_rounding(spec, dtype, share):
    given = [np.asarray(x, np.float64) for x in _operands(spec)]
    exact, size = _product_oracle(spec, *given), _product_oracle(spec, *map(np.abs, given))
    for got, value, magnitude in zip(_value_and_gradients(spec, dtype)(*_operands(spec)), exact, size, strict=True):
        assert np.all(np.abs(got - value) <= share * magnitude + F32)
        # What float32 meets, bfloat16 must not, or nothing would have been rounded.
        assert (dtype == "float32") == bool(np.all(np.abs(got - value) <= 10 * F32 * magnitude))


def test_bfloat16_products_of_seeds_are_the_products_of_each():
    def gradient(left, right):
        return jax.grad(lambda x: jnp.sum(jnp.tanh(nn.project(x, right, dtype="bfloat16"))))(left)

    left, right = _normal(0, 3, 6, 5), _normal(1, 3, 5, 4)
    one = jax.jit(gradient)
    looped = np.stack([one(*pair) for pair in zip(np.asarray(left), np.asarray(right), strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(left, right), looped, atol=F32)


def test_bfloat16_products_refuse_forward_mode():
    x, kernel = _normal(0, 5, 3), _normal(1, 3, 4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(partial(nn.project, dtype="bfloat16"), (x, kernel), (x, kernel))


def test_layer_norm_matches_float64_rows_and_keeps_epsilon():
    # The last row varies by less than sqrt(eps), so a wrong epsilon shows.
    x = np.concatenate([3.0 + 10.0 * np.asarray(_normal(0, 4, 6)), 1e-3 * np.asarray(_normal(1, 1, 6))])
    scale, bias = _normal(2, 6), _normal(3, 6)
    actual = np.asarray(layer_norm(x, scale=scale, bias=bias))
    for row, got in zip(np.asarray(x, np.float64), actual, strict=True):
        normal = (row - row.mean()) / math.sqrt(row.var() + 1e-5)
        np.testing.assert_allclose(got, normal * np.asarray(scale) + np.asarray(bias), atol=2 * F32)


def test_layer_norm_of_a_constant_row_is_the_bias():
    bias = _normal(0, 6)
    actual = layer_norm(np.full((5, 6), 0.5, np.float32), scale=np.ones(6, np.float32), bias=bias)
    np.testing.assert_array_equal(actual, np.tile(bias, (5, 1)))


def test_a_soft_cap_bounds_what_is_large_and_leaves_what_is_small():
    x = _normal(0, 5, 6)
    np.testing.assert_allclose(nn.softcap(x, 2.0), 2 * np.tanh(x / 2), atol=F32)
    np.testing.assert_allclose(nn.softcap(1e-3 * x, 2.0), 1e-3 * x, atol=F32)
    assert np.abs(nn.softcap(1e9 * x, 2.0)).max() <= 2 and nn.softcap(x, None) is x


def test_silu_gated_is_its_definition():
    gate, up = (np.asarray(_normal(seed, 5, 6), np.float64) for seed in range(2))
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(nn.silu_gated(_normal(0, 5, 6), _normal(1, 5, 6)), expected, atol=F32)


def test_rms_norm_matches_float64_rows_and_keeps_its_epsilon():
    # The last row's mean square is below eps, so a wrong epsilon shows.
    x = np.concatenate([3.0 + 10.0 * np.asarray(_normal(0, 4, 6)), 1e-3 * np.asarray(_normal(1, 1, 6))])
    scale = np.asarray(_normal(2, 6))
    for eps in (1e-5, 1e-6):
        actual = np.asarray(jax.jit(partial(nn.rms_norm, eps=eps))(x, scale=scale))
        for row, got in zip(np.asarray(x, np.float64), actual, strict=True):
            expected = row / math.sqrt(sum(row**2) / 6 + eps) * np.asarray(scale)
            np.testing.assert_allclose(got, expected, atol=2 * F32)


def test_gelu_is_the_tanh_approximation_not_the_error_function():
    given = (-3.0, -0.5, 0.0, 1.0, 2.0)
    found = jax.jit(nn.gelu)(np.asarray(given, np.float32)).tolist()
    for x, got in zip(given, found, strict=True):
        expected = 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        assert got == pytest.approx(expected, abs=F32)
    exact = 0.5 * 2.0 * (1 + math.erf(2.0 / math.sqrt(2)))
    assert abs(found[-1] - exact) > 5e-5


def _attention_oracle(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = np.array([q[b, t, n] @ k[b, u, n] for u in range(t + 1)]) / math.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = sum(w * v[b, u, n] for u, w in enumerate(weights / weights.sum()))
    return out


def test_attention_matches_loops_over_positions_and_heads():
    q, k, v = (2.0 * np.asarray(_normal(seed, 2, 5, 3, 4)) for seed in range(3))
    np.testing.assert_allclose(attention(q, keys=k, values=v), _attention_oracle(q, k, v), atol=5 * F32)


def test_bfloat16_attention_rounds_the_factors_of_its_products_only():
    q, k, v = (_normal(seed, 2, 5, 3, 4) for seed in range(3))
    # A score is off by at most d, so a weight by a factor of at most exp(2 d); then weights and values are rounded.
    d = PRODUCT16 * float(np.einsum("btnk,bunk->bntu", np.abs(q), np.abs(k)).max()) / math.sqrt(4)
    bound = (math.expm1(2 * d) * (1 + PRODUCT16) + PRODUCT16) * float(np.abs(v).max())
    attend = jax.jit(partial(nn.causal_attention, dtype="bfloat16"))
    got = attend(q, keys=k, values=v)
    expected = _attention_oracle(q, k, v)
    assert got.dtype == jnp.float32
    assert 100 * F32 < np.abs(np.asarray(got) - expected).max() <= bound
    # With equal scores and a value that bfloat16 holds, nothing of the softmax is rounded.
    zeros = np.zeros_like(q)
    same = attend(zeros, keys=zeros, values=zeros + np.float32(1.5))
    np.testing.assert_allclose(same, 1.5, atol=F32)


def test_bfloat16_attention_has_the_gradients_of_float32_but_for_rounding():
    operands = [_normal(seed, 2, 9, 3, 4) for seed in range(3)]

    def gradients(dtype):
        def loss(q, k, v):
            return jnp.sum(jnp.tanh(nn.causal_attention(q, keys=k, values=v, dtype=dtype)))

        return jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*operands))

    for half, full in zip(gradients("bfloat16"), gradients("float32"), strict=True):
        assert half.dtype == jnp.float32
        assert 0 < np.linalg.norm(half - full) <= GRAD16 * np.linalg.norm(full)


def test_attention_survives_scores_beyond_the_range_of_exp():
    q, k, v = (100.0 * np.asarray(_normal(seed, 1, 4, 1, 2)) for seed in range(3))
    actual = attention(q, keys=k, values=v)
    np.testing.assert_allclose(actual, _attention_oracle(q, k, v), rtol=1e-3)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(attention(x, keys=k, values=v))))(q)
    assert np.isfinite(gradient).all()


def test_attention_with_equal_scores_is_the_running_mean():
    values = np.asarray(_normal(0, 1, 6, 1, 2))
    zeros = np.zeros_like(values)
    expected = np.cumsum(np.asarray(values), axis=1) / np.arange(1, 7)[None, :, None, None]
    np.testing.assert_allclose(attention(zeros, keys=zeros, values=values), expected, atol=F32)


def _grouped_oracle(q, k, v, visible):
    """One query head at a time over the places that it sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, shared = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [u for u in range(k.shape[1]) if visible[b, t, u]]
        scores = np.array([q[b, t, n] @ k[b, u, n // shared] for u in seen]) / math.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = sum(w * v[b, u, n // shared] for u, w in zip(seen, weights / weights.sum(), strict=True))
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_attention_matches_loops_over_query_heads(kv_heads):
    q, k, v = (np.asarray(_normal(*given, 4)) for given in ((0, 2, 5, 6), (1, 2, 7, kv_heads), (2, 2, 7, kv_heads)))
    q, k = 2 * q, 2 * k
    visible = np.random.default_rng(3).random((2, 5, 7)) < 0.6
    visible[..., 0] = True
    got = grouped(q, keys=k, values=v, visible=visible)
    np.testing.assert_allclose(got, _grouped_oracle(q, k, v, visible), atol=5 * F32)


def test_grouped_attention_with_a_key_head_each_is_causal_attention():
    q, k, v = (_normal(seed, 2, 5, 3, 4) for seed in range(3))
    places = np.arange(5, dtype=np.int32)
    visible = visibility(np.ones((1, 5), bool), positions=places[None], queries=places)
    got = grouped(q, keys=k, values=v, visible=visible)
    np.testing.assert_allclose(got, attention(q, keys=k, values=v), atol=F32)


def test_grouped_attention_repeats_no_keys():
    """The largest intermediate is the scores."""
    q, keys = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 3, 8, 64), (1, 5, 2, 64)))
    visible = jax.ShapeDtypeStruct((1, 3, 5), bool)
    shapes = jax.make_jaxpr(nn.grouped_attention)(q, keys=keys, values=keys, visible=visible)
    sizes = {v.aval.size for e in shapes.jaxpr.eqns for v in e.outvars}
    assert max(sizes) < 5 * 8 * 64


MASKS = [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("window", [None, 1, 2])
def test_visibility_and_positions_by_counting(window):
    mask = np.asarray(MASKS, bool)
    positions = np.asarray(real_positions(mask))
    visible = np.asarray(visibility(mask, positions=positions, queries=np.arange(6, dtype=np.int32), window=window))
    for row, real in enumerate(MASKS):
        places = [u for u in range(6) if real[u]]
        for t in range(6):
            before = [u for u in places if u <= t]
            assert positions[row, t] == max(len(before) - 1, 0)
            if real[t]:
                expected = before if window is None else before[-window:]
                assert np.flatnonzero(visible[row, t]).tolist() == expected
            else:
                assert visible[row, t, t]


def test_visibility_of_some_queries_is_their_rows():
    mask = np.asarray(MASKS, bool)
    see = partial(visibility, mask, positions=real_positions(mask), window=2)
    every, some = (see(queries=np.asarray(queries, np.int32)) for queries in (range(6), [4, 1]))
    np.testing.assert_array_equal(some, np.asarray(every)[:, [4, 1]])


def test_sinusoidal_table_closed_form():
    table = np.asarray(jax.jit(nn.sinusoidal_table, static_argnums=(0, 1))(160, 6))
    for position in (0, 1, 17, 159):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            np.testing.assert_allclose(table[position, 2 * i], math.sin(angle), atol=TABLE)
            np.testing.assert_allclose(table[position, 2 * i + 1], math.cos(angle), atol=TABLE)


def test_rope_rotates_pairs_of_halves():
    x = _normal(0, 1, 5, 2, 4)
    x, actual = np.asarray(x), np.asarray(rotate(x, rope_table(5, 4, base=100.0)))
    for t, n, i in np.ndindex(5, 2, 2):
        turned = complex(x[0, t, n, i], x[0, t, n, i + 2]) * np.exp(1j * t / 100.0 ** (2 * i / 4))
        np.testing.assert_allclose(actual[0, t, n, i], turned.real, atol=F32)
        np.testing.assert_allclose(actual[0, t, n, i + 2], turned.imag, atol=F32)


def test_rope_inner_products_depend_on_distance_only():
    q, k = (np.tile(_normal(seed, 1, 1, 1, 8), (1, 40, 1, 1)) for seed in range(2))
    table = rope_table(40, 8)
    products = np.einsum("btnk,bunk->tu", rotate(q, table), rotate(k, table))
    for distance in (-7, 0, 3, 20):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, np.full_like(diagonal, diagonal[0]), atol=TABLE)
    assert abs(products[0, 0] - products[0, 3]) > 0.1


def test_rotation_by_a_table_per_sequence_is_each_sequences_rotation():
    x, table = np.asarray(_normal(0, 2, 5, 3, 4)), np.asarray(rope_table(9, 4))
    got = np.asarray(rotate(x, np.stack([table[:, :5], table[:, 4:]], axis=1)))
    for b, start in enumerate((0, 4)):
        np.testing.assert_allclose(got[b], rotate(x[b : b + 1], table[:, start : start + 5])[0], atol=F32)


def test_first_position_is_not_rotated():
    x = _normal(0, 1, 1, 2, 4)
    np.testing.assert_array_equal(rotate(x, rope_table(1, 4)), x)


def _attend(x):
    return nn.causal_attention(x, keys=x + 0.1, values=x * x)


def _attend_in_groups(x):
    mask = jnp.asarray([[False, True, True], [True, True, True]])
    visible = nn.visibility(mask, positions=nn.real_positions(mask), queries=jnp.arange(3), window=2)
    return nn.grouped_attention(x, keys=x[:, :, :1] + 0.1, values=x[:, :, 1:] ** 2, visible=visible)


CLOSURE = {
    "linear": (lambda x: nn.linear(x, _normal(1, 4, 3), bias=_normal(2, 3)), (5, 4)),
    "layer_norm": (lambda x: nn.layer_norm(x, scale=_normal(1, 4), bias=_normal(2, 4)), (5, 4)),
    "rms_norm": (lambda x: nn.rms_norm(x, scale=_normal(1, 4), eps=1e-5), (5, 4)),
    "gelu": (nn.gelu, (5, 4)),
    "causal_attention": (_attend, (2, 3, 2, 4)),
    "grouped_attention": (_attend_in_groups, (2, 3, 2, 4)),
    "rotate": (lambda x: nn.rotate(x, nn.rope_table(3, 4)), (2, 3, 2, 4)),
}


@pytest.mark.parametrize("name", CLOSURE)
def test_jit_vmap_and_gradients(name):
    function, shape = CLOSURE[name]
    x = _normal(0, 3, *shape)
    eager = np.stack([function(lane) for lane in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(function))(x), eager, atol=10 * F32)
    check_grads(jax.jit(function), (x[0],), order=1, modes=["fwd", "rev"], atol=GRAD, rtol=GRAD)
