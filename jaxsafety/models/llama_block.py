"""One layer of a Llama-family decoder, the loop over layers, and the unembedding behind them.

Weights are those of ``llama.init``, widened layer by layer as they are run. Whatever is computed is float32; rows of
the residual stream that come in bfloat16 leave so, and between operations activations are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety.models import layers as nn
from jaxsafety.models import llama_layers
from jaxsafety.models.llama_config import LlamaConfig
from jaxsafety.models.llama_layers import Index
from jaxsafety.models.sites import RowEdit, watched
from jaxsafety.models.widening import widened
from jaxsafety.types import Params

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

HIDDEN_SITES = ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")
"""Those that are ``f`` wide."""

# Queries whose scores are there at once, and in how many parts a sequence is cut at most: each is compiled.
_QUERIES, _PARTS = 256, 16

# Rows [b, t, n, k], [b, t, g, k], [b, t, g, k], neither rotated, to [b, t, n, k] and whatever the caller keeps.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def scan_layers(
    body: Callable[[Any, Params, Any], tuple[Any, Any]],
    carry: Any,
    scanned: Any,
    *,
    params: Params,
    config: LlamaConfig,
) -> tuple[Any, Any]:
    """Returns ``jax.lax.scan`` over the layers, whose weights are widened to float32 one layer at a time.

    ``body`` is ``(carry, one layer's weights, slice of scanned) -> (carry, what to stack)``; ``scanned`` are arrays
    that lead with ``l``, or None.
    """

    def layer(carry, scanned):
        weights, index, more = scanned
        return body(carry, widened(weights, stacked=params["blocks"], index=index), more)

    # In a scan nothing can be shared between the two runs of a layer, so nothing has to prevent that.
    layer = jax.checkpoint(layer, prevent_cse=False) if config.recompute else layer
    xs = (params["blocks"], jnp.arange(config.layers), scanned)
    return jax.lax.scan(layer, carry, xs, unroll=min(config.unroll, config.layers))


def block(
    x: Float[Array, "rows d"],
    weights: Params,
    *,
    config: LlamaConfig,
    tokens: int,
    attend: Attend,
    edit: RowEdit | None = None,
) -> tuple[Float[Array, "rows d"], dict[str, Float[Array, "rows _"]], Any]:
    """Returns one layer's output, its activations by site, and what ``attend`` keeps.

    Rows ``[b*t, d]`` are the residual stream, ``weights`` one layer of ``params["blocks"]`` in float32, as
    :func:`scan_layers` hands it out; for ``edit`` see :func:`jaxsafety.models.sites.of_layer`.
    """

    def norm(x, name):
        return _norm(x, weights[name]["scale"], config) if name in weights else x

    def linear(x, part, name):
        project = partial(nn.project, dtype=config.compute_dtype)
        y = project(x, weights[part][name])
        # An adapter's factors, see jaxsafety.models.lora: their product is never formed.
        if (low := weights[part].get(f"{name}_lora_a")) is not None:
            y = y + project(project(x, low), weights[part][f"{name}_lora_b"])
        bias = weights[part].get(f"{name}_bias")
        return (y if bias is None else y + bias[None, :]).astype(x.dtype)

    see, seen = watched(edit)
    x = see("hook_resid_pre", x)
    normed = norm(x, "norm_attn")

    def heads(name, n):
        rows = linear(normed, "attn", name)
        rows = rows.reshape(-1, config.head_width) if config.query_norm == "head" else rows
        return norm(rows, f"norm_{name}").reshape(-1, tokens, n, config.head_width)

    mixed, kept = attend(heads("q", config.heads), *(heads(name, config.kv_heads) for name in "kv"))
    attn_out = see("hook_attn_out", norm(linear(mixed.reshape(len(x), -1), "attn", "o"), "norm_attn_out"))
    mid = see("hook_resid_mid", x + attn_out)
    mlp_in = see("mlp.hook_in", norm(mid, "norm_mlp"))
    gate = see("mlp.hook_pre", linear(mlp_in, "mlp", "gate"))
    up = see("mlp.hook_pre_linear", linear(mlp_in, "mlp", "up"))
    post = see("mlp.hook_post", (nn.silu_gated if config.activation == "silu" else nn.gelu_gated)(gate, up))
    mlp_out = see("hook_mlp_out", norm(linear(post, "mlp", "down"), "norm_mlp_out"))
    return see("hook_resid_post", mid + mlp_out), seen, kept


def attention(mask: Bool[Array, "b t"], *, config: LlamaConfig) -> Attend:
    """Returns the attention of whole sequences, for :func:`block`; it keeps the rotated keys.

    b of ``mask`` may be 1 for all sequences alike. Where layers differ (``config.is_uniform`` is false), it takes the
    index of one as ``layer``, too. Of a long sequence some queries come after the others, each with the
    keys up to it: scores ``[t, t]`` are never there, and are made again for a gradient.
    """
    positions = nn.real_positions(mask)
    table = llama_layers.tables(config, positions=positions, lengths=positions[:, -1] + 1)
    tokens = mask.shape[1]
    step = max(_QUERIES, -(-tokens // _PARTS))
    parts = [(start, min(start + step, tokens)) for start in range(0, tokens, step)]
    see = partial(llama_layers.visibility, config, mask, positions=positions)
    seen = [see(queries=jnp.arange(*part)) for part in parts]
    mix = mixing(config)
    mix = jax.checkpoint(mix) if len(parts) > 1 else mix

    def attend(q, k, v, *, layer: Index = None):
        angles = table(layer)
        q, k = nn.rotate(q, angles), nn.rotate(k, angles)
        mixed = [
            mix(q[:, start:end], keys=k[:, :end], values=v[:, :end], visible=visible(layer)[..., :end])
            for (start, end), visible in zip(parts, seen, strict=True)
        ]
        return jnp.concatenate(mixed, axis=1), k

    return attend


def mixing(config: LlamaConfig) -> Callable[..., Array]:
    """Returns ``layers.grouped_attention`` of a model: of rotated queries and keys, values and what is visible."""
    return partial(
        nn.grouped_attention, dtype=config.compute_dtype, scalar=config.query_scalar, cap=config.attn_softcap
    )


def entering(x: Float[Array, "*shape"], *, config: LlamaConfig) -> Float[Array, "*shape"]:
    """Returns what enters the first layer of embeddings, scaled where the model scales them."""
    return x if config.embed_scale == 1 else x * config.embed_scale


def unembed(params: Params, x: Float[Array, "rows d"], *, config: LlamaConfig) -> Float[Array, "rows v"]:
    """Returns the logits of rows of the last residual stream: its norm, the (tied) unembedding, a soft cap if any."""
    x = _norm(x, params["norm"]["scale"].astype(jnp.float32), config)
    kernel, spec = (params["embed"], "ri,oi->ro") if config.tied else (params["unembed"], "ri,io->ro")
    logits = nn.product(spec, x, kernel.astype(jnp.float32), dtype=config.compute_dtype)
    if (low := params.get("unembed_lora_a")) is not None:
        project = partial(nn.project, dtype=config.compute_dtype)
        logits = logits + project(project(x, low), params["unembed_lora_b"])
    return nn.softcap(logits, config.logit_softcap)


def _norm(x: Array, scale: Array, config: LlamaConfig) -> Array:
    return nn.rms_norm(x, scale=1 + scale if config.norm_offset else scale, eps=config.norm_eps)
