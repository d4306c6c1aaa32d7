"""The decoder against a NumPy float64 oracle that loops over sequences, positions and heads."""

import dataclasses
import math
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

from jaxsafety import tree
from jaxsafety.models import gpt

ORACLE = 2e-4  # float32 through two layers at activations up to about 50
SAME = 1e-5  # the same float32 program, fused or batched differently
BF16 = 2**-5  # of the largest logit: 2^-9 for each rounding, through some ten products in sequence
GRAD = 2e-2  # finite differences of a float32 model
TINY = {"vocab_size": 11, "max_tokens": 8, "layers": 2, "heads": 2, "width": 8, "mlp_width": 12}
VARIANTS = [(block, positions) for block in ("paper", "pre_ln") for positions in ("sinusoidal", "learned", "rope")]
SITES = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)


def _config(block="paper", positions="sinusoidal", **overrides):
    return gpt.GPTConfig(**{**TINY, "block": block, "positions": positions, **overrides})


@cache
def _shapes(config):
    params = jax.eval_shape(partial(gpt.init, config), key=jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def _params(config, seed=0):
    """Weights of order one, no zero bias and no identity norm: at initialisation attention is nearly uniform."""
    rng = np.random.default_rng(seed)
    draw = {path: 0.5 * rng.standard_normal(shape) for path, shape in _shapes(config).items()}
    return tree.unflatten(jax.device_put({path: leaf.astype(np.float32) for path, leaf in draw.items()}))


def _tokens(batch=2, tokens=6):
    return jax.device_put(np.random.default_rng(7).integers(0, TINY["vocab_size"], (batch, tokens), np.int32))


init = jax.jit(gpt.init, static_argnums=0)
logits_of = jax.jit(lambda *given, config: gpt.apply(*given, config=config).logits, static_argnames="config")
capture = jax.jit(gpt.apply, static_argnames=("config", "sites", "layers"))


def forward(*given, config):
    return np.asarray(logits_of(*given, config=config))


def _norm(row, weights):
    return (row - row.mean()) / math.sqrt(row.var() + 1e-5) * weights["scale"] + weights["bias"]


def _rotated(row, position):
    half = len(row) // 2
    turned = [complex(row[i], row[i + half]) * np.exp(1j * position / 10_000 ** (i / half)) for i in range(half)]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def _head(normed, w, head, width, rope):
    """Attention of one head over one sequence, position by position."""
    columns = slice(head * width, (head + 1) * width)
    q, k, v = ([x @ w[n][:, columns] + w[f"{n}_bias"][columns] for x in normed] for n in "qkv")
    if rope:
        q, k = ([_rotated(row, t) for t, row in enumerate(rows)] for rows in (q, k))
    mixed = []
    for t in range(len(normed)):
        weights = np.exp([q[t] @ k[u] / math.sqrt(width) for u in range(t + 1)])
        mixed.append(sum(a * v[u] for u, a in enumerate(weights)) / weights.sum())
    return np.array(mixed)


def _layer(x, w, config):
    """One block on one sequence ``[t, d]``; returns every site."""
    normed = np.array([_norm(row, w["norm_attn"]) for row in x])
    width = config.width // config.heads
    heads = [_head(normed, w["attn"], n, width, config.positions == "rope") for n in range(config.heads)]
    attn_out = np.concatenate(heads, axis=1) @ w["attn"]["o"] + w["attn"]["o_bias"]
    if config.block == "paper":
        mid = mlp_in = normed + attn_out
    else:
        mid = x + attn_out
        mlp_in = np.array([_norm(row, w["norm_mlp"]) for row in mid])
    pre = mlp_in @ w["mlp"]["up"] + w["mlp"]["up_bias"]
    post = 0.5 * pre * (1 + np.tanh(math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3)))
    mlp_out = post @ w["mlp"]["down"] + w["mlp"]["down_bias"]
    return dict(zip(SITES, (x, attn_out, mid, pre, post, mlp_out, mid + mlp_out), strict=True))


