"""A GPT on texts of which several begin alike, such as both answers to a prompt: every beginning is read once."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.programs import compiled
from jaxsafety.models.gpt_block import additive_positions, attended, block, heads, rope_table, unembedded
from jaxsafety.models.inputs import check_inputs, embedded
from jaxsafety.types import Params


@checked
def branches(
    params: Params,
    stems: Int[Array, "b s"] | Float[Array, "b s d"],
    rest: Int[Array, "n u"] | Float[Array, "n u d"],
    *,
    config: Any,
) -> Float[Array, "n u v"]:
    """Returns the next-token logits of the ``rest`` of texts, of which row i goes on from row ``i % b`` of ``stems``.

    ``config`` is a :class:`jaxsafety.models.gpt.GPTConfig`. They are those of ``apply`` on the whole texts, but for
    rounding. Of the last layer no more of a stem is computed than what is attended to.

    Raises:
        ValueError: n is no multiple of b; texts longer than the model takes; tokens outside of the vocabulary.
    """
    count, tokens = stems.shape[0], stems.shape[1] + rest.shape[1]
    if not count or rest.shape[0] % count:
        raise ValueError(f"rest: got {rest.shape[0]} rows, expected a multiple of the {count} stems")
    if tokens > config.max_tokens:
        raise ValueError(f"tokens: got {tokens} per sequence, expected at most max_tokens {config.max_tokens}")
    for inputs in (stems, rest):
        check_inputs(params, inputs, max_tokens=config.max_tokens, mask=None, places={})
    return _branched(params, stems, rest, config=config)


@compiled("config")
def _branched(params, stems, rest, *, config):
    (count, start), (n, length), width = stems.shape[:2], rest.shape[:2], config.width
    tokens = start + length
    added = jnp.broadcast_to(additive_positions(params, tokens, config=config), (1, tokens, width))
    parts = embedded(params, stems) + added[:, :start], embedded(params, rest) + added[:, start:]
    x = jnp.concatenate([part.reshape(-1, width) for part in parts]).astype(config.stored_dtype)
    shapes, rope = ((count, start), (n, length)), rope_table(tokens, config=config)
    attend = partial(_attend, config=config, shapes=shapes, rope=rope)
    layer = partial(block, config=config, attend=attend)
    before, last = (jax.tree.map(itemgetter(of), params["blocks"]) for of in (slice(-1), -1))
    x, _ = jax.lax.scan(lambda x, own: (layer(x, own)[0], None), x, before, unroll=min(config.unroll, config.layers))
    x, _ = layer(x, last, first=count * start)
    return unembedded(params, x, config=config).reshape(n, length, -1)


def _attend(q, k, v, *, config, shapes, rope):
    """Attention of the rows of the stems ``[b, s]``, whose queries may be missing, and of the rest ``[n, u]``."""
    (count, start), (n, length) = shapes
    early, late = (None, None) if rope is None else (rope[:, :start], rope[:, start:])
    stem, end = partial(heads, tokens=start, config=config), partial(heads, tokens=length, config=config)
    behind, of_stems = count * start, len(q) - n * length
    shared = stem(k[:behind], rope=early), stem(v[:behind])
    own = end(k[behind:], rope=late), end(v[behind:])
    copies = (n // count, 1, 1, 1)
    whole = [jnp.concatenate([jnp.tile(x, copies), y], axis=1) for x, y in zip(shared, own, strict=True)]
    mixed = [attended(stem(q[:of_stems], rope=early), *shared, config=config)] if of_stems else []
    return jnp.concatenate([*mixed, attended(end(q[of_stems:], rope=late), *whole, config=config)])
