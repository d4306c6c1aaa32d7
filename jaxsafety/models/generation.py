"""Continuations of prompts by a Llama-family decoder, with a cache of keys and values.

A batch shares its places: the prompts, padded left (or anywhere), fill the first ``t`` of them, every new token takes
the next. Padding is never attended to, so a row's continuation is that of its prompt alone.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety import keys
from jaxsafety.models import layers as nn
from jaxsafety.models import llama, rope
from jaxsafety.models.llama_config import LlamaConfig
from jaxsafety.suggest import check_name
from jaxsafety.types import Key, Leaf, Params

CACHE_DTYPES = ("float32", "bfloat16")


@flax.struct.dataclass
class Cache:
    """What the layers have seen of the places so far.

    Attributes:
        keys: ``[l, b, u, g, k]``, rotated to their positions, unless rope scaling is dynamic: there the angles of all
            positions change with every token, and keys are rotated when they are read.
        values: ``[l, b, u, g, k]``.
        mask: ``[b, u]``, False at the prompts' padding; places still to be filled count as real.
    """

    keys: Leaf
    values: Leaf
    mask: Leaf


def generate(
    params: Params,
    tokens: Int[Array, "b t"],
    *,
    config: LlamaConfig,
    max_new: int,
    mask: Bool[Array, "b t"] | None = None,
    stop: tuple[int, ...] = (),
    pad: int = 0,
    key: Key | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    cache_dtype: str = "float32",
) -> Int[Array, "b {max_new}"]:
    """Returns the continuations of prompts: the most likely token at a time, or drawn tokens if there is a key.

    Args:
        params: from ``llama.init``.
        tokens: ``[b, t]`` prompts; t and ``max_new`` together at most ``config.max_tokens``.
        config: the model.
        max_new: the most tokens to write, at least 1; the loop ends early when every row has stopped.
        mask: ``[b, t]``, True where a prompt's token is real; None is no padding.
        stop: tokens that end a row.
        pad: what follows a row's stop token.
        key: typed PRNG key to draw with; None is greedy.
        temperature: with a key, logits are divided by it, > 0.
        cache_dtype: of the cached keys and values, ``"float32"`` or ``"bfloat16"``.

    Returns:
        ``[b, max_new]`` int32; a stopped row holds its stop token, then ``pad``.

    Raises:
        ValueError: fewer than one token to write, more places than the model has, or an unknown dtype.
    """
    check_name("cache_dtype", cache_dtype, CACHE_DTYPES)
    batch, length = tokens.shape
    if max_new < 1:
        raise ValueError(f"max_new: got {max_new}, expected at least 1")

    def choose(logits, i):
        if key is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(keys.at_step(key, i), logits / temperature).astype(jnp.int32)

    def write(state):
        i, token, done, cache, written = state
        logits, cache = extend(params, token, config=config, cache=cache, place=length + i - 1)
        token = jnp.where(done, pad, choose(logits, i))
        return i + 1, token, done | _among(token, stop), cache, written.at[:, i].set(token)

    mask = jnp.ones((batch, length), bool) if mask is None else mask
    logits, cache = prefill(params, tokens, config=config, mask=mask, room=max_new - 1, dtype=cache_dtype)
    first = choose(logits, 0)
    written = jnp.full((batch, max_new), pad, jnp.int32).at[:, 0].set(first)
    state = (jnp.int32(1), first, _among(first, stop), cache, written)
    return jax.lax.while_loop(lambda state: (state[0] < max_new) & ~jnp.all(state[2]), write, state)[-1]


def prefill(
    params: Params, tokens: Int[Array, "b t"], *, config: LlamaConfig, mask: Bool[Array, "b t"], room: int, dtype: str
) -> tuple[Float[Array, "b v"], Cache]:
    """Returns the logits after each prompt's last real token, and the cache of all its tokens.

    Args:
        params: from ``llama.init``.
        tokens: ``[b, t]`` prompts.
        config: the model.
        mask: ``[b, t]``, True where a token is real.
        room: places to add for tokens to come.
        dtype: of the cached keys and values.

    Raises:
        ValueError: more places than ``config.max_tokens``.
    """
    batch, length = tokens.shape
    if length + room > config.max_tokens:
        raise ValueError(f"tokens: got {length} and {room} to come, expected at most max_tokens {config.max_tokens}")
    attend_whole = llama.attention(mask, config=config)
    table = _key_table(mask, config=config)

    def attend(q, k, v):
        mixed, _ = attend_whole(q, k, v)
        kept = k if table is None else nn.rotate(k, table)
        more = ((0, 0), (0, room), (0, 0), (0, 0))
        return mixed, tuple(jnp.pad(x.astype(dtype), more) for x in (kept, v))

    def layer(x, weights):
        x, _, kept = llama.block(x, weights, config=config, tokens=length, attend=attend)
        return x, kept

    rows = llama.embed(params, tokens, config=config).reshape(batch * length, -1)
    rows, kept = jax.lax.scan(layer, rows, params["blocks"], unroll=min(config.unroll, config.layers))
    last = jnp.max(jnp.where(mask, jnp.arange(length)[None, :], 0), axis=1)
    logits = llama.unembed(params, rows.reshape(batch, length, -1)[jnp.arange(batch), last], config=config)
    return logits, Cache(*kept, jnp.pad(mask, ((0, 0), (0, room)), constant_values=True))


def extend(
    params: Params, token: Int[Array, " b"], *, config: LlamaConfig, cache: Cache, place: int | Int[Array, ""]
) -> tuple[Float[Array, "b v"], Cache]:
    """Returns the logits after one more token of each row, and the cache with it.

    Args:
        params: from ``llama.init``.
        token: ``[b]``.
        config: the model.
        cache: from :func:`prefill`, or from this with the place before.
        place: where in the cache the token goes; all places before it are filled.
    """
    queries = jnp.asarray(place, jnp.int32)[None]
    positions = nn.real_positions(cache.mask)
    own = positions[:, queries]
    at = partial(rope.table_at, config.rope, lengths=own[:, 0] + 1, width=config.head_width)
    own_table, cached_table = at(positions=own), at(positions=positions)
    visible = nn.visibility(cache.mask, positions=positions, queries=queries, window=config.window)
    late = config.rope.scaling == "dynamic"

    def layer(carry, scanned):
        x, *stores = carry
        weights, index = scanned

        def attend(q, k, v):
            new = (k if late else nn.rotate(k, own_table), v)
            written = [
                jax.lax.dynamic_update_slice(store, value[None].astype(store.dtype), (index, 0, queries[0], 0, 0))
                for store, value in zip(stores, new, strict=True)
            ]
            k, v = (jax.lax.dynamic_index_in_dim(s, index, keepdims=False).astype(jnp.float32) for s in written)
            k = nn.rotate(k, cached_table) if late else k
            q = nn.rotate(q, own_table)
            mixed = nn.grouped_attention(q, keys=k, values=v, visible=visible, dtype=config.compute_dtype)
            return mixed, written

        x, _, stores = llama.block(x, weights, config=config, tokens=1, attend=attend)
        return (x, *stores), None

    rows = llama.embed(params, token[:, None], config=config)[:, 0]
    scanned = (params["blocks"], jnp.arange(config.layers))
    carry = (rows, cache.keys, cache.values)
    (rows, keys_, values), _ = jax.lax.scan(layer, carry, scanned, unroll=min(config.unroll, config.layers))
    return llama.unembed(params, rows, config=config), cache.replace(keys=keys_, values=values)


def _key_table(mask, *, config):
    """The angles that cached keys are rotated by as they are written; None where they are rotated as they are read."""
    if config.rope.scaling == "dynamic":
        return None
    positions = nn.real_positions(mask)
    return rope.table_at(config.rope, positions=positions, lengths=positions[:, -1] + 1, width=config.head_width)


def _among(token, stop):
    return jnp.isin(token, jnp.asarray(stop, token.dtype))
