"""Fused attention against the plain one. There is no GPU here: what it would ask of cuDNN, jax's own attention does."""

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


@pytest.fixture
def asked(monkeypatch):
    """As on a GPU; holds what the kernel was asked."""
    seen, attend = {}, jax.nn.dot_product_attention

    def kernel(q, k, v, *, implementation, **named):
        seen.update(named, implementation=implementation, dtypes={x.dtype for x in (q, k, v)})
        seen["tokens"] = {x.shape[1] for x in (q, k, v)}
        # A CPU has no kernel for some products of bfloat16 arrays.
        mixed = attend(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="xla", **named)
        return mixed.astype(q.dtype)

    monkeypatch.setattr(fused.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused.jax.nn, "dot_product_attention", kernel)
    return seen


def _operands(tokens, places):
    draw = np.random.default_rng(tokens).standard_normal
    return tuple(jnp.asarray(draw((2, n, 3, 8)), jnp.float32) for n in (tokens, places, places, tokens))


def _with_gradients(attend):
    def run(q, k, v, cotangent):
        value, transpose = jax.vjp(lambda q, k, v: attend(q, keys=k, values=v), q, k, v)
        return value, *transpose(cotangent)

    return run


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_gives_the_plain_attention_of_rounded_factors(asked, shape):
    q, k, v, cotangent = _operands(*shape)
    exact = _with_gradients(nn.causal_attention)(
        *(x.astype(jnp.bfloat16).astype(jnp.float32) for x in (q, k, v)), cotangent
    )
    for got, expected in zip(_with_gradients(fused_attention)(q, k, v, cotangent), exact, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=2 * U16 * float(np.abs(expected).max()))
    assert asked["implementation"] == "cudnn" and asked["dtypes"] == {jnp.dtype(jnp.bfloat16)}
    # A mask of one's own costs what the kernel saves, queries of the last positions alone would be taken for the first,
    # and odd lengths are refused.
    assert asked["is_causal"] and "mask" not in asked and asked["tokens"] == {shape[1] + shape[1] % 2}


def test_seeds_under_vmap_are_those_one_by_one(asked):
    given = [jnp.stack([x, 2 * x]) for x in _operands(5, 5)]
    run = _with_gradients(fused_attention)
    alone = [run(*(x[seed] for x in given)) for seed in range(2)]
    for got, *looped in zip(jax.vmap(run)(*given), *alone, strict=True):
        np.testing.assert_allclose(got, np.stack(looped), atol=1e-5)


def test_activations_in_bfloat16_stay_so(asked):
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in _operands(7, 7))
    assert fused_attention(q, keys=k, values=v).dtype == jnp.bfloat16


def test_elsewhere_it_is_the_plain_one():
    q, k, v, _ = _operands(3, 7)
    got, expected = fused_attention(q, keys=k, values=v), nn.causal_attention(q, keys=k, values=v, dtype="bfloat16")
    np.testing.assert_array_equal(got, expected)


_TINY = partial(gpt.preset, "tiny", vocab_size=11, max_tokens=9, compute_dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_model_trains_with_it_as_with_the_plain_one(asked, stored):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 9)), jnp.int32)
    params = gpt.init(_TINY(), key=jax.random.key(0))

    def gradient(kind):
        # Its own object: what is compiled for a GPU is found by nobody else.
        config = _TINY(stored_dtype=stored, attention=kind, unroll=2)

        def loss(params):
            return -jnp.mean(jax.nn.log_softmax(gpt.apply(params, tokens, config=config).logits)[..., 0])

        return jax.tree.leaves(jax.grad(loss)(params))

    for got, expected in zip(gradient("fused"), gradient("plain"), strict=True):
        assert np.linalg.norm(got - expected) <= 8 * U16 * np.linalg.norm(expected) + 1e-5
    assert asked["tokens"] == {10}


def test_branches_take_it_too(asked):
    params = gpt.init(_TINY(), key=jax.random.key(0))
    draw = np.random.default_rng(0).integers
    stems, rest = (jnp.asarray(draw(0, 11, shape), jnp.int32) for shape in ((2, 4), (4, 5)))
    own = partial(_TINY, unroll=2)
    got, expected = (gpt.branches(params, stems, rest, config=own(attention=kind)) for kind in ("fused", "plain"))
    np.testing.assert_allclose(got, expected, atol=4 * U16 * float(np.abs(expected).max()))
    assert asked["tokens"] == {10}
