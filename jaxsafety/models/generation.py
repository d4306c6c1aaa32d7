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
        keys: ``[l, b, u, g, k]``, rotated to their positions.
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
    temperature: float | Float[Array, ""] | None = None,
    cache_dtype: str = "float32",
) -> Int[Array, "b {max_new}"]:
    """Returns the continuations of prompts: the most likely token at a time, or drawn tokens if there is a key.

    Args:
        params: from ``llama.init``.
        tokens: ``[b, t]`` prompts; ``t + max_new - 1`` is at most ``config.max_tokens`` (the last token is not read).
        config: the model.
        max_new: the most tokens to write, at least 1; the loop ends early when every row has stopped.
        mask: ``[b, t]``, True where a prompt's token is real; None is no padding.
        stop: tokens that end a row.
        pad: what follows a row's stop token.
        key: typed PRNG key to draw with; None is greedy.
        temperature: what logits are divided by before a draw, > 0; None is 1.
        cache_dtype: of the cached keys and values, ``"float32"`` or ``"bfloat16"``.

    Returns:
        ``[b, max_new]`` int32; a stopped row holds its stop token, then ``pad``.

    Raises:
        ValueError: fewer than one token to write, more places than the model has, an unknown dtype, a temperature that
            is not positive or that no key goes with.

    Fidelity:
        The tokens that the whole forward pass gives when it is run again for each. Dynamic rope scaling beyond
        ``original_tokens`` is the exception: what was read before keeps the angles of the length it was read at, as
        transformers' cache does, where a whole forward pass would turn all of it anew.
    """
    _check(max_new=max_new, key=key, temperature=temperature, cache_dtype=cache_dtype)
    batch, length = tokens.shape
    choose = partial(_choose, key=key, temperature=1.0 if temperature is None else temperature)

    def write(state):
        i, token, done, cache, written = state
        logits, cache = extend(params, token, config=config, cache=cache, place=length + i - 1)
        token = jnp.where(done, pad, choose(logits, step=i))
        return i + 1, token, done | _among(token, stop), cache, written.at[:, i].set(token)

    mask = jnp.ones((batch, length), bool) if mask is None else mask
    logits, cache = prefill(params, tokens, config=config, mask=mask, room=max_new - 1, dtype=cache_dtype)
    first = choose(logits, step=0)
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

    def attend(q, k, v):
        mixed, rotated = attend_whole(q, k, v)
        more = ((0, 0), (0, room), (0, 0), (0, 0))
        return mixed, tuple(jnp.pad(x.astype(dtype), more) for x in (rotated, v))

    def layer(x, weights, _):
        x, _, kept = llama.block(x, weights, config=config, tokens=length, attend=attend)
        return x, kept

    rows = llama.embed(params, tokens, config=config).reshape(batch * length, -1)
    rows, kept = llama.scan_layers(layer, rows, None, params=params, config=config)
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
    table = rope.table_at(config.rope, positions=own, lengths=own[:, 0] + 1, width=config.head_width)
    visible = nn.visibility(cache.mask, positions=positions, queries=queries, window=config.window)

    def layer(carry, weights, index):
        x, *stores = carry

        def attend(q, k, v):
            written = [
                jax.lax.dynamic_update_slice(store, value[None].astype(store.dtype), (index, 0, queries[0], 0, 0))
                for store, value in zip(stores, (nn.rotate(k, table), v), strict=True)
            ]
            k, v = (jax.lax.dynamic_index_in_dim(s, index, keepdims=False).astype(jnp.float32) for s in written)
            mixed = nn.grouped_attention(
                nn.rotate(q, table), keys=k, values=v, visible=visible, dtype=config.compute_dtype
            )
            return mixed, written

        x, _, stores = llama.block(x, weights, config=config, tokens=1, attend=attend)
        return (x, *stores), None

    rows = llama.embed(params, token[:, None], config=config)[:, 0]
    carry, indices = (rows, cache.keys, cache.values), jnp.arange(config.layers)
    (rows, keys_, values), _ = llama.scan_layers(layer, carry, indices, params=params, config=config)
    return llama.unembed(params, rows, config=config), cache.replace(keys=keys_, values=values)


def _among(token, stop):
    return jnp.isin(token, jnp.asarray(stop, token.dtype))


def _choose(logits, *, step, key, temperature):
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(keys.at_step(key, step), logits / temperature).astype(jnp.int32)


def _check(*, max_new, key, temperature, cache_dtype):
    check_name("cache_dtype", cache_dtype, CACHE_DTYPES)
    if max_new < 1:
        raise ValueError(f"max_new: got {max_new}, expected at least 1")
    if temperature is not None and key is None:
        raise ValueError(f"temperature: got {temperature} without a key, expected None or a key to draw with")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number greater than 0")
