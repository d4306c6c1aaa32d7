"""A Llama-family model in float64, written head by head and query by query: slow, and by another road than the library.

Rotations are complex numbers, the softmax runs over the visible keys alone, and nothing is batched.
"""

import math

import numpy as np


def oracle(params, tokens, config):
    """Returns logits ``[b, t, v]`` and activations by site ``[l, b, t, _]`` in float64."""
    params = _wide(params)
    seen = [_sequence(params, row, config) for row in tokens]
    logits = np.stack([logits for logits, _ in seen])
    sites = {site: np.stack([layers[site] for _, layers in seen], axis=1) for site in seen[0][1]}
    return logits, sites


def _wide(tree):
    return {
        name: _wide(part) if isinstance(part, dict) else np.asarray(part, np.float64) for name, part in tree.items()
    }


def _sequence(params, tokens, config):
    x, kept = params["embed"][tokens], {}
    for layer in range(config.layers):
        weights = {
            part: {name: leaf[layer] for name, leaf in params["blocks"][part].items()} for part in params["blocks"]
        }
        before = x
        attn_out = _attention(_norm(x, weights["norm_attn"], config), weights["attn"], config)
        mid = x + attn_out
        mlp, mlp_in = weights["mlp"], _norm(mid, weights["norm_mlp"], config)
        gate, up = (mlp_in @ mlp[name] + mlp.get(f"{name}_bias", 0.0) for name in ("gate", "up"))
        post = gate / (1 + np.exp(-gate)) * up
        mlp_out = post @ mlp["down"] + mlp.get("down_bias", 0.0)
        x = mid + mlp_out
        found = {
            "hook_resid_pre": before,
            "hook_attn_out": attn_out,
            "hook_resid_mid": mid,
            "mlp.hook_in": mlp_in,
            "mlp.hook_pre": gate,
            "mlp.hook_pre_linear": up,
            "mlp.hook_post": post,
            "hook_mlp_out": mlp_out,
            "hook_resid_post": x,
        }
        for site, value in found.items():
            kept.setdefault(site, []).append(value)
    head = params["embed"].T if config.tied else params["unembed"]
    return _norm(x, params["norm"], config) @ head, {site: np.stack(values) for site, values in kept.items()}


def _norm(x, weights, config):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weights["scale"]


def _attention(x, weights, config):
    k, tokens = config.head_width, len(x)
    q, keys, values = (x @ weights[name] + weights.get(f"{name}_bias", 0.0) for name in "qkv")
    turned = np.exp(1j * np.arange(tokens)[:, None] * _frequencies(config, tokens)[None])

    def rotated(head):
        turns = (head[:, : k // 2] + 1j * head[:, k // 2 :]) * turned
        return np.concatenate([turns.real, turns.imag], axis=1)

    mixed = np.zeros((tokens, config.heads * k))
    for head in range(config.heads):
        group = head // (config.heads // config.kv_heads)
        mine, theirs = slice(head * k, (head + 1) * k), slice(group * k, (group + 1) * k)
        queries, own_keys = rotated(q[:, mine]), rotated(keys[:, theirs])
        for place in range(tokens):
            first = 0 if config.window is None else max(0, place - config.window + 1)
            scores = own_keys[first : place + 1] @ queries[place] / math.sqrt(k)
            weights_of = np.exp(scores - scores.max())
            mixed[place, mine] = weights_of / weights_of.sum() @ values[first : place + 1, theirs]
    return mixed @ weights["o"] + weights.get("o_bias", 0.0)


def _frequencies(config, tokens):
    rope, k = config.rope, config.head_width
    base = rope.base
    if rope.scaling == "dynamic" and tokens > rope.original_tokens:
        base *= (rope.factor * tokens / rope.original_tokens - (rope.factor - 1)) ** (k / (k - 2))
    found = []
    for pair in range(k // 2):
        angle = base ** (-2 * pair / k)
        if rope.scaling == "linear":
            angle /= rope.factor
        if rope.scaling == "llama3":
            wavelength = 2 * math.pi / angle
            if wavelength > rope.original_tokens / rope.low_frequency:
                angle /= rope.factor
            elif wavelength > rope.original_tokens / rope.high_frequency:
                span = rope.high_frequency - rope.low_frequency
                smooth = (rope.original_tokens / wavelength - rope.low_frequency) / span
                angle = (1 - smooth) * angle / rope.factor + smooth * angle
        found.append(angle)
    return np.array(found)
