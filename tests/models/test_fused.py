"""Fused attention against the plain one: values, gradients, under ``vmap``, and what it becomes on a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.models import fused, gpt
from jaxsafety.models import layers as nn
from jaxsafety.models.fused import fused_attention

U16 = 2**-8  # bfloat16's rounding
SHAPES = {"all queries": (7, 7), "an even number": (6, 6), "the last queries": (3, 7)}


def _operands(tokens, places):
    draw = np.random.default_rng(tokens).standard_normal
    return tuple(jnp.asarray(draw((2, n, 3, 8)), jnp.float32) for n in (tokens, places, places, tokens))


def _with_gradients(attend):
    def run(q, k, v, cotangent):
        value, transpose = jax.vjp(lambda q, k, v: attend(q, keys=k, values=v), q, k, v)
        return value, *transpose(cotangent)

    return run


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_plain_attention_of_rounded_factors(shape):
    q, k, v, cotangent = _operands(*shape)
    exact = _with_gradients(nn.causal_attention)(
        *(x.astype(jnp.bfloat16).astype(jnp.float32) for x in (q, k, v)), cotangent
    )
    for got, expected in zip(jax.jit(_with_gradients(fused_attention))(q, k, v, cotangent), exact, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=2 * U16 * float(np.abs(expected).max()))


def test_activations_in_bfloat16_stay_so():
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in _operands(7, 7))
    assert fused_attention(q, keys=k, values=v).dtype == jnp.bfloat16


def test_seeds_under_vmap_are_those_one_by_one():
    given = [np.stack([x, 2 * x]) for x in _operands(5, 5)]
    run = _with_gradients(fused_attention)
    for got, *looped in zip(
        jax.vmap(run)(*given), run(*(x[0] for x in given)), run(*(x[1] for x in given)), strict=True
    ):
        np.testing.assert_allclose(got, np.stack(looped), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_on_a_gpu_it_asks_for_the_kernel_with_bfloat16_arrays(shape, monkeypatch):
    seen = {}

    def kernel(q, k, v, **named):
        seen.update(named, dtypes={x.dtype for x in (q, k, v)}, tokens={x.shape[1] for x in (q, k, v)})
        return q

    monkeypatch.setattr(fused.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused.jax.nn, "dot_product_attention", kernel)
    q, k, v, _ = _operands(*shape)
    fused_attention(q, keys=k, values=v)
    assert seen["implementation"] == "cudnn" and seen["dtypes"] == {jnp.dtype(jnp.bfloat16)}
    # A mask costs what the kernel saves, queries of the last positions alone would be taken for the first, and odd
    # lengths are refused.
    assert seen["is_causal"] and "mask" not in seen and seen["tokens"] == {shape[1] + shape[1] % 2}


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_model_trains_with_it_as_with_the_plain_one(stored):
    plain = gpt.preset("tiny", vocab_size=11, max_tokens=9, compute_dtype="bfloat16", stored_dtype=stored)
    params = gpt.init(plain, key=jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 9)), jnp.int32)

    def loss(params, config):
        return -jnp.mean(jax.nn.log_softmax(gpt.apply(params, tokens, config=config).logits)[..., 0])

    own = gpt.preset(
        "tiny", vocab_size=11, max_tokens=9, compute_dtype="bfloat16", stored_dtype=stored, attention="fused"
    )
    run = jax.jit(jax.grad(loss), static_argnums=1)
    for got, expected in zip(*(jax.tree.leaves(run(params, config)) for config in (own, plain)), strict=True):
        assert np.linalg.norm(got - expected) <= 8 * U16 * np.linalg.norm(expected) + 1e-5


def test_branches_take_it_too():
    config = partial(gpt.preset, "tiny", vocab_size=11, max_tokens=9, compute_dtype="bfloat16")
    params = gpt.init(config(), key=jax.random.key(0))
    draw = np.random.default_rng(0).integers
    stems, rest = (jnp.asarray(draw(0, 11, shape), jnp.int32) for shape in ((2, 4), (4, 5)))
    got, expected = (gpt.branches(params, stems, rest, config=config(attention=kind)) for kind in ("fused", "plain"))
    np.testing.assert_allclose(got, expected, atol=4 * U16 * float(np.abs(expected).max()))
