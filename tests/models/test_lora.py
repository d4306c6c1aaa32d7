"""Adapters: the model with their factors is the model with their product, at the price of the factors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, tree
from jaxsafety.models import generation, llama, lora
from jaxsafety.models.llama import LlamaConfig
from tests.models import llama_cases

CONFIG = LlamaConfig(50, 32, layers=3, heads=4, kv_heads=2, width=16, mlp_width=24, head_width=4, qkv_bias=True)
RTOL = 2e-5
SCALE = 0.5


@pytest.fixture(scope="module")
def params():
    return llama.init(CONFIG, key=keys.root(0))


@pytest.fixture(scope="module")
def adapter(params):
    fresh = lora.init(params, rank=3, targets=(*lora.TARGETS, *lora.OUTER), key=keys.root(1))
    return tree.label(fresh, lambda path, leaf: leaf + 0.1 * np.random.default_rng(len(path)).normal(size=leaf.shape))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 12)), jnp.int32)


@pytest.fixture(scope="module")
def merged(params, adapter):
    def one(path, leaf):
        rows = [lora.merged(np.asarray(leaf[i]), path, i, adapter, scale=SCALE) for i in range(len(leaf))]
        return jnp.asarray(np.stack(rows))

    blocks = {path: one(path, leaf) for path, leaf in tree.flatten(params).items() if path.startswith("blocks/")}
    blocks |= {path: jnp.asarray(lora.merged(np.asarray(params[path]), path, None, adapter, scale=SCALE))
               for path in lora.OUTER}  # fmt: skip
    return tree.unflatten(tree.flatten(params) | blocks)


def test_a_fresh_adapter_changes_nothing(params, tokens):
    fresh = lora.init(params, rank=3, targets=("q", "down", "embed", "unembed"), key=keys.root(1))
    assert set(tree.flatten(fresh)) == {
        f"{name}_lora_{side}" for name in ("blocks/attn/q", "blocks/mlp/down", "embed", "unembed") for side in "ab"
    }
    run = partial(llama.apply, inputs=tokens, config=CONFIG)
    np.testing.assert_array_equal(run(lora.joined(params, fresh, scale=2.0)).logits, run(params).logits)


def test_a_target_has_the_same_factors_whatever_the_others_are(params):
    one, both = (lora.init(params, rank=2, targets=names, key=keys.root(1)) for names in (("v",), ("q", "v")))
    np.testing.assert_array_equal(one["blocks"]["attn"]["v_lora_a"], both["blocks"]["attn"]["v_lora_a"])


def test_logits_and_answers_are_those_of_the_merged_model(params, adapter, merged, tokens):
    joined = lora.joined(params, adapter, scale=SCALE)
    run = jax.jit(lambda params, tokens: llama.apply(params, tokens, config=CONFIG).logits)
    whole = run(merged, tokens)
    np.testing.assert_allclose(run(joined, tokens), whole, rtol=RTOL, atol=RTOL * float(jnp.abs(whole).max()))
    assert not np.allclose(run(params, tokens), whole, rtol=1e-2)
    write = jax.jit(lambda params, tokens: generation.generate((params, llama.model(CONFIG)), tokens, count=5))
    np.testing.assert_array_equal(write(joined, tokens), write(merged, tokens))


def test_no_dense_gradient_is_formed(params, adapter, tokens):
    def loss(adapter):
        return jnp.sum(llama.apply(lora.joined(params, adapter, scale=SCALE), tokens, config=CONFIG).logits ** 2)

    shapes = {var.aval.shape for eqn in jax.make_jaxpr(jax.grad(loss))(adapter).eqns for var in eqn.outvars}
    assert (3, 16, 24) not in shapes and (3, 3, 24) in shapes


@pytest.mark.parametrize("variant", [pytest.param("norms after", marks=pytest.mark.slow), "some layers have a window"])
def test_a_step_along_the_gradient_is_downhill_in_other_families(variant):
    """The norms around the branches, soft caps, and layers that differ, run again for the gradient."""
    config = llama_cases.config_of(variant, recompute=True)
    params, tokens = llama_cases.params_of(config), llama_cases.tokens_of()
    fresh = lora.init(params, rank=2, targets=tuple(lora.TARGETS), key=keys.root(1))

    @jax.jit
    def graded(adapter):
        def loss(adapter):
            logits = llama.apply(lora.joined(params, adapter, scale=1.0), tokens, config=config).logits
            return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

        return jax.value_and_grad(loss)(adapter)

    loss, gradient = graded(fresh)
    flat = tree.flatten(gradient)
    assert all(np.isfinite(leaf).all() for leaf in flat.values())
    assert all(np.abs(leaf).max(axis=(1, 2)).min() > 0 for path, leaf in flat.items() if path.endswith("_b"))
    assert graded(jax.tree.map(lambda leaf, slope: leaf - 0.05 * slope, fresh, gradient))[0] < loss


@pytest.mark.slow
def test_recomputed_layers_have_the_same_gradient_in_less_memory(params):
    tokens = jnp.zeros((4, 32), jnp.int32) + jnp.arange(32, dtype=jnp.int32)[None, :]

    def gradient(recompute):
        config = LlamaConfig(50, 32, 8, 4, 2, 16, 24, 4, recompute=recompute)
        own = llama.init(config, key=keys.root(0))
        loss = jax.jit(jax.grad(lambda params: jnp.mean(llama.apply(params, tokens, config=config).logits ** 2)))
        return loss(own), loss.lower(own).compile().memory_analysis().temp_size_in_bytes

    (plain, memory), (again, less) = gradient(False), gradient(True)
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(plain)))
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=RTOL, atol=RTOL * norm)
    assert less < 0.5 * memory


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"q_lora_c": (3, 16, 2)}, "blocks/attn/q_lora_c belongs to no matrix of the model"),
        ({"x_lora_a": (3, 16, 2), "x_lora_b": (3, 2, 16)}, "blocks/attn/x_lora_a belongs to no matrix of the model"),
        (
            {"q_lora_a": (3, 16, 2)},
            r"factors of blocks/attn/q have the shapes \(3, 16, 2\) and \(\), expected \(3, 16, r\)",
        ),
        ({"q_lora_a": (3, 16, 2), "q_lora_b": (3, 3, 16)}, r"\(3, 3, 16\), expected \(3, 16, r\) and \(3, r, 16\)"),
    ],
)
def test_factors_of_another_model_are_named(params, factors, message):
    adapter = {"blocks": {"attn": {name: np.ones(shape, np.float32) for name, shape in factors.items()}}}
    with pytest.raises(ValueError, match=f"^adapter: .*{message}"):
        lora.joined(params, adapter, scale=1.0)
