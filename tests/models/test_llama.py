"""The Llama family against a plain float64 model, and its invariants: padding, caches, captures, windows, groups."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety import keys, tree
from jaxsafety.models import generation, llama
from jaxsafety.models.llama import LlamaConfig, Rope
from tests.models.llama_oracle import oracle

# float32 through two layers of logits of size 1; the oracle is float64.
RTOL, ATOL = 2e-5, 2e-5
CONFIG = LlamaConfig(
    vocab_size=23, max_tokens=40, layers=2, heads=4, kv_heads=2, width=12, mlp_width=20, head_width=6, norm_eps=1e-5
)
VARIANTS = {
    "grouped": {},
    "one key head": {"kv_heads": 1},
    "no groups": {"kv_heads": 4},
    "tied": {"tied": True},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True},
    "window": {"window": 3},
    "linear": {"rope": Rope(5e5, "linear", 2.0)},
    "dynamic": {"rope": Rope(1e4, "dynamic", 2.0, original_tokens=6)},
    "llama3": {"rope": Rope(1e3, "llama3", 8.0, 1.0, 4.0, 16)},
}


def model(**changed):
    """A configuration and parameters far from their start, so that nothing is hidden by a zero or an identity."""
    config = replace(CONFIG, **changed)
    rng = np.random.default_rng(0)
    params = llama.init(config, key=keys.root(0))
    return config, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.4, leaf.shape), jnp.float32), params)


def prompts(batch=2, tokens=9, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, tokens)), jnp.int32)


def padded(tokens, before, after=0):
    """The prompts between padding, and the mask."""
    wide = jnp.pad(tokens, ((0, 0), (before, after)), constant_values=5)
    return wide, jnp.pad(jnp.ones(tokens.shape, bool), ((0, 0), (before, after)))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_activations_are_those_of_the_oracle(name):
    config, params = model(**VARIANTS[name])
    sites = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "mlp.hook_in", "mlp.hook_pre", "mlp.hook_pre_linear",
             "mlp.hook_post", "hook_mlp_out", "hook_resid_post")  # fmt: skip
    run = jax.jit(partial(llama.forward_with_activations, config=config, sites=sites))
    logits, seen = run(params, prompts())
    expected, activations = oracle(jax.device_get(params), np.asarray(prompts()), config)
    np.testing.assert_allclose(logits, expected, rtol=RTOL, atol=ATOL * np.abs(expected).max())
    for site in sites:
        assert seen[site].shape == activations[site].shape
        size = np.abs(activations[site]).max()
        np.testing.assert_allclose(seen[site], activations[site], rtol=RTOL, atol=ATOL * size)


@pytest.mark.parametrize(("before", "after"), [(4, 0), (0, 4), (2, 2)], ids=["left", "right", "both"])
@pytest.mark.parametrize("name", ["grouped", "window", "linear", "dynamic"])
def test_padding_changes_no_real_token(name, before, after):
    config, params = model(**VARIANTS[name])
    tokens, mask = padded(prompts(), before, after)
    run = jax.jit(partial(llama.forward, config=config))
    plain, logits = run(params, prompts()), run(params, tokens, mask=mask)
    assert np.isfinite(logits).all(), "a padded query sees itself"
    scale = float(jnp.abs(plain).max())
    np.testing.assert_allclose(logits[:, before : before + 9], plain, rtol=RTOL, atol=ATOL * scale)


def test_chosen_layers_and_positions_are_those_of_all():
    config, params = model()
    every = llama.forward_with_activations(params, prompts(), config=config, sites=("mlp.hook_post",))[1]
    places = jnp.asarray([[1, 8], [0, 99]])
    logits, some = llama.forward_with_activations(
        params, prompts(), config=config, sites=("mlp.hook_post",), layers=(1,), positions=places
    )
    np.testing.assert_array_equal(some["mlp.hook_post"][0, 0], every["mlp.hook_post"][1, 0, jnp.asarray([1, 8])])
    np.testing.assert_array_equal(some["mlp.hook_post"][0, 1, 0], every["mlp.hook_post"][1, 1, 0])
    assert np.isnan(some["mlp.hook_post"][0, 1, 1]).all(), "out of range"
    np.testing.assert_array_equal(logits, llama.forward(params, prompts(), config=config))


def test_nothing_is_stored_for_layers_that_nobody_asked_for():
    config, params = model(layers=8)
    run = partial(llama.forward_with_activations, config=config, sites=("mlp.hook_post",), layers=(3,))
    _, seen = jax.eval_shape(run, params, prompts())
    assert seen["mlp.hook_post"].shape == (1, 2, 9, 20)
    shapes = {aval.shape for aval in _outputs(jax.make_jaxpr(run)(params, prompts()).jaxpr)}
    assert (1, 2, 9, 20) in shapes and (8, 2, 9, 20) not in shapes


def _outputs(jaxpr):
    for equation in jaxpr.eqns:
        yield from (var.aval for var in equation.outvars)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_weights_are_widened_and_never_rounded_further(dtype):
    config, params = model()
    stored = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    found = llama.forward(stored, prompts(), config=config)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, llama.forward(wide, prompts(), config=config))


@pytest.mark.parametrize("name", ["biases", "window", "dynamic"])
def test_transformations_change_nothing(name):
    config, params = model(**VARIANTS[name])
    tokens, mask = padded(prompts(), 2)
    run = partial(llama.forward, config=config)
    eager, jitted = run(params, tokens, mask=mask), jax.jit(run)(params, tokens, mask=mask)
    scale = float(jnp.abs(eager).max())
    np.testing.assert_allclose(jitted, eager, rtol=RTOL, atol=ATOL * scale)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params)
    mapped = jax.vmap(lambda p: run(p, tokens, mask=mask))(stacked)
    for lane in range(2):
        single = run(jax.tree.map(lambda leaf, lane=lane: leaf[lane], stacked), tokens, mask=mask)
        np.testing.assert_allclose(mapped[lane], single, rtol=1e-4, atol=1e-4 * float(jnp.abs(single).max()))


def test_gradients_are_those_of_finite_differences():
    config, params = model(layers=1, qkv_bias=True)
    params = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    tokens, mask = padded(prompts(1, 4), 2)

    def loss(p):
        p = jax.tree.map(jnp.asarray, p)
        return jnp.mean(jax.nn.log_softmax(llama.forward(p, tokens, config=config, mask=mask))[:, 2:, 0])

    check_grads(loss, (params,), order=1, modes=["rev"], rtol=2e-2, atol=2e-2, eps=1e-2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss)(params)))


def greedy(params, tokens, *, config, count):
    """The whole sequence anew for every token, right-padded to one length, so that it compiles once."""
    batch, start = tokens.shape
    run = jax.jit(partial(llama.forward, config=config))
    tokens = np.pad(tokens, ((0, 0), (0, count)))
    for end in range(start, start + count):
        mask = np.broadcast_to(np.arange(start + count) < end, (batch, start + count))
        tokens[:, end] = np.argmax(run(params, jnp.asarray(tokens), mask=jnp.asarray(mask))[:, end - 1], axis=-1)
    return tokens[:, start:]


@pytest.mark.parametrize("name", ["tied", "biases", "window", "dynamic", "llama3"])
def test_cached_generation_is_the_plain_one_token_for_token(name):
    config, params = model(**VARIANTS[name])
    expected = greedy(params, prompts(), config=config, count=12)
    run = jax.jit(partial(generation.generate, config=config, max_new=12))
    np.testing.assert_array_equal(run(params, prompts()), expected)
    tokens, mask = padded(prompts(), 4)
    np.testing.assert_array_equal(run(params, tokens, mask=mask), expected)


def test_rows_of_different_lengths_continue_as_they_do_alone():
    config, params = model()
    short, long = prompts(1, 4, seed=3), prompts(1, 9, seed=4)
    both = jnp.concatenate([jnp.pad(short, ((0, 0), (5, 0))), long])
    mask = jnp.asarray([[False] * 5 + [True] * 4, [True] * 9])
    together = generation.generate(params, both, config=config, max_new=6, mask=mask)
    for row, alone in enumerate((short, long)):
        np.testing.assert_array_equal(together[row : row + 1], greedy(params, alone, config=config, count=6))


def test_a_stop_token_ends_its_row_alone():
    config, params = model()
    free = np.asarray(generation.generate(params, prompts(), config=config, max_new=8))
    stop = int(free[0, 2])
    found = np.asarray(generation.generate(params, prompts(), config=config, max_new=8, stop=(stop, 99), pad=7))
    for row in range(2):
        ends = np.flatnonzero(free[row] == stop)
        end = ends[0] + 1 if len(ends) else 8
        np.testing.assert_array_equal(found[row, :end], free[row, :end])
        assert (found[row, end:] == 7).all()


def test_draws_follow_the_models_distribution():
    config, params = model()
    tokens = jnp.repeat(prompts(1, 3), 4000, axis=0)
    logits = llama.forward(params, prompts(1, 3), config=config)[0, -1] / 5.0
    drawn = generation.generate(params, tokens, config=config, max_new=1, key=keys.root(2), temperature=5.0)
    shares = np.bincount(np.asarray(drawn)[:, 0], minlength=config.vocab_size) / 4000
    expected = np.asarray(jax.nn.softmax(logits))
    # Five standard deviations of a share.
    assert (np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-9).all()
    cold = generation.generate(params, tokens[:2], config=config, max_new=4, key=keys.root(2), temperature=1e-4)
    np.testing.assert_array_equal(cold, generation.generate(params, tokens[:2], config=config, max_new=4))


def test_a_bfloat16_cache_errs_by_its_rounding():
    config, params = model()
    tokens, room = prompts(), 1
    mask = jnp.ones(tokens.shape, bool)
    found = []
    for dtype in generation.CACHE_DTYPES:
        _, cache = generation.prefill(params, tokens, config=config, mask=mask, room=room, dtype=dtype)
        assert cache.keys.dtype == dtype and cache.keys.shape == (2, 2, 10, 2, 6)
        found.append(generation.extend(params, tokens[:, 0], config=config, cache=cache, place=9)[0])
    error = float(jnp.abs(found[1] - found[0]).max() / jnp.abs(found[0]).max())
    assert 0 < error < 0.1


def test_the_count_of_parameters_is_that_of_the_released_models():
    def count(**sizes):
        config = LlamaConfig(max_tokens=8192, layers=32, heads=32, width=4096, head_width=128, **sizes)
        return sum(
            math.prod(leaf.shape)
            for leaf in jax.tree.leaves(jax.eval_shape(partial(llama.init, config), key=keys.root(0)))
        )

    assert count(vocab_size=32000, kv_heads=32, mlp_width=11008) == 6_738_415_616
    assert count(vocab_size=128256, kv_heads=8, mlp_width=14336) == 8_030_261_248


def test_updates_of_an_init_are_named_as_those_of_the_gpt():
    _, params = model(tied=True)
    paths = set(tree.flatten(params))
    assert {"embed", "norm/scale", "blocks/attn/q", "blocks/mlp/gate", "blocks/norm_mlp/scale"} <= paths
    assert "unembed" not in paths


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kv_heads": 3}, "kv_heads: got 3, expected a divisor of heads 4"),
        ({"head_width": 5}, "head_width: got 5, expected an even number"),
        ({"layers": 0}, "layers: got 0, expected an integer of at least 1"),
        ({"window": 0}, "window: got 0, expected an integer of at least 1"),
        ({"tied": "yes"}, "tied: got 'yes', expected True or False"),
        ({"norm_eps": 0.0}, "norm_eps: got 0.0, expected a number greater than 0"),
        ({"compute_dtype": "float8"}, "unknown compute_dtype 'float8'"),
    ],
)
def test_bad_configurations_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changed)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scaling": "lineal"}, "unknown rope scaling 'lineal'.*did you mean 'linear'"),
        ({"factor": 0.5}, "rope.factor: got 0.5, expected a number of at least 1"),
        ({"base": math.nan}, "rope.base: got nan, expected a number greater than 0"),
        ({"high_frequency": 1.0}, "rope.high_frequency: got 1.0, expected a number greater than 1"),
        ({"original_tokens": 0}, "rope.original_tokens: got 0, expected an integer of at least 1"),
    ],
)
def test_bad_scalings_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(Rope(), **changed)


def test_bad_calls_are_refused():
    config, params = model()
    with pytest.raises(ValueError, match="tokens: got 41 per sequence, expected at most max_tokens 40"):
        llama.forward(params, prompts(1, 41), config=config)
    with pytest.raises(ValueError, match="tokens: got 9 and 32 to come, expected at most max_tokens 40"):
        generation.generate(params, prompts(), config=config, max_new=33)
    with pytest.raises(ValueError, match="max_new: got 0, expected at least 1"):
        generation.generate(params, prompts(), config=config, max_new=0)
    with pytest.raises(ValueError, match="unknown cache_dtype 'int8'"):
        generation.generate(params, prompts(), config=config, max_new=1, cache_dtype="int8")
    with pytest.raises(ValueError, match=r"unknown site 'mlp.hook_pots'.*did you mean 'mlp.hook_post'"):
        llama.forward_with_activations(params, prompts(), config=config, sites=("mlp.hook_pots",))
    with pytest.raises(ValueError, match=r"layers: got \(2,\), expected ascending indices from 0 to 1"):
        llama.forward_with_activations(params, prompts(), config=config, sites=("mlp.hook_post",), layers=(2,))
