"""Llama-family decoders (Llama 2 and 3, Mistral, Qwen2) as pure functions of a nested dict of stacked weights.

Paths: ``embed``, ``blocks/{norm_attn, attn, norm_mlp, mlp}``, ``norm``, ``unembed`` (absent when tied); leaves below
``blocks`` lead with ``l``, matrices are ``[in, out]``, heads are contiguous. Weights may be float32, bfloat16 or
float16: a scan over layers widens one layer's at a time, and whatever is computed is float32.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.models import layers as nn
from jaxsafety.models import rope
from jaxsafety.models.llama_config import LlamaConfig
from jaxsafety.models.rope import Rope, RopeScaling
from jaxsafety.models.sites import chosen_layers, pick
from jaxsafety.models.widening import widened
from jaxsafety.types import Key, Params

__all__ = [
    "LlamaConfig",
    "Rope",
    "RopeScaling",
    "Site",
    "attention",
    "block",
    "embed",
    "forward",
    "forward_embeddings",
    "forward_embeddings_with_activations",
    "forward_with_activations",
    "init",
    "scan_layers",
    "unembed",
]

Site = Literal[
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_in",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
]

# Rows [b, t, n, k], [b, t, g, k], [b, t, g, k], neither rotated, to [b, t, n, k] and whatever the caller keeps.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

_HIDDEN_SITES = ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")
_INIT_STD = 0.02


def init(config: LlamaConfig, *, key: Key) -> Params:
    """Returns fresh parameters: matrices N(0, 0.02^2), biases 0, norms the identity.

    The two projections back into the residual stream are N(0, 0.02^2 / 2l), so its variance does not grow with depth.

    Args:
        config: the model.
        key: typed PRNG key.

    Returns:
        Nested dict of float32 arrays (paths in the module docstring). The Llama-2 7B sizes give 6 738 415 616.
    """
    depth, d, f, v = config.layers, config.width, config.mlp_width, config.vocab_size
    queries, keys_ = config.heads * config.head_width, config.kv_heads * config.head_width
    streams = iter(jax.random.split(key, 9))

    def normal(*shape: int, std: float = _INIT_STD) -> Array:
        return std * jax.random.normal(next(streams), shape, jnp.float32)

    def biased(weights: Params, names: tuple[str, ...]) -> Params:
        return weights | {f"{name}_bias": jnp.zeros((depth, weights[name].shape[-1]), jnp.float32) for name in names}

    residual_std = _INIT_STD / (2 * depth) ** 0.5
    attn = {"q": normal(depth, d, queries), "k": normal(depth, d, keys_), "v": normal(depth, d, keys_)}
    attn["o"] = normal(depth, queries, d, std=residual_std)
    attn = biased(attn, ("q", "k", "v") * config.qkv_bias + ("o",) * config.out_bias)
    mlp = {"gate": normal(depth, d, f), "up": normal(depth, d, f), "down": normal(depth, f, d, std=residual_std)}
    mlp = biased(mlp, ("gate", "up", "down") * config.mlp_bias)
    norms = {name: {"scale": jnp.ones((depth, d), jnp.float32)} for name in ("norm_attn", "norm_mlp")}
    params = {"embed": normal(v, d), "blocks": norms | {"attn": attn, "mlp": mlp}}
    params["norm"] = {"scale": jnp.ones(d, jnp.float32)}
    return params if config.tied else params | {"unembed": normal(d, v)}


def embed(params: Params, tokens: Int[Array, "b t"], *, config: LlamaConfig) -> Float[Array, "b t d"]:
    """Returns the token embeddings.

    Args:
        params: from :func:`init`.
        tokens: ``[b, t]`` ids in [0, v).
        config: the model; a Llama does not need it, but a caller need not know which decoder it embeds for.

    Returns:
        ``[b, t, d]`` float32, what :func:`forward_embeddings` takes.
    """
    return params["embed"][tokens].astype(jnp.float32)


def forward(
    params: Params, tokens: Int[Array, "b t"], *, config: LlamaConfig, mask: Bool[Array, "b t"] | None = None
) -> Float[Array, "b t v"]:
    """Returns next-token logits.

    Args:
        params: from :func:`init`.
        tokens: ``[b, t]`` ids in [0, v), t at most ``config.max_tokens``.
        config: the model.
        mask: ``[b, t]``, True where a token is real. Padding may stand anywhere: no real token attends to it, and
            positions count the real ones. None is no padding.

    Returns:
        ``[b, t, v]`` float32 logits in nats, up to a constant per position; finite but meaningless at padding.

    Raises:
        ValueError: more tokens than ``config.max_tokens``.

    Fidelity:
        The released models' forward pass but for dynamic rope scaling, see :func:`jaxsafety.models.rope.frequencies`.

    References:
        Touvron et al. (2023), Llama 2, arXiv:2307.09288; Grattafiori et al. (2024), The Llama 3 Herd of Models,
        arXiv:2407.21783; Jiang et al. (2023), Mistral 7B, arXiv:2310.06825; Yang et al. (2024), Qwen2 Technical Report,
        arXiv:2407.10671.
    """
    return forward_embeddings(params, embed(params, tokens, config=config), config=config, mask=mask)


def forward_embeddings(
    params: Params, embeddings: Float[Array, "b t d"], *, config: LlamaConfig, mask: Bool[Array, "b t"] | None = None
) -> Float[Array, "b t v"]:
    """Returns next-token logits for embeddings that need not belong to a token (soft tokens, sensitivities).

    Args:
        params: from :func:`init`.
        embeddings: ``[b, t, d]``, as :func:`embed` returns them.
        config: the model.
        mask: as in :func:`forward`.

    Returns:
        ``[b, t, v]`` float32 logits.

    Raises:
        ValueError: more tokens than ``config.max_tokens``.
    """
    return _run(params, embeddings, config=config, mask=mask)[0]


def forward_with_activations(
    params: Params,
    tokens: Int[Array, "b t"],
    *,
    config: LlamaConfig,
    sites: tuple[str, ...],
    layers: tuple[int, ...] | None = None,
    positions: Int[Array, "b p"] | None = None,
    mask: Bool[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t v"], dict[str, Float[Array, "l b _ _"]]]:
    """Returns next-token logits and the activations asked for; nothing else is stored.

    See :func:`forward_embeddings_with_activations`, which this calls on the embeddings of ``tokens``.
    """
    embeddings = embed(params, tokens, config=config)
    return forward_embeddings_with_activations(
        params, embeddings, config=config, sites=sites, layers=layers, positions=positions, mask=mask
    )


def forward_embeddings_with_activations(
    params: Params,
    embeddings: Float[Array, "b t d"],
    *,
    config: LlamaConfig,
    sites: tuple[str, ...],
    layers: tuple[int, ...] | None = None,
    positions: Int[Array, "b p"] | None = None,
    mask: Bool[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t v"], dict[str, Float[Array, "l b _ _"]]]:
    """Returns next-token logits and the activations asked for; nothing else is stored.

    Site ``s`` of layer ``i`` is TransformerLens's ``blocks.{i}.{s}``: ``mlp.hook_pre`` is the gate before its SiLU,
    ``mlp.hook_pre_linear`` the up projection, ``mlp.hook_post`` their product and what down is multiplied with.
    ``mlp.hook_in``, which it has no name for, is what gate and up are multiplied with.

    Args:
        params: from :func:`init`.
        embeddings: ``[b, t, d]``, as :func:`embed` returns them.
        config: the model.
        sites: names among :data:`Site`.
        layers: ascending layer indices; None is all of them.
        positions: ``[b, p]`` indices into ``t`` (padding counts), one row per sequence; None is every position. NaN
            where out of range.
        mask: as in :func:`forward`.

    Returns:
        ``[b, t, v]`` logits, and for each site ``[l, b, p, d]`` (``f`` for the three inside the MLP, ``t`` without
        ``positions``), ``l`` running over ``layers``.

    Raises:
        ValueError: unknown site, or layers that are not ascending indices of this model.
    """
    chosen = chosen_layers(layers, depth=config.layers, sites=sites, known=get_args(Site))
    return _run(params, embeddings, config=config, mask=mask, sites=sites, layers=chosen, positions=positions)


def scan_layers(
    body: Callable[[Any, Params, Any], tuple[Any, Any]],
    carry: Any,
    scanned: Any,
    *,
    params: Params,
    config: LlamaConfig,
) -> tuple[Any, Any]:
    """Returns ``jax.lax.scan`` over the layers, whose weights are widened to float32 one layer at a time.

    Args:
        body: ``(carry, one layer's weights, slice of scanned) -> (carry, what to stack)``.
        carry: what goes from layer to layer.
        scanned: arrays that lead with ``l``, or None.
        params: from :func:`init`.
        config: the model.
    """

    def layer(carry, scanned):
        weights, index, more = scanned
        return body(carry, widened(weights, stacked=params["blocks"], index=index), more)

    # In a scan nothing can be shared between the two runs of a layer, so nothing has to prevent that.
    layer = jax.checkpoint(layer, prevent_cse=False) if config.recompute else layer
    xs = (params["blocks"], jnp.arange(config.layers), scanned)
    return jax.lax.scan(layer, carry, xs, unroll=min(config.unroll, config.layers))


def block(
    x: Float[Array, "rows d"], weights: Params, *, config: LlamaConfig, tokens: int, attend: Attend
) -> tuple[Float[Array, "rows d"], dict[str, Float[Array, "rows _"]], Any]:
    """Returns one layer's output, its activations by site, and what ``attend`` keeps.

    Args:
        x: ``[b*t, d]`` residual stream.
        weights: one layer of ``params["blocks"]`` in float32, as :func:`scan_layers` hands it out.
        config: the model.
        tokens: ``t``.
        attend: mixes ``[b, t, n, k]`` queries with ``[b, t, g, k]`` keys and values, none of them rotated yet; returns
            ``[b, t, n, k]`` and anything to keep.
    """
    norm = partial(nn.rms_norm, eps=config.norm_eps)

    def linear(x, part, name):
        project = partial(nn.project, dtype=config.compute_dtype)
        y = project(x, weights[part][name])
        # An adapter's factors, see jaxsafety.models.lora: their product is never formed.
        if (low := weights[part].get(f"{name}_lora_a")) is not None:
            y = y + project(project(x, low), weights[part][f"{name}_lora_b"])
        bias = weights[part].get(f"{name}_bias")
        return y if bias is None else y + bias[None, :]

    normed = norm(x, scale=weights["norm_attn"]["scale"])
    heads = (linear(normed, "attn", name).reshape(-1, tokens, n, config.head_width)
             for name, n in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)))  # fmt: skip
    mixed, kept = attend(*heads)
    attn_out = linear(mixed.reshape(len(x), -1), "attn", "o")
    mid = x + attn_out
    mlp_in = norm(mid, scale=weights["norm_mlp"]["scale"])
    gate, up = linear(mlp_in, "mlp", "gate"), linear(mlp_in, "mlp", "up")
    post = jax.nn.silu(gate) * up
    mlp_out = linear(post, "mlp", "down")
    out = mid + mlp_out
    seen = (x, attn_out, mid, mlp_in, gate, up, post, mlp_out, out)
    return out, dict(zip(get_args(Site), seen, strict=True)), kept


def attention(mask: Bool[Array, "b t"], *, config: LlamaConfig) -> Attend:
    """Returns the attention of whole sequences at once, for :func:`block`; it keeps the rotated keys.

    Args:
        mask: ``[b, t]``, True where a token is real; b may be 1 for all sequences alike.
        config: the model.
    """
    positions = nn.real_positions(mask)
    table = rope.table_at(config.rope, positions=positions, lengths=positions[:, -1] + 1, width=config.head_width)
    visible = nn.visibility(mask, positions=positions, queries=jnp.arange(mask.shape[1]), window=config.window)

    def attend(q, k, v):
        q, k = nn.rotate(q, table), nn.rotate(k, table)
        return nn.grouped_attention(q, keys=k, values=v, visible=visible, dtype=config.compute_dtype), k

    return attend


def unembed(params: Params, x: Float[Array, "rows d"], *, config: LlamaConfig) -> Float[Array, "rows v"]:
    """Returns the logits of rows of the last residual stream: its norm, then the (tied) unembedding.

    Args:
        params: from :func:`init`.
        x: ``[rows, d]``.
        config: the model.
    """
    scale = params["norm"]["scale"].astype(jnp.float32)
    x = nn.rms_norm(x, scale=scale, eps=config.norm_eps)
    kernel, spec = (params["embed"], "ri,oi->ro") if config.tied else (params["unembed"], "ri,io->ro")
    return nn.product(spec, x, kernel.astype(jnp.float32), dtype=config.compute_dtype)


def _run(params, embeddings, *, config, mask, sites=(), layers=(), positions=None):
    batch, tokens, width = embeddings.shape
    if tokens > config.max_tokens:
        raise ValueError(f"tokens: got {tokens} per sequence, expected at most max_tokens {config.max_tokens}")
    attend = attention(jnp.ones((1, tokens), bool) if mask is None else mask, config=config)

    def layer(carry, weights, place):
        x, stores = carry
        x, seen, _ = block(x, weights, config=config, tokens=tokens, attend=attend)
        picked = {site: pick(seen[site], tokens=tokens, positions=positions) for site in sites}
        return (x, {site: stores[site].at[place].set(picked[site], mode="drop") for site in sites}), None

    # One scan over the weights as they lie, whatever is captured: slicing runs of layers out would copy a large model.
    # A layer that nobody asked for writes beyond the end of the store, which is dropped.
    kept = tokens if positions is None else positions.shape[1]
    widths = {site: config.mlp_width if site in _HIDDEN_SITES else width for site in sites}
    stores = {site: jnp.zeros((len(layers), batch, kept, widths[site]), jnp.float32) for site in sites}
    places = itertools.count()
    places = jnp.asarray([next(places) if index in layers else len(layers) for index in range(config.layers)])
    carry = (embeddings.astype(jnp.float32).reshape(batch * tokens, width), stores)
    (x, stores), _ = scan_layers(layer, carry, places, params=params, config=config)
    return unembed(params, x, config=config).reshape(batch, tokens, -1), stores
