"""A Llama's keys and values of what it has read, so that one more token costs one token.

A batch shares its places: the prompts, padded left (or anywhere), fill the first ``t`` of them, every new token takes
the next. Padding is never attended to, so a row's continuation is that of its prompt alone.
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.config.names import check_name
from jaxsafety.models import layers as nn
from jaxsafety.models import llama_layers
from jaxsafety.models.inputs import embed
from jaxsafety.models.llama_block import attention, block, entering, mixing, scan_layers, unembed
from jaxsafety.models.llama_config import LlamaConfig
from jaxsafety.models.sites import of_layer
from jaxsafety.types import Decoder, Hook, Leaf, Params

CACHE_DTYPES = ("float32", "bfloat16")


@flax.struct.dataclass
class Cache:
    """What the layers have seen of the places so far.

    Attributes:
        keys: ``[l, b, u, g, k]``, rotated to their positions.
        values: ``[l, b, u, g, k]``.
        mask: ``[b, u]``, False at the prompts' padding; places still to be filled count as real.
        place: int32, where the next token goes; all places before it are filled.
    """

    keys: Leaf
    values: Leaf
    mask: Leaf
    place: Leaf


def decoder(config: LlamaConfig, *, dtype: str) -> Decoder:
    """Returns how a Llama reads one token after another, its keys and values cached in ``dtype``.

    Raises:
        ValueError: ``dtype`` is not among ``CACHE_DTYPES``.

    Fidelity:
        The logits of the whole forward pass. Dynamic rope scaling beyond ``original_tokens`` is the exception: what was
        read before keeps the angles of the length it was read at, as transformers' cache does, where a whole forward
        pass would turn all of it anew.
    """
    check_name("cache_dtype", dtype, CACHE_DTYPES)
    return Decoder(begin=partial(begin, config=config, dtype=dtype), extend=partial(extend, config=config))


def begin(
    params: Params,
    tokens: Int[Array, "b t"],
    *,
    config: LlamaConfig,
    mask: Bool[Array, "b t"],
    room: int,
    dtype: str,
    edit: Hook | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Returns the logits after each prompt's last real token, and the cache of all its tokens; see :class:`Decoder`.

    More places than ``config.max_tokens`` are a ValueError.
    """
    batch, length = tokens.shape
    if length + room > config.max_tokens:
        raise ValueError(f"tokens: got {length} and {room} to come, expected at most max_tokens {config.max_tokens}")
    attend_whole = attention(mask, config=config)
    places = None if edit is None else nn.real_positions(mask)

    def attend(q, k, v, layer):
        mixed, rotated = attend_whole(q, k, v, layer=layer)
        more = ((0, 0), (0, room), (0, 0), (0, 0))
        return mixed, tuple(jnp.pad(x.astype(dtype), more) for x in (rotated, v))

    def layer(x, weights, index):
        own = of_layer(edit, layer=index, positions=places)
        attend_ = partial(attend, layer=index)
        x, _, kept = block(x, weights, config=config, tokens=length, attend=attend_, edit=own)
        return x, kept

    rows = entering(embed(params, tokens), config=config).reshape(batch * length, -1)
    indices = None if edit is None and config.is_uniform else jnp.arange(config.layers)
    rows, kept = scan_layers(layer, rows, indices, params=params, config=config)
    last = jnp.max(jnp.where(mask, jnp.arange(length)[None, :], 0), axis=1)
    logits = unembed(params, rows.reshape(batch, length, -1)[jnp.arange(batch), last], config=config)
    real = jnp.pad(mask, ((0, 0), (0, room)), constant_values=True)
    return logits, Cache(*kept, real, jnp.int32(length))


def extend(
    params: Params, token: Int[Array, " b"], *, config: LlamaConfig, state: Cache, edit: Hook | None = None
) -> tuple[Float[Array, "b v"], Cache]:
    """Returns the logits after one more token of each row, and the cache with it, which must have room left."""
    queries = state.place[None]
    positions = nn.real_positions(state.mask)
    own = positions[:, queries]
    table = llama_layers.tables(config, positions=own, lengths=own[:, 0] + 1)
    visible = llama_layers.visibility(config, state.mask, positions=positions, queries=queries)
    mix = mixing(config)

    def layer(carry, weights, index):
        x, *stores = carry

        def attend(q, k, v):
            angles = table(index)
            written = [
                jax.lax.dynamic_update_slice(store, value[None].astype(store.dtype), (index, 0, queries[0], 0, 0))
                for store, value in zip(stores, (nn.rotate(k, angles), v), strict=True)
            ]
            k, v = (jax.lax.dynamic_index_in_dim(s, index, keepdims=False).astype(jnp.float32) for s in written)
            return mix(nn.rotate(q, angles), keys=k, values=v, visible=visible(index)), written

        hook = of_layer(edit, layer=index, positions=own)
        x, _, stores = block(x, weights, config=config, tokens=1, attend=attend, edit=hook)
        return (x, *stores), None

    entered = entering(embed(params, token[:, None])[:, 0], config=config)
    carry, indices = (entered, state.keys, state.values), jnp.arange(config.layers)
    (rows, keys, values), _ = scan_layers(layer, carry, indices, params=params, config=config)
    return unembed(params, rows, config=config), state.replace(keys=keys, values=values, place=state.place + 1)