def _oracle(params, tokens, config):
    """Logits ``[b, t, v]`` and every site ``[l, b, t, .]`` in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    logits, sites = [], []
    for sequence in np.asarray(tokens):
        x = params["embed"][sequence]
        if config.positions == "learned":
            x = x + params["positions"][: len(sequence)]
        elif config.positions == "sinusoidal":
            for t, channel in np.ndindex(x.shape):
                angle = t / 10_000 ** ((channel - channel % 2) / config.width)
                x[t, channel] += math.cos(angle) if channel % 2 else math.sin(angle)
        seen = []
        for i in range(config.layers):
            seen.append(_layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]), config))
            x = seen[-1]["hook_resid_post"]
        logits.append(np.array([_norm(row, params["norm"]) for row in x]) @ params["unembed"])
        sites.append(seen)
    stacked = {name: np.array([[s[i][name] for s in sites] for i in range(config.layers)]) for name in SITES}
    return np.array(logits), stacked


@pytest.mark.parametrize(("block", "positions"), VARIANTS)
def test_logits_and_activations_match_the_oracle(block, positions):
    config = _config(block, positions)
    params, tokens = _params(config), _tokens()
    expected_logits, expected = _oracle(params, tokens, config)
    logits, activations = capture(params, tokens, config=config, sites=SITES)
    np.testing.assert_allclose(logits, expected_logits, atol=ORACLE)
    assert set(activations) == set(SITES)
    for site in SITES:
        np.testing.assert_allclose(activations[site], expected[site], atol=ORACLE, err_msg=site)


@pytest.mark.parametrize(("block", "positions"), VARIANTS)
def test_later_tokens_do_not_change_earlier_logits(block, positions):
    config = _config(block, positions)
    params, tokens = _params(config), _tokens()
    changed = (np.asarray(tokens) + (np.arange(6, dtype=np.int32) == 3)) % config.vocab_size
    before, after = (forward(params, tokens, config=config), forward(params, changed, config=config))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert all(np.abs(before[:, t] - after[:, t]).max() > 1e-3 for t in range(3, 6))


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rope"])
def test_every_kind_of_position_breaks_permutation_symmetry(positions):
    config = _config(positions=positions)
    params = _params(config)
    logits = forward(params, np.array([[1, 2, 3, 0, 0, 0], [2, 1, 3, 0, 0, 0]], np.int32), config=config)
    assert np.abs(logits[0, 2] - logits[1, 2]).max() > 1e-3


@pytest.mark.parametrize(("vocab_size", "with_unused_norm"), [(59, 2_692_224), (54, 2_690_304)])
def test_paper_preset_has_the_published_size_less_the_unused_norm(vocab_size, with_unused_norm):
    config = gpt.preset("paper", vocab_size=vocab_size, max_tokens=159)
    params = jax.eval_shape(partial(gpt.init, config), key=jax.random.key(0))
    assert tree.count(params) == with_unused_norm - config.layers * 2 * config.width
    pre_ln = jax.eval_shape(partial(gpt.init, dataclasses.replace(config, block="pre_ln")), key=jax.random.key(0))
    assert tree.count(pre_ln) == with_unused_norm


def test_parameter_paths_and_shapes():
    shapes, lean = (_shapes(config) for config in (_config("pre_ln", "learned"), _config()))
    norms = {f"blocks/{norm}/{leaf}": (2, 8) for norm in ("norm_attn", "norm_mlp") for leaf in ("scale", "bias")}
    attn = {f"blocks/attn/{n}": (2, 8, 8) for n in "qkvo"} | {f"blocks/attn/{n}_bias": (2, 8) for n in "qkvo"}
    mlp = {"up": (2, 8, 12), "down": (2, 12, 8), "up_bias": (2, 12), "down_bias": (2, 8)}
    ends = {"embed": (11, 8), "positions": (8, 8), "norm/scale": (8,), "norm/bias": (8,), "unembed": (8, 11)}
    assert shapes == norms | attn | {f"blocks/mlp/{name}": shape for name, shape in mlp.items()} | ends
    assert set(shapes) - set(lean) == {"positions", "blocks/norm_mlp/scale", "blocks/norm_mlp/bias"}


def test_initial_scales():
    config = gpt.GPTConfig(vocab_size=100, max_tokens=8, layers=2, width=64)
    flat = jax.device_get(tree.flatten(init(config, key=jax.random.key(0))))
    for path, leaf in flat.items():
        if leaf.ndim < 2 or path.endswith(("bias", "scale")):
            np.testing.assert_array_equal(leaf, 1.0 if path.endswith("scale") else 0.0)
        else:
            expected = 0.02 / 2 if path in ("blocks/attn/o", "blocks/mlp/down") else 0.02
            # The relative error of a standard deviation of n draws is 1/sqrt(2n); n >= 6400, five of them.
            assert float(np.std(leaf)) == pytest.approx(expected, rel=5 / math.sqrt(2 * 6400)), path
    assert not np.array_equal(flat["blocks/attn/q"], flat["blocks/attn/k"])


def test_tokens_are_their_embeddings():
    config = _config()
    params, tokens = _params(config), np.asarray(_tokens())
    embeddings = np.asarray(jax.jit(gpt.embed)(params, tokens))
    np.testing.assert_array_equal(embeddings[0, 0], np.asarray(params["embed"])[tokens[0, 0]])
    logits = forward(params, embeddings, config=config)
    np.testing.assert_allclose(logits, forward(params, tokens, config=config), atol=SAME)


@pytest.mark.parametrize(("block", "positions"), VARIANTS)
def test_every_variant_has_float32_logits_of_the_vocabulary(block, positions):
    config = _config(block, positions)
    params = jax.eval_shape(partial(gpt.init, config), key=jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((3, 5), jnp.int32)
    logits = jax.eval_shape(partial(gpt.apply, config=config), params, tokens).logits
    assert (logits.shape, logits.dtype) == ((3, 5, 11), jnp.float32)


@pytest.mark.parametrize(("block", "positions"), [("paper", "rope"), ("pre_ln", "learned")])
def test_jit_and_unroll_do_not_change_the_result(block, positions):
    config = _config(block, positions)
    params, tokens = _params(config), _tokens()
    eager = np.asarray(gpt.apply(params, tokens, config=config).logits)
    for unroll in (1, 2):
        jitted = forward(params, tokens, config=dataclasses.replace(config, unroll=unroll))
        np.testing.assert_allclose(jitted, eager, atol=SAME)


@pytest.mark.parametrize(("block", "positions"), [("paper", "rope"), ("pre_ln", "learned")])
def test_vmap_over_parameters_is_a_loop_over_seeds(block, positions):
    config = _config(block, positions)
    seeds = [_params(config, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)
    batched = jax.jit(jax.vmap(partial(gpt.apply, config=config), in_axes=(0, None)))(stacked, _tokens()).logits
    looped = np.stack([forward(params, _tokens(), config=config) for params in seeds])
    np.testing.assert_allclose(batched, looped, atol=SAME)


@pytest.mark.parametrize(("block", "positions"), [("paper", "sinusoidal"), ("pre_ln", "rope")])
def test_gradients_match_finite_differences(block, positions):
    config = _config(block, positions)
    params, tokens = _params(config), _tokens()
    scalar = jax.jit(lambda p: jnp.mean(jnp.tanh(gpt.apply(p, tokens, config=config).logits)))
    check_grads(scalar, (params,), order=1, modes=["rev"], atol=GRAD, rtol=GRAD, eps=1e-3)


def test_every_parameter_but_the_key_bias_gets_a_gradient():
    config = _config("pre_ln", "learned")
    params, tokens = _params(config), np.arange(8, dtype=np.int32)[None]
    squares = jax.jit(jax.grad(lambda p, tokens: jnp.mean(jnp.square(gpt.apply(p, tokens, config=config).logits))))
    gradients = squares(params, tokens)
    for path, gradient in tree.flatten(gradients).items():
        # A key bias shifts all scores of a query alike, which softmax does not see.
        if path != "blocks/attn/k_bias":
            assert np.abs(gradient).max() > 1e-4, path


def _losses(config, tokens):
    """A float32 loss of the logits, as a function of the parameters, and the logits."""

    def loss(params):
        logits = gpt.apply(params, tokens, config=config).logits
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0]), logits

    return loss


@pytest.mark.parametrize(
    ("block", "positions"), [VARIANTS[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in VARIANTS[1:])]
)
def test_bfloat16_compute_gives_float32_logits_and_gradients_close_to_float32(block, positions):
    config = _config(block, positions)
    params, tokens = _params(config), _tokens()
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    ((loss, exact), wanted), ((loss16, rounded), got) = (
        jax.device_get(jax.jit(jax.value_and_grad(_losses(c, tokens), has_aux=True))(params)) for c in (config, half)
    )
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - exact).max() <= BF16 * float(np.abs(exact).max())
    assert float(loss16) == pytest.approx(float(loss), rel=BF16)
    for path, gradient in tree.flatten(got).items():
        assert gradient.dtype == jnp.float32, path
        # The gradient by the key bias is zero but for rounding, without rotation.
        if path != "blocks/attn/k_bias":
            exact = tree.flatten(wanted)[path]
            assert np.linalg.norm(gradient - exact) <= 2 * BF16 * np.linalg.norm(exact), path


@pytest.mark.parametrize(
    ("block", "positions"), [VARIANTS[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in VARIANTS[1:])]
)
def test_stored_in_bfloat16_activations_are_kept_so_alone(block, positions):
    config = _config(block, positions)
    stored = dataclasses.replace(config, compute_dtype="bfloat16", stored_dtype="bfloat16")
    params, tokens = _params(config), _tokens(batch=3)
    ((loss, exact), wanted), ((loss16, rounded), got) = (
        jax.device_get(jax.jit(jax.value_and_grad(_losses(c, tokens), has_aux=True))(params)) for c in (config, stored)
    )
    assert rounded.dtype == jnp.float32 and float(loss16) == pytest.approx(float(loss), rel=BF16)
    # Every layer rounds the stream several times more than where its products round alone.
    assert 0 < np.abs(rounded - exact).max() <= 3 * BF16 * float(np.abs(exact).max())
    for path, gradient in tree.flatten(got).items():
        assert gradient.dtype == jnp.float32, path
        if path != "blocks/attn/k_bias":
            exact = tree.flatten(wanted)[path]
            assert np.linalg.norm(gradient - exact) <= 4 * BF16 * np.linalg.norm(exact), path
    # What waits for the backward pass: of activations no float32 but the logits, and nothing [t, t].
    rows, tokens_each = tokens.size, tokens.shape[1]
    kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(lambda p: _losses(stored, tokens)(p)[0], p)[1], params))
    of_activations = [one for one in kept if rows in one.shape or one.shape[1:3] == tokens.shape]
    assert of_activations and all(one.dtype == jnp.bfloat16 for one in of_activations)
    assert not any(one.shape[-2:] == (tokens_each, tokens_each) for one in kept)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


@pytest.mark.parametrize(("block", "positions"), [("paper", "learned"), ("pre_ln", "rope")])
def test_bfloat16_rounds_the_factors_of_every_product_and_nothing_else(block, positions):
    config = _config(block, positions, unroll=1, compute_dtype="bfloat16")
    equations = list(
        _equations(jax.make_jaxpr(jax.grad(_losses(config, _tokens()), has_aux=True))(_params(config)).jaxpr)
    )
    names = Counter(equation.primitive.name for equation in equations)
    # In a layer q, k, v, scores, mixed values, o, up and down; then the logits. Each once forwards, twice backwards,
    # with two factors to round and a cotangent. Were the input of a norm or softmax rounded, there would be more.
    assert names["dot_general"] == names["reduce_precision"] == 3 * (8 + 1)
    for equation in equations:
        floats = [v.aval.dtype for v in equation.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
        assert all(dtype == jnp.float32 for dtype in floats), equation
        if equation.primitive.name == "dot_general":
            assert equation.params["precision"] == jax.lax.DotAlgorithmPreset.BF16_BF16_F32


def test_bfloat16_weights_give_float32_logits_close_to_the_full_precision_ones():
    config = _config()
    params, tokens = _params(config), _tokens()
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), params)
    exact, rounded = (forward(p, tokens, config=config) for p in (params, half))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=BF16 * float(np.abs(exact).max()))


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_layers_and_positions_select_from_the_full_capture(layers):
    config = _config(layers=3)
    params, tokens = _params(config), _tokens()
    sites = ("hook_resid_mid", "mlp.hook_post")
    full_logits, full = capture(params, tokens, config=config, sites=sites)
    positions = np.array([[0, 5, 2], [4, 4, 1]])
    logits, some = capture(
        params, tokens, config=config, sites=sites, layers=layers, positions=positions.astype(np.int32)
    )
    np.testing.assert_allclose(logits, full_logits, atol=SAME)
    for site in sites:
        assert some[site].shape == (len(layers), 2, 3, full[site].shape[-1])
        every = np.asarray(full[site])
        expected = [[[every[layer, b, t] for t in positions[b]] for b in range(2)] for layer in layers]
        np.testing.assert_allclose(some[site], expected, atol=SAME)


def test_capture_logits_are_the_forward_logits():
    config = _config()
    params, tokens = _params(config), _tokens()
    logits, activations = capture(params, tokens, config=config, sites=())
    np.testing.assert_array_equal(logits, forward(params, tokens, config=config))
    assert activations == {}


def _stacked_shapes(**request):
    """Shapes that the scans over layers stack, in a model where no two sizes coincide."""
    config = _config(layers=5, width=8, mlp_width=12)
    params, tokens = _params(config), _tokens(batch=3, tokens=7)
    function = partial(gpt.apply, config=config, **request)
    scans = [e for e in jax.make_jaxpr(function)(params, tokens).jaxpr.eqns if e.primitive.name == "scan"]
    carry = (3 * 7, 8)  # the residual rows; jax 0.12 no longer counts the carries in the equation's parameters
    return [v.aval.shape for scan in scans for v in scan.outvars if v.aval.shape != carry]


def test_only_what_is_asked_for_is_stored():
    assert _stacked_shapes(sites=()) == []
    assert _stacked_shapes(sites=("mlp.hook_pre",)) == [(5, 3, 7, 12)]
    assert _stacked_shapes(sites=("mlp.hook_pre",), layers=(1, 2, 4)) == [(2, 3, 7, 12), (1, 3, 7, 12)]
    positions = jax.device_put(np.zeros((3, 2), np.int32))
    assert _stacked_shapes(sites=("hook_resid_pre",), layers=(3,), positions=positions) == [(1, 3, 2, 8)]


def test_soft_tokens_get_a_gradient():
    config = _config()
    params = _params(config)
    embeddings = np.asarray(params["embed"])[np.asarray(_tokens())]
    third = jax.jit(jax.grad(lambda e: jnp.sum(gpt.apply(params, e, config=config).logits[:, 2, 0])))
    gradient = np.asarray(third(embeddings))
    assert np.abs(gradient[:, :3]).max(axis=-1).min() > 1e-4
    np.testing.assert_array_equal(gradient[:, 3:], 0.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": 0}, "layers: got 0"),
        ({"vocab_size": -1}, "vocab_size: got -1"),
        ({"mlp_width": 0}, "mlp_width: got 0"),
        ({"unroll": 0}, "unroll: got 0"),
        ({"heads": 3}, "heads: got 3, expected a divisor of width 8"),
        ({"block": "preln"}, "unknown block 'preln'.*did you mean 'pre_ln'"),
        ({"positions": "learnt"}, "unknown positions 'learnt'.*did you mean 'learned'"),
        ({"compute_dtype": "bfloat"}, "unknown compute_dtype 'bfloat'.*did you mean 'bfloat16'"),
        ({"stored_dtype": "bfloat16"}, "stored_dtype: got 'bfloat16', expected compute_dtype 'bfloat16' as well"),
        ({"attention": "fused"}, "attention: got 'fused', expected compute_dtype 'bfloat16' as well"),
        (
            {"attention": "fused", "compute_dtype": "bfloat16"},
            "attention: got 'fused' with heads of width 4, expected a multiple of 8 up to 128",
        ),
        ({"attention": "flash"}, "unknown attention 'flash'"),
        ({"positions": "rope", "heads": 8}, "even head width"),
        ({"heads": 1, "width": 7}, "even width"),
    ],
)
def test_bad_configurations_are_named(unchecked, overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(_config(), **overrides)


def test_presets(unchecked):
    sizes = {name: gpt.preset(name, vocab_size=59, max_tokens=114) for name in ("paper", "small", "tiny")}
    shapes = {name: (config.layers, config.heads, config.width) for name, config in sizes.items()}
    assert shapes == {"paper": (6, 6, 192), "small": (3, 4, 96), "tiny": (3, 4, 64)}
    assert gpt.preset("small", vocab_size=5, max_tokens=4, width=32, positions="rope").width == 32
    with pytest.raises(ValueError, match=r"unknown preset 'smal'.*did you mean 'small'"):
        gpt.preset("smal", vocab_size=5, max_tokens=4)
    with pytest.raises(ValueError, match="did you mean 'width'"):
        gpt.preset("small", vocab_size=5, max_tokens=4, widht=32)


def test_bad_requests_are_named():
    config = _config()
    params, tokens = _params(config), _tokens()
    ask = partial(gpt.apply, params, tokens, config=config)
    with pytest.raises(ValueError, match=r"unknown site 'mlp.hook_pree'.*did you mean 'mlp.hook_pre'"):
        ask(sites=("mlp.hook_pree",))
    for layers in ((2,), (-1,), (1, 0), (1, 1), ()):
        with pytest.raises(ValueError, match="expected ascending indices from 0 to 1"):
            ask(sites=("hook_resid_pre",), layers=layers)
    with pytest.raises(ValueError, match="got 9 per sequence, expected at most max_tokens 8"):
        gpt.apply(params, _tokens(tokens=9), config=config)
