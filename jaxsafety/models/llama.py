"""Decoders like Llama (Mistral, Qwen, SmolLM3, OLMo 2, Phi-3, Gemma) as pure functions of a dict of stacked weights.

Paths: ``embed``, ``blocks/{norm_attn, attn, norm_mlp, mlp}``, ``norm``, ``unembed`` (absent when tied), and, where a
model has them, ``blocks/{norm_q, norm_k, norm_attn_out, norm_mlp_out}``; leaves below ``blocks`` lead with ``l``,
matrices are ``[in, out]``, heads are contiguous. Weights may be float32, bfloat16 or float16: a scan over layers widens
one layer's at a time, and whatever is computed is float32.
"""

from __future__ import annotations

import itertools
from functools import cache, partial
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.programs import compiled
from jaxsafety.models import layers as nn
from jaxsafety.models import llama_cache
from jaxsafety.models.inputs import check_inputs, embed, embedded
from jaxsafety.models.llama_block import HIDDEN_SITES, Site, attention, block, entering, scan_layers, unembed
from jaxsafety.models.llama_config import LlamaConfig
from jaxsafety.models.rope import Rope, RopeScaling
from jaxsafety.models.sites import chosen_layers, of_layer, pick, scored
from jaxsafety.types import Hook, Key, Model, Output, Params

__all__ = ["LlamaConfig", "Rope", "RopeScaling", "Site", "apply", "attention", "block", "embed", "init", "model"]

_INIT_STD = 0.02


def init(config: LlamaConfig, *, key: Key) -> Params:
    """Returns fresh float32 parameters: matrices N(0, 0.02^2), biases 0, norms the identity.

    The two projections back into the residual stream are N(0, 0.02^2 / 2l), so its variance does not grow with depth.
    The Llama-2 7B sizes give 6 738 415 616 numbers.
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
    same = jnp.zeros if config.norm_offset else jnp.ones
    norms = {name: {"scale": same((depth, width), jnp.float32)} for name, width in config.norm_widths.items()}
    params = {"embed": normal(v, d), "blocks": norms | {"attn": attn, "mlp": mlp}}
    params["norm"] = {"scale": same(d, jnp.float32)}
    return params if config.tied else params | {"unembed": normal(d, v)}


@cache
def model(config: LlamaConfig, *, cache_dtype: str = "float32") -> Model:
    """Returns the model that methods, attacks and analyses ask; it writes with a cache of keys and values.

    ``cache_dtype`` is that of these, ``"float32"`` or ``"bfloat16"``; any other is a ValueError.
    """
    decoder = llama_cache.decoder(config, dtype=cache_dtype)
    return Model(embed=embed, apply=partial(apply, config=config), decoder=decoder)


@checked
def apply(
    params: Params,
    inputs: Int[Array, "b t"] | Float[Array, "b t d"],
    *,
    config: LlamaConfig,
    mask: Bool[Array, "b t"] | None = None,
    at: Int[Array, "b p"] | None = None,
    sites: tuple[str, ...] = (),
    layers: tuple[int, ...] | None = None,
    positions: Int[Array, "b q"] | None = None,
    edit: Hook | None = None,
) -> Output:
    """Returns next-token logits and the activations asked for; the arguments are those of :class:`Model`.

    Padding may stand anywhere; logits there are finite but meaningless, and for ``edit`` it has the position of the
    real token before it. ``sites`` are among :data:`Site`. Site ``s`` of layer ``i`` is TransformerLens's
    ``blocks.{i}.{s}``: ``mlp.hook_pre`` is the gate before its SiLU, ``mlp.hook_pre_linear`` the up projection,
    ``mlp.hook_post`` their product and what down is multiplied with, the three of them ``f`` wide. ``mlp.hook_in``,
    which it has no name for, is what gate and up are multiplied with.

    Raises:
        ValueError: see :class:`Model`.

    Fidelity:
        The released models' forward pass but for dynamic rope scaling, see :func:`jaxsafety.models.rope.frequencies`.

    References:
        Touvron et al. (2023), Llama 2, arXiv:2307.09288; Grattafiori et al. (2024), The Llama 3 Herd of Models,
        arXiv:2407.21783; Jiang et al. (2023), Mistral 7B, arXiv:2310.06825; Yang et al. (2024), Qwen2 Technical Report,
        arXiv:2407.10671; Yang et al. (2025), Qwen3 Technical Report, arXiv:2505.09388; OLMo Team (2024), 2 OLMo 2
        Furious, arXiv:2501.00656; Abdin et al. (2024), Phi-3 Technical Report, arXiv:2404.14219; Gemma Team (2024),
        Gemma 2, arXiv:2408.00118, and (2025), Gemma 3 Technical Report, arXiv:2503.19786.
    """
    chosen = chosen_layers(layers, depth=config.layers, sites=sites, known=get_args(Site))
    check_inputs(params, inputs, max_tokens=config.max_tokens, mask=mask, places={"at": at, "positions": positions})
    return _applied(params, inputs, mask, at, positions, edit, config=config, sites=tuple(sites), layers=chosen)


@compiled("config", "sites", "layers")
def _applied(params, inputs, mask, at, positions, edit, *, config, sites, layers):
    x = embedded(params, inputs, mask=mask)
    batch, tokens, _ = x.shape
    mask = jnp.ones((1, tokens), bool) if mask is None else mask
    x = entering(x, config=config).astype(config.stored_dtype)
    x, seen = _layers(x, params, config=config, mask=mask, sites=sites, layers=layers, positions=positions, edit=edit)
    logits = unembed(params, scored(x, tokens=tokens, at=at), config=config)
    return Output(logits.reshape(batch, -1, logits.shape[-1]), seen)


def _layers(x, params, *, config, mask, sites, layers, positions, edit):
    batch, tokens, width = x.shape
    attend = attention(mask, config=config)
    places = None if edit is None else nn.real_positions(mask)

    def layer(carry, weights, scanned):
        (x, stores), (place, index) = carry, scanned
        own = of_layer(edit, layer=index, positions=places)
        attend_ = attend if config.is_uniform else partial(attend, layer=index)
        x, seen, _ = block(x, weights, config=config, tokens=tokens, attend=attend_, edit=own)
        picked = {site: pick(seen[site], tokens=tokens, positions=positions) for site in sites}
        return (x, {site: stores[site].at[place].set(picked[site], mode="drop") for site in sites}), None

    # One scan over the weights as they lie, whatever is captured: slicing runs of layers out would copy a large model.
    # A layer that nobody asked for writes beyond the end of the store, which is dropped.
    kept = tokens if positions is None else positions.shape[1]
    widths = {site: config.mlp_width if site in HIDDEN_SITES else width for site in sites}
    stores = {site: jnp.zeros((len(layers), batch, kept, widths[site]), jnp.float32) for site in sites}
    into = itertools.count()
    into = jnp.asarray([next(into) if index in layers else len(layers) for index in range(config.layers)])
    scanned = (into, None if edit is None and config.is_uniform else jnp.arange(config.layers))
    (x, stores), _ = scan_layers(layer, (x.reshape(-1, width), stores), scanned, params=params, config=config)
    return x, stores
