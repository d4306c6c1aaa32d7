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
# Of Qwen3, OLMo 2, SmolLM3, Gemma 2 and Gemma 3.
PIECES = {
    "yarn": {"rope": Rope(100.0, "yarn", 4.0, 0.25, 2.0, 16, 1.25), "head_width": 8},
    "norm of heads": {"query_norm": "head", "kv_heads": 1},
    "norms after": {"norms": "after", "query_norm": "whole"},
    "some layers turn": {"rotated": (True, False), "rope": LLAMA3, "head_width": 8},
    "some layers have a window": {"window": 2, "windowed": (True, False), "norms": "both", "norm_offset": True,
                                  "activation": "gelu", "embed_scale": 3.0, "query_scalar": 7.0, "attn_softcap": 1.5,
                                  "logit_softcap": 2.5, "tied": True},
    "two ropes": {"window": 3, "windowed": (False, True), "local_rope": Rope(7.0), "query_norm": "head",
                  "norm_offset": True},
}  # fmt: skip
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
    return llama.LlamaConfig(**{**TINY, **(VARIANTS | PIECES)[variant], **overrides})


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


def _norm(row, scale, config):
    scale = scale + 1 if config.norm_offset else scale
    return row / math.sqrt(sum(row * row) / len(row) + config.norm_eps) * scale


def _capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def _gated(gate, up, config):
    if config.activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    return gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def _frequency(rope, i, width, length):
    base, factor = rope.base, rope.factor
    if rope.scaling == "dynamic" and length > rope.original_tokens:
        base *= (factor * length / rope.original_tokens - (factor - 1)) ** (width / (width - 2))
    plain = base ** (-2 * i / width)
    if rope.scaling == "linear":
        return plain / factor
    if rope.scaling == "yarn":
        first, last = (width / 2 * math.log(rope.original_tokens / (2 * math.pi * turns), base)
                       for turns in (rope.high_frequency, rope.low_frequency))  # fmt: skip
        first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        share = min(max((i - first) / (last - first), 0), 1)
        return share * plain / factor + (1 - share) * plain
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
        turned.append(rope.amplitude * complex(row[i], row[i + half]) * np.exp(1j * angle))
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def _linear(row, weights, name):
    return row @ weights[name] + weights.get(f"{name}_bias", 0.0)


def _head(normed, weights, head, config, layer):
    """Attention of one query head over one sequence, position by position."""
    k, shared, count = config.head_width, config.heads // config.kv_heads, len(normed)
    near = config.window is not None and (not config.windowed or config.windowed[layer])

    def part(row, name, index):
        whole, own = _linear(row, weights["attn"], name), slice(index * k, (index + 1) * k)
        if name == "v" or config.query_norm == "none":
            return whole[own]
        scale = weights[f"norm_{name}"]["scale"]
        if config.query_norm == "whole":
            return _norm(whole, scale, config)[own]
        return _norm(whole[own], scale, config)

    turn = partial(_rotated, length=count, rope=config.local_rope if near and config.local_rope else config.rope)
    if config.rotated and not config.rotated[layer]:
        turn = lambda row, position: row  # noqa: E731
    q = [turn(part(row, "q", head), t) for t, row in enumerate(normed)]
    keys = [turn(part(row, "k", head // shared), t) for t, row in enumerate(normed)]
    values = [part(row, "v", head // shared) for row in normed]
    mixed = []
    for t in range(count):
        seen = range(max(0, t - config.window + 1) if near else 0, t + 1)
        scores = np.array([q[t] @ keys[u] for u in seen]) / math.sqrt(config.query_scalar or k)
        shares = np.exp(_capped(scores, config.attn_softcap))
        mixed.append(sum(a * values[u] for a, u in zip(shares / shares.sum(), seen, strict=True)))
    return np.array(mixed)


def _layer(x, w, config, layer):
    def normed(rows, name, sides):
        return np.array([_norm(row, w[name]["scale"], config) for row in rows]) if config.norms in sides else rows

    before, after = ("before", "both"), ("after", "both")
    attn_in = normed(x, "norm_attn", before)
    heads = [_head(attn_in, w, n, config, layer) for n in range(config.heads)]
    attn_out = np.array([_linear(row, w["attn"], "o") for row in np.concatenate(heads, axis=1)])
    attn_out = normed(attn_out, "norm_attn_out", after)
    mid = x + attn_out
    mlp_in = normed(mid, "norm_mlp", before)
    gate, up = (np.array([_linear(row, w["mlp"], name) for row in mlp_in]) for name in ("gate", "up"))
    post = _gated(gate, up, config)
    mlp_out = normed(np.array([_linear(row, w["mlp"], "down") for row in post]), "norm_mlp_out", after)
    return dict(zip(SITES, (x, attn_out, mid, mlp_in, gate, up, post, mlp_out, mid + mlp_out), strict=True))


def oracle(params, sequence, config):
    """Logits ``[t, v]`` and every site ``[l, t, .]`` of one sequence without padding, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, seen = params["embed"][np.asarray(sequence)] * config.embed_scale, []
    for i in range(config.layers):
        seen.append(_layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]), config, i))
        x = seen[-1]["hook_resid_post"]
    last = np.array([_norm(row, params["norm"]["scale"], config) for row in x])
    logits = last @ (params["embed"].T if config.tied else params["unembed"])
    return _capped(logits, config.logit_softcap), {site: np.array([layer[site] for layer in seen]) for site in SITES}
