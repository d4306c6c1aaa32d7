"""The Llama-family decoder against a NumPy float64 oracle, its own laws, and jax's transformations."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety import tree
from jaxsafety.models import gpt, llama, llama_block
from jaxsafety.models.llama import Rope
from tests.models.llama_cases import MASK, PIECES, SITES, VARIANTS, config_of, oracle, params_of, shapes_of, tokens_of

ORACLE = 1e-5  # relative to the largest: float32 through two layers
SAME = 1e-5  # the same float32 program, fused or batched differently
BF16 = 2**-4  # of the largest logit: 2^-9 for each rounding, through some fourteen products in sequence
GRAD = 2e-2  # finite differences of a float32 model

capture = jax.jit(llama.apply, static_argnames=("config", "sites", "layers"))


@partial(jax.jit, static_argnames="config")
def logits_of(params, inputs, *, config, mask=None):
    return llama.apply(params, inputs, config=config, mask=mask).logits


@partial(jax.jit, static_argnames="config")
def logits_and_gradients(params, tokens, *, config, mask=None):
    """Logits, and the gradients of a float32 loss of them."""

    def loss(params):
        logits = llama.apply(params, tokens, config=config, mask=mask).logits
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0]), logits

    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, gradients


@partial(jax.jit, static_argnames="config")
def bounded(params, *, tokens, config, mask):
    """A scalar whose derivatives are of order one."""
    return jnp.mean(jnp.tanh(llama.apply(params, tokens, config=config, mask=mask).logits))


def forward(*given, **asked):
    return np.asarray(logits_of(*given, **asked))


def masked_forward(params, tokens, *, config, mask):
    """The logits that come with all activations: the program of the comparison with the oracle."""
    return np.asarray(capture(params, tokens, config=config, sites=SITES, mask=mask).logits)


def _close(got, expected, name=""):
    np.testing.assert_allclose(got, expected, atol=ORACLE * np.abs(expected).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS | PIECES)
def test_logits_and_activations_of_padded_batches_match_the_oracle_of_each_sequence(variant):
    config = config_of(variant)
    params, tokens = params_of(config), np.asarray(tokens_of())
    logits, activations = jax.device_get(capture(params, tokens, config=config, sites=SITES, mask=MASK))
    assert set(activations) == set(SITES)
    for b, real in enumerate(MASK):
        expected_logits, expected = oracle(params, tokens[b][real], config)
        _close(logits[b][real], expected_logits)
        for site in SITES:
            _close(activations[site][:, b, real], expected[site], site)


def test_queries_in_parts_are_those_at_once_without_scores_of_all_by_all(monkeypatch):
    config = config_of("window")
    params, tokens = params_of(config), jnp.concatenate([tokens_of()] * 2, axis=1)
    mask = jnp.asarray(np.concatenate([MASK, np.ones_like(MASK)], axis=1))
    length = tokens.shape[1]

    def loss(params, tokens, mask):
        logits = llama.apply(params, tokens, config=config, mask=mask).logits
        return jnp.sum(jnp.tanh(logits) * mask[..., None]), logits

    def graded():
        run = jax.value_and_grad(lambda params: loss(params, tokens, mask), has_aux=True)
        square = rf"f32\[[\d,]*{length},{length}\]"
        return jax.jit(run)(params), re.search(square, str(jax.make_jaxpr(run)(params)))

    whole, found = graded()
    assert found
    monkeypatch.setattr(llama_block, "_QUERIES", 4)
    parts, found = graded()
    assert not found
    for got, expected in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, expected, atol=SAME * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_mask_every_token_is_real(variant):
    config = config_of(variant)
    params, tokens = params_of(config), tokens_of()
    masked = masked_forward(params, tokens, config=config, mask=np.ones((3, 7), bool))
    np.testing.assert_allclose(forward(params, tokens, config=config), masked, atol=SAME)


@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_later_tokens_nor_padding_change_a_real_tokens_logits(variant):
    # Dynamic scaling goes by the whole sequence's length, so tokens may change here, but not their number.
    config, kept = config_of(variant), MASK & (np.arange(7) < 4)
    params, tokens = params_of(config), np.asarray(tokens_of())
    before = masked_forward(params, tokens, config=config, mask=MASK)
    changed = np.where(kept, tokens, (tokens + 1) % config.vocab_size)
    after = masked_forward(params, changed, config=config, mask=MASK)
    np.testing.assert_array_equal(before[kept], after[kept])
    assert np.abs(before - after)[:, 4].max(axis=-1).min() > 1e-3
    assert np.isfinite(before).all()


def test_padding_in_the_middle_is_skipped():
    config = config_of("window")
    params, tokens = params_of(config), np.asarray(tokens_of(1))
    holes = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    got = forward(params, tokens, config=config, mask=holes[None])
    short = forward(params, tokens[:, holes], config=config)
    np.testing.assert_allclose(got[:, holes], short, atol=SAME * np.abs(short).max())


def test_a_sequence_of_padding_alone_has_finite_logits_and_gradients():
    config = config_of("dynamic", window=2)
    mask = MASK & (np.arange(3) > 0)[:, None]
    found = logits_and_gradients(params_of(config), tokens_of(), config=config, mask=mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_a_window_as_long_as_the_sequence_hides_nothing_and_a_shorter_one_does():
    config = config_of()
    params, tokens = params_of(config), tokens_of()
    full, wide, narrow = (forward(params, tokens, config=config_of(window=w)) for w in (None, 7, 6))
    np.testing.assert_array_equal(full, wide)
    np.testing.assert_array_equal(full[:, :6], narrow[:, :6])
    assert np.abs(full - narrow)[:, 6].max() > 1e-4


def test_shared_key_heads_are_repeated_key_heads():
    config = config_of()
    params, tokens = params_of(config), tokens_of()
    full = dataclasses.replace(config, kv_heads=config.heads)

    def repeated(leaf):
        heads = np.asarray(leaf).reshape(2, 8, config.kv_heads, config.head_width)
        return np.repeat(heads, 2, axis=2).reshape(2, 8, -1)

    attn = params["blocks"]["attn"]
    attn = attn | {name: repeated(attn[name]) for name in "kv"}
    wide = params | {"blocks": params["blocks"] | {"attn": attn}}
    grouped = forward(params, tokens, config=config)
    np.testing.assert_allclose(forward(wide, tokens, config=full), grouped, atol=SAME * np.abs(grouped).max())


def test_tied_is_the_transposed_embedding():
    config = config_of("tied")
    params, tokens = params_of(config), tokens_of()
    untied = params | {"unembed": np.asarray(params["embed"]).T}
    logits = forward(untied, tokens, config=config_of())
    np.testing.assert_allclose(forward(params, tokens, config=config), logits, atol=SAME * np.abs(logits).max())


def test_llama_with_layer_norm_left_out_shares_the_paths_of_the_gpt():
    shapes = shapes_of(config_of("every bias"))
    small = gpt.GPTConfig(vocab_size=11, max_tokens=8, layers=2, heads=2, width=8, mlp_width=12, block="pre_ln")
    theirs = tree.flatten(jax.eval_shape(partial(gpt.init, small), key=jax.random.key(0)))
    assert {path for path in theirs if not path.endswith(("norm/bias", "norm_attn/bias", "norm_mlp/bias"))} < set(
        shapes
    )


def test_parameter_paths_and_shapes():
    norms = {"blocks/norm_attn/scale": (2, 8), "blocks/norm_mlp/scale": (2, 8), "norm/scale": (8,)}
    attn = {"q": (2, 8, 16), "k": (2, 8, 8), "v": (2, 8, 8), "o": (2, 16, 8)}
    mlp = {"gate": (2, 8, 12), "up": (2, 8, 12), "down": (2, 12, 8)}
    qkv, out = {"q_bias": (2, 16), "k_bias": (2, 8), "v_bias": (2, 8)}, {"o_bias": (2, 8)}
    dense = {"gate_bias": (2, 12), "up_bias": (2, 12), "down_bias": (2, 8)}

    def paths(attn, mlp):
        inner = {f"blocks/attn/{n}": s for n, s in attn.items()} | {f"blocks/mlp/{n}": s for n, s in mlp.items()}
        return norms | inner | {"embed": (11, 8), "unembed": (8, 11)}

    assert shapes_of(config_of()) == paths(attn, mlp)
    assert shapes_of(config_of("qwen2")) == paths(attn | qkv, mlp)
    assert shapes_of(config_of("every bias")) == paths(attn | qkv | out, mlp | dense)
    assert shapes_of(config_of("tied")) == {p: s for p, s in paths(attn, mlp).items() if p != "unembed"}


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ((32_000, 32, 32, 32, 4096, 11_008), 6_738_415_616),  # Llama-2 7B
        ((128_256, 32, 32, 8, 4096, 14_336), 8_030_261_248),  # Llama-3 8B
    ],
)
def test_published_sizes(sizes, published):
    v, depth, n, g, d, f = sizes
    config = llama.LlamaConfig(
        vocab_size=v, max_tokens=8192, layers=depth, heads=n, kv_heads=g, width=d, mlp_width=f, head_width=128
    )
    assert sum(math.prod(shape) for shape in shapes_of(config).values()) == published


@pytest.mark.parametrize("variant", PIECES)
def test_norms_of_every_family_begin_as_the_identity(variant):
    config = config_of(variant)
    params = tree.flatten(jax.eval_shape(partial(llama.init, config), key=jax.random.key(0)))
    assert {path for path in params if path.startswith("blocks/norm_")} == {
        f"blocks/{name}/scale" for name in config.norm_widths
    }
    for name, width in config.norm_widths.items():
        assert params[f"blocks/{name}/scale"].shape == (2, width)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windowed": (True, False)}, r"windowed: got \(True, False\) without a window"),
        ({"window": 3, "windowed": (True,)}, "windowed: got .* expected 2 of True and False"),
        ({"rotated": (True, True)}, "rotated: got .* all alike"),
        ({"local_rope": Rope()}, "local_rope: got .* without a window"),
        ({"attn_softcap": 0.0}, "attn_softcap: got 0.0, expected a number greater than 0"),
        ({"embed_scale": math.nan}, "embed_scale: got nan"),
    ],
)
def test_fields_of_other_families_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        config_of(**fields)


def test_initial_scales():
    config = config_of("every bias", vocab_size=100, width=64, mlp_width=128, head_width=32)
    flat = jax.device_get(tree.flatten(jax.jit(llama.init, static_argnums=0)(config, key=jax.random.key(0))))
    for path, leaf in flat.items():
        if path.endswith(("bias", "scale")):
            np.testing.assert_array_equal(leaf, 1.0 if path.endswith("scale") else 0.0)
        else:
            expected = 0.02 / 2 if path in ("blocks/attn/o", "blocks/mlp/down") else 0.02
            # The relative error of a standard deviation of n draws is 1/sqrt(2n); n >= 6400, five of them.
            assert float(np.std(leaf)) == pytest.approx(expected, rel=5 / math.sqrt(2 * 6400)), path


def test_tokens_are_their_embeddings_with_the_mask():
    config = config_of()
    params, tokens = params_of(config), np.asarray(tokens_of())
    embeddings = np.asarray(jax.jit(llama.embed)(params, tokens))
    np.testing.assert_array_equal(embeddings[0, 0], np.asarray(params["embed"])[tokens[0, 0]])
    logits = forward(params, embeddings, config=config, mask=MASK)
    np.testing.assert_allclose(logits, forward(params, tokens, config=config, mask=MASK), atol=SAME)


@pytest.mark.parametrize("variant", ["qwen2", "dynamic", "window"])
def test_jit_and_unroll_do_not_change_the_result(variant):
    config, mask = config_of(variant), jax.device_put(MASK)
    params, tokens = params_of(config), tokens_of()
    eager = np.asarray(llama.apply(params, tokens, config=config, mask=mask).logits)
    for unroll in (1, 2, 5):
        jitted = forward(params, tokens, config=dataclasses.replace(config, unroll=unroll), mask=mask)
        np.testing.assert_allclose(jitted, eager, atol=SAME * np.abs(eager).max())


@pytest.mark.parametrize("variant", ["every bias", "dynamic", "tied"])
def test_vmap_over_parameters_is_a_loop_over_seeds(variant):
    config, tokens = config_of(variant), tokens_of()
    seeds = [params_of(config, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)
    run = partial(logits_of, config=config, mask=MASK)
    batched = jax.jit(jax.vmap(run, in_axes=(0, None)))(stacked, tokens)
    looped = np.stack([run(params, tokens) for params in seeds])
    np.testing.assert_allclose(batched, looped, atol=SAME * np.abs(looped).max())


@pytest.mark.parametrize("variant", ["every bias", "tied", "window"])
def test_gradients_match_finite_differences(variant):
    config = config_of(variant)
    params, scalar = params_of(config), partial(bounded, tokens=tokens_of(), config=config, mask=MASK)
    check_grads(scalar, (params,), order=1, modes=["fwd", "rev"], atol=GRAD, rtol=GRAD, eps=1e-3)


def test_every_parameter_gets_a_gradient():
    config = config_of("every bias")
    params, tokens = params_of(config), tokens_of()
    _, gradients = logits_and_gradients(params, tokens, config=config, mask=MASK)
    for path, gradient in tree.flatten(gradients).items():
        assert np.abs(gradient).max() > 1e-4, path


def test_bfloat16_compute_gives_float32_logits_and_gradients_close_to_float32():
    config = config_of("every bias")
    params, tokens = params_of(config), tokens_of()

    half = dataclasses.replace(config, compute_dtype="bfloat16")
    (exact, wanted), (rounded, got) = (
        jax.device_get(logits_and_gradients(params, tokens, config=c, mask=MASK)) for c in (config, half)
    )
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - exact).max() <= BF16 * float(np.abs(exact).max())
    for path, gradient in tree.flatten(got).items():
        full = tree.flatten(wanted)[path]
        assert gradient.dtype == jnp.float32, path
        assert np.linalg.norm(gradient - full) <= 2 * BF16 * np.linalg.norm(full), path


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stored_in_bfloat16_activations_are_kept_so_alone(recompute):
    config = config_of("every bias", recompute=recompute)
    stored = dataclasses.replace(config, compute_dtype="bfloat16", stored_dtype="bfloat16")
    params, tokens = params_of(config), tokens_of()
    (exact, wanted), (rounded, got) = (
        jax.device_get(logits_and_gradients(params, tokens, config=c, mask=MASK)) for c in (config, stored)
    )
    assert rounded.dtype == jnp.float32
    # Every layer rounds the stream several times more than where its products round alone.
    assert 0 < np.abs(rounded - exact).max() <= 3 * BF16 * float(np.abs(exact).max())
    for path, gradient in tree.flatten(got).items():
        full = tree.flatten(wanted)[path]
        assert gradient.dtype == jnp.float32, path
        assert np.linalg.norm(gradient - full) <= 4 * BF16 * np.linalg.norm(full), path
    # What waits for the backward pass: of activations no float32 but the logits, and nothing [t, t].
    run = partial(bounded, tokens=tokens, config=stored, mask=MASK)
    kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(run, p)[1], params))
    own = [one for one in kept if tokens.size in one.shape and one.shape[-1] in (config.width, config.mlp_width)]
    assert own and all(one.dtype == jnp.bfloat16 for one in own)
    assert not any(one.shape[-2:] == (tokens.shape[1],) * 2 and one.dtype == jnp.float32 for one in kept)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("variant", ["every bias", "tied"])
def test_half_precision_weights_are_those_numbers_in_float32(variant, dtype):
    config = config_of(variant)
    half, tokens = params_of(config, dtype=dtype), tokens_of()
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), half)
    expected = forward(wide, tokens, config=config)
    logits, gradients = logits_and_gradients(half, tokens, config=config)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=SAME * np.abs(expected).max())
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(gradients))


def test_one_layer_is_widened_at_a_time():
    """Compiled, with and without a capture: what is held beside the weights fits no second float32 layer."""
    config = config_of(layers=8, width=64, mlp_width=256, head_width=16)
    params = jax.eval_shape(partial(params_of, config, dtype=jnp.bfloat16))
    layer = sum(4 * math.prod(s[1:]) for path, s in shapes_of(config).items() if path.startswith("blocks/"))
    for sites, layers in (((), None), (("mlp.hook_in",), (1, 4, 6))):
        run = partial(llama.apply, config=config, sites=sites, layers=layers)
        compiled = jax.jit(run).lower(params, jax.ShapeDtypeStruct((1, 4), jnp.int32)).compile()
        assert layer < compiled.memory_analysis().temp_size_in_bytes < 2 * layer


@pytest.mark.parametrize("layers", [(1,), (0, 2), (0, 1, 2)])
def test_layers_and_positions_select_from_the_full_capture(layers):
    config = config_of(layers=3)
    params, tokens = params_of(config), tokens_of()
    sites = ("hook_resid_mid", "mlp.hook_post")
    full_logits, full = jax.device_get(capture(params, tokens, config=config, sites=sites, mask=MASK))
    positions = np.array([[0, 5, 2], [4, 4, 1], [6, 0, 3]])
    picked = {"layers": layers, "positions": positions.astype(np.int32)}
    logits, some = capture(params, tokens, config=config, sites=sites, mask=MASK, **picked)
    np.testing.assert_allclose(logits, full_logits, atol=SAME * np.abs(full_logits).max())
    for site in sites:
        every = full[site]
        expected = [[[every[layer, b, t] for t in positions[b]] for b in range(3)] for layer in layers]
        assert some[site].shape == (len(layers), 3, 3, every.shape[-1])
        np.testing.assert_allclose(some[site], expected, atol=SAME * np.abs(every).max())


def test_capture_logits_are_the_forward_logits():
    config = config_of()
    params, tokens = params_of(config), tokens_of()
    logits, activations = capture(params, tokens, config=config, sites=())
    np.testing.assert_array_equal(logits, forward(params, tokens, config=config))
    assert activations == {}


def _held_shapes(**request):
    """Shapes that the scan over layers gives out beside the residual rows, in a model where no two sizes coincide."""
    config = config_of(layers=5)
    params, tokens = params_of(config), tokens_of()
    function = partial(llama.apply, config=config, **request)
    (scan,) = [e for e in jax.make_jaxpr(function)(params, tokens).jaxpr.eqns if e.primitive.name == "scan"]
    return [v.aval.shape for v in scan.outvars if v.aval.shape != (3 * 7, 8)]


def test_only_what_is_asked_for_is_stored():
    assert _held_shapes(sites=()) == []
    assert _held_shapes(sites=("mlp.hook_pre",)) == [(5, 3, 7, 12)]
    assert _held_shapes(sites=("mlp.hook_pre_linear",), layers=(1, 2, 4)) == [(3, 3, 7, 12)]
    positions = jax.device_put(np.zeros((3, 2), np.int32))
    assert _held_shapes(sites=("hook_resid_pre",), layers=(3,), positions=positions) == [(1, 3, 2, 8)]


def test_captures_have_the_gradient_of_what_they_capture():
    config = config_of()
    params, tokens = params_of(config), tokens_of()

    def final(params, site):
        return capture(params, tokens, config=config, sites=(site,), layers=(0,)).activations[site].sum()

    flow = jax.device_get(jax.jit(jax.grad(partial(final, site="mlp.hook_pre")))(params)["blocks"]["mlp"])
    assert np.abs(flow["gate"][0]).max() > 1e-3
    np.testing.assert_array_equal(flow["gate"][1], 0.0)
    np.testing.assert_array_equal(flow["up"], 0.0)


def test_soft_tokens_get_a_gradient():
    config = config_of()
    params = params_of(config)
    embeddings = np.asarray(params["embed"])[np.asarray(tokens_of())]
    third = jax.jit(jax.grad(lambda e: jnp.sum(llama.apply(params, e, config=config).logits[:, 2, 0])))
    gradient = np.asarray(third(embeddings))
    assert np.abs(gradient[:, :3]).max(axis=-1).min() > 1e-4
    np.testing.assert_array_equal(gradient[:, 3:], 0.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": 0}, "layers: got 0, expected an integer of at least 1"),
        ({"vocab_size": 1.5}, "vocab_size: got 1.5"),
        ({"mlp_width": None}, "mlp_width: got None"),
        ({"unroll": True}, "unroll: got True"),
        ({"window": 0}, "window: got 0, expected an integer of at least 1"),
        ({"kv_heads": 3}, "kv_heads: got 3, expected a divisor of heads 4"),
        ({"head_width": 5}, "head_width: got 5, expected an even number"),
        ({"head_width": 2, "rope": Rope(scaling="dynamic")}, "head_width: got 2, expected at least 4 for dynamic"),
        ({"norm_eps": 0.0}, "norm_eps: got 0.0, expected a number greater than 0"),
        ({"norm_eps": math.nan}, "norm_eps: got nan"),
        ({"tied": "no"}, "tied: got 'no', expected True or False"),
        ({"stored_dtype": "bfloat16"}, "stored_dtype: got 'bfloat16', expected compute_dtype 'bfloat16' as well"),
        ({"compute_dtype": "bfloat"}, "unknown compute_dtype 'bfloat'.*did you mean 'bfloat16'"),
    ],
)
def test_bad_configurations_are_named(unchecked, overrides, message):
    with pytest.raises(ValueError, match=message):
        config_of(**overrides)


def test_bad_requests_are_named():
    config = config_of()
    params, tokens = params_of(config), tokens_of()
    ask = partial(llama.apply, params, tokens, config=config)
    with pytest.raises(ValueError, match=r"unknown site 'mlp.hook_pre_linea'.*did you mean 'mlp.hook_pre_linear'"):
        ask(sites=("mlp.hook_pre_linea",))
    for layers in ((2,), (-1,), (1, 0), (1, 1), ()):
        with pytest.raises(ValueError, match="expected ascending indices from 0 to 1"):
            ask(sites=("hook_resid_pre",), layers=layers)
    with pytest.raises(ValueError, match="got 17 per sequence, expected at most max_tokens 16"):
        llama.apply(params, tokens_of(tokens=17), config=config)
