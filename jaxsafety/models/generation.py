"""Continuations of prompts by one model or several, one token at a time, with a model's own cache or without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsafety import keys
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_indices, check_positive, known, whole_number
from jaxsafety.entry.programs import compiled
from jaxsafety.types import Decoder, Hook, Key, Leaf, Model, Output

# Parameters of any structure, and whose they are.
Source = tuple[Any, Model]
# The next-token logits [b, v] of every source to those that the token is taken by.
Combine = Callable[[list[Array]], Array]


@checked
def generate(
    sources: Source | Sequence[Source],
    tokens: Int[Array, "b t"],
    *,
    count: int,
    mask: Bool[Array, "b t"] | None = None,
    combine: Combine | None = None,
    edit: Hook | None = None,
    key: Key | None = None,
    temperature: float | Float[Array, ""] | None = None,
    stop: tuple[int, ...] = (),
    pad: int = 0,
) -> Int[Array, "b {count}"]:
    """Returns the continuations of prompts: the most likely token at a time, or drawn tokens if there is a key.

    Args:
        sources: ``(params, model)``, or several of them that read the same tokens.
        tokens: ``[b, t]`` prompts of at least one real token each, of the vocabulary; what stands in the place of
            padding does not matter.
        count: the most tokens to write, at least 1; the loop ends early when every row has ended. The last is not read.
        mask: ``[b, t]``, True where a prompt's token is real; padding may stand anywhere. None is no padding.
        combine: the decoding rule, see ``Combine``; None takes the logits of the only source.
        edit: see :class:`jaxsafety.types.Model`; every source has it, at every step.
        key: typed PRNG key to draw with; or ``[b]`` of them, one a row, whose draws then depend on no other row. None
            is greedy.
        temperature: what logits are divided by before a draw, > 0; None is 1.
        stop: tokens that end a row.
        pad: what follows a row's stop token.

    Returns:
        ``[b, count]`` int32; a row that has ended holds its stop token, then ``pad``. A row ends, too, where its logits
        are NaN: the model has no place left for it, or is not finite. Tokens have no gradient: it is zero.
        Called eagerly, it is compiled once, but for an ``edit`` or a rule that is no :class:`jax.tree_util.Partial`.

    Raises:
        ValueError: fewer than one token to write, a prompt without a real one (unless traced), a ``stop`` that is no
            sequence, several sources without a rule, a temperature that is not positive or that no key goes with; more
            places than a model with a cache has; (unless traced) real tokens outside of a source's vocabulary, where a
            model does as with traced ones.
        Unsupported: an edit that a model does not take.

    Fidelity:
        The tokens that whole forward passes give; for the exception see :func:`jaxsafety.models.llama_cache.decoder`.
    """
    sources = [sources] if sources and isinstance(sources[-1], Model) else list(sources)
    _check(sources, tokens, mask, combine=combine, key=key, temperature=temperature, stop=stop)
    count = whole_number("count", count, 1)
    params, models = zip(*jax.tree.map(_constant, sources), strict=True)
    return _continued(
        params, tokens, mask, key, temperature, pad, combine, edit, models=models, count=count, stop=tuple(stop)
    )


@compiled("models", "count", "stop")
def _continued(params, tokens, mask, key, temperature, pad, combine, edit, *, models, count, stop):
    sources = list(zip(params, models, strict=True))
    choose = partial(_choose, key=key, temperature=1.0 if temperature is None else temperature, pad=pad)

    def decide(read: Any, done: Array | bool, *, step: int | Array) -> tuple[Array, Array, list[Any]]:
        found, states = zip(*read, strict=True)
        token, ended = choose(found[0] if combine is None else combine(list(found)), done, step=step)
        return token, ended | jnp.isin(token, jnp.asarray(stop, token.dtype)), list(states)

    def write(state):
        i, token, done, states, written = state
        read = [
            model.decoder.extend(params, token, state=state, edit=edit)
            for (params, model), state in zip(sources, states, strict=True)
        ]
        token, done, states = decide(read, done, step=i)
        return i + 1, token, done, states, written.at[:, i].set(token)

    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    read = [model.decoder.begin(params, tokens, mask=mask, room=count - 1, edit=edit) for params, model in sources]
    token, done, states = decide(read, False, step=0)
    written = jnp.full((len(tokens), count), pad, jnp.int32).at[:, 0].set(token)
    state = (jnp.int32(1), token, done, states, written)
    return jax.lax.while_loop(lambda state: (state[0] < count) & ~jnp.all(state[2]), write, state)[-1]


@flax.struct.dataclass
class Window:
    """What a model without a cache keeps: all that it has read.

    Rows of ``tokens`` ``[b, u]`` are filled from their first place on; ``last`` ``[b]`` is the place of their last
    token.
    """

    tokens: Leaf
    last: Leaf


def windowed(apply: Callable[..., Output], *, max_tokens: int) -> Decoder:
    """Returns how a model without a cache reads one token after another: all of them again.

    Rows are padded on the right, whatever the prompts were, which a causal model does not see. A row of ``max_tokens``
    has no place left; others go on. ``apply`` is that of a :class:`Model`, with ``at``; it need not take a mask.
    """

    def read(params: Any, window: Window, edit: Hook | None) -> tuple[Array, Window]:
        # A row that has no place left has its last token beyond the window.
        places = window.tokens.shape[1]
        at = jnp.minimum(window.last, places - 1)[:, None]
        logits = apply(params, window.tokens, at=at, edit=edit).logits[:, 0]
        return jnp.where((window.last < places)[:, None], logits, jnp.nan), window

    def begin(
        params: Any, tokens: Int[Array, "b t"], *, mask: Bool[Array, "b t"], room: int, edit: Hook | None = None
    ) -> tuple[Array, Window]:
        tokens = jnp.take_along_axis(tokens, jnp.argsort(~mask, axis=1, stable=True), axis=1)
        more = max(0, min(room, max_tokens - tokens.shape[1]))
        last = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        return read(params, Window(jnp.pad(tokens, ((0, 0), (0, more))), last), edit)

    def extend(
        params: Any, token: Int[Array, " b"], *, state: Window, edit: Hook | None = None
    ) -> tuple[Array, Window]:
        last = state.last + 1
        written = state.tokens.at[jnp.arange(len(last)), last].set(token.astype(state.tokens.dtype), mode="drop")
        return read(params, Window(written, last), edit)

    return Decoder(begin, extend)


def _choose(logits, done, *, step, key, temperature, pad):
    ended = done | jnp.isnan(logits).any(axis=-1)
    if key is None:
        token = jnp.argmax(logits, axis=-1)
    elif key.ndim:
        token = jax.vmap(lambda own, row: jax.random.categorical(keys.at_step(own, step), row))(
            key, logits / temperature
        )
    else:
        token = jax.random.categorical(keys.at_step(key, step), logits / temperature)
    return jnp.where(ended, pad, token).astype(jnp.int32), ended


def _constant(leaf):
    return jax.lax.stop_gradient(jnp.asarray(leaf)) if isinstance(leaf, np.ndarray | jax.Array) else leaf


def _check(sources, tokens, mask, *, combine, key, temperature, stop):
    if not sources or (len(sources) > 1 and combine is None):
        raise ValueError(f"sources: got {len(sources)} and no rule, expected one, or combine to make one of them")
    if temperature is not None and key is None:
        raise ValueError(f"temperature: got {temperature} without a key, expected None or a key to draw with")
    if temperature is not None:
        check_positive("temperature", temperature)
    if not isinstance(stop, Sequence):
        raise ValueError(f"stop: got {stop!r}, expected a tuple of tokens")
    real = None if mask is None else known(mask)
    if real is not None and not real.any(axis=1).all():
        raise ValueError(f"mask: prompt {real.any(axis=1).argmin()} has no real token, expected at least one in each")
    if known(tokens) is not None:
        for params, model in sources:
            leaves, structure = jax.tree.flatten(params)
            size = _vocabulary(model, structure, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
            check_indices("tokens", tokens, size, of="the vocabulary", mask=mask)


@cache
def _vocabulary(model: Model, structure: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> int:
    """The tokens that a model of such parameters has logits of."""
    params = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    return jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct((1, 1), jnp.int32)).logits.shape[-1]
