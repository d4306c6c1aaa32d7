"""Small Llama-family models and a NumPy float64 version of them: one sequence without padding, one head at a time."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafety import tree
from jaxsafety.models import llama
from jaxsafety.models.llama import Rope

TINY = {"vocab_size": 11, "max_tokens": 16, "layers": 2, "heads": 4, "kv_heads": 2}
TINY |= {"width": 8, "mlp_width": 12, "head_width": 4}
LLAMA3 = Rope(100.0, "llama3", factor=4.0, original_tokens=32)
VARIANTS = {
    "plain": {},
    "a key head per query head": {"kv_heads": 4, "head_width": 2},
    "one key head": {"kv_heads": 1},
    "linear": {"rope": Rope(100.0, "linear", factor=3.0)},
    "dynamic": {"rope": Rope(100.0, "dynamic", factor=2.0, original_tokens=4)},
    "llama3": {"rope": LLAMA3, "head_width": 8},
    "tied": {"tied": True},
    "qwen2": {"qkv_bias": True, "norm_eps": 1e-2},
    "every bias": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "window": {"window": 3},
}
# Where the real tokens of three sequences stand: everywhere, after padding, before padding.
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], bool)
SITES = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_in",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)


def config_of(variant="plain", **overrides):
    """A tiny model of a named variant."""
    return llama.LlamaConfig(**{**TINY, **VARIANTS[variant], **overrides})


@cache
def shapes_of(config):
    """Parameter path to shape."""
    params = jax.eval_shape(partial(llama.init, config), key=jax.random.key(0))
    return {path: leaf.shape for path, leaf in tree.flatten(params).items()}


def params_of(config, seed=0, dtype=jnp.float32, scale=0.5):
    """Weights of order one, no zero bias and no identity norm: at initialisation attention is nearly uniform."""
    rng = np.random.default_rng(seed)
    draw = {path: scale * rng.standard_normal(shape) for path, shape in shapes_of(config).items()}
    return tree.unflatten(jax.device_put({path: leaf.astype(dtype) for path, leaf in draw.items()}))


def tokens_of(batch=3, tokens=7, seed=7):
    """Random tokens ``[b, t]``."""
    return jax.device_put(np.random.default_rng(seed).integers(0, TINY["vocab_size"], (batch, tokens), np.int32))


def _norm(row, scale, eps):
    return row / math.sqrt(sum(row * row) / len(row) + eps) * scale


def _frequency(rope, i, width, length):
    base, factor = rope.base, rope.factor
    if rope.scaling == "dynamic" and length > rope.original_tokens:
        base *= (factor * length / rope.original_tokens - (factor - 1)) ** (width / (width - 2))
    plain = base ** (-2 * i / width)
    if rope.scaling == "linear":
        return plain / factor
    if rope.scaling != "llama3":
        return plain
    turns = rope.original_tokens * plain / (2 * math.pi)
    if turns > rope.high_frequency:
        return plain
    if turns < rope.low_frequency:
        return plain / factor
    share = (turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
    return (1 - share) * plain / factor + share * plain


def _rotated(row, position, length, rope):
    half = len(row) // 2
    turned = []
    for i in range(half):
        angle = position * _frequency(rope, i, len(row), length)
        turned.append(complex(row[i], row[i + half]) * np.exp(1j * angle))
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def _linear(row, weights, name):
    return row @ weights[name] + weights.get(f"{name}_bias", 0.0)


def _head(normed, w, head, config):
    """Attention of one query head over one sequence, position by position."""
    k, shared, count = config.head_width, config.heads // config.kv_heads, len(normed)

    def part(row, name, index):
        return _linear(row, w, name)[index * k : (index + 1) * k]

    turn = partial(_rotated, length=count, rope=config.rope)
    q = [turn(part(row, "q", head), t) for t, row in enumerate(normed)]
    keys = [turn(part(row, "k", head // shared), t) for t, row in enumerate(normed)]
    values = [part(row, "v", head // shared) for row in normed]
    mixed = []
    for t in range(count):
        seen = range(0 if config.window is None else max(0, t - config.window + 1), t + 1)
        weights = np.exp([q[t] @ keys[u] / math.sqrt(k) for u in seen])
        mixed.append(sum(a * values[u] for a, u in zip(weights / weights.sum(), seen, strict=True)))
    return np.array(mixed)


def _layer(x, w, config):
    normed = [_norm(row, w["norm_attn"]["scale"], config.norm_eps) for row in x]
    heads = [_head(normed, w["attn"], n, config) for n in range(config.heads)]
    attn_out = np.array([_linear(row, w["attn"], "o") for row in np.concatenate(heads, axis=1)])
    mid = x + attn_out
    mlp_in = np.array([_norm(row, w["norm_mlp"]["scale"], config.norm_eps) for row in mid])
    gate, up = (np.array([_linear(row, w["mlp"], name) for row in mlp_in]) for name in ("gate", "up"))
    post = gate / (1 + np.exp(-gate)) * up
    mlp_out = np.array([_linear(row, w["mlp"], "down") for row in post])
    return dict(zip(SITES, (x, attn_out, mid, mlp_in, gate, up, post, mlp_out, mid + mlp_out), strict=True))


def oracle(params, sequence, config):
    """Logits ``[t, v]`` and every site ``[l, t, .]`` of one sequence without padding, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, seen = params["embed"][np.asarray(sequence)], []
    for i in range(config.layers):
        seen.append(_layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]), config))
        x = seen[-1]["hook_resid_post"]
    last = np.array([_norm(row, params["norm"]["scale"], config.norm_eps) for row in x])
    logits = last @ (params["embed"].T if config.tied else params["unembed"])
    return logits, {site: np.array([layer[site] for layer in seen]) for site in SITES}
