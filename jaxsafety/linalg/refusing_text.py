"""Candidates for a direction of refusing where prompts are of a file: refusing is told by how an answer begins.

References: Arditi et al. 2024 (arXiv 2406.11717).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.linalg.descent import unit
from jaxsafety.linalg.masked import averaged
from jaxsafety.linalg.refusing import Scores, added, removed
from jaxsafety.types import RESIDUAL, Asked, Hook, Model, Params


class Part(NamedTuple):
    """Prompts of one class, ``[m, b, ...]``; those that are not ``real`` fill a batch."""

    tokens: Int[Array, "m b t"]
    mask: Bool[Array, "m b t"]
    real: Bool[Array, "m b"]


@checked
def refusal_odds(logits: Float[Array, "b v"], *, refusals: Int[Array, " r"]) -> Float[Array, " b"]:
    """Returns ``log p - log(1 - p)`` of the probability p that an answer begins with one of some tokens, in nats.

    References:
        Arditi et al. 2024 (arXiv 2406.11717), refusal metric.
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    among = jnp.zeros(wide.shape[-1], bool).at[refusals].set(True)[None]
    one, other = (jax.nn.logsumexp(jnp.where(own, wide, -jnp.inf), axis=-1) for own in (among, ~among))
    return one - other


def split(asked: Asked, *, prompts: int) -> tuple[Bool[Array, "2 n b"], tuple[Part, Part]]:
    """Returns which safe and unsafe prompts make candidates, and those of either that candidates are scored on.

    These are the last ``prompts`` of each, at most half of them; the others make.
    """
    flat = jnp.stack([asked.safe, asked.unsafe]).reshape(2, -1)
    count, place = flat.sum(axis=1, keepdims=True), jnp.cumsum(flat, axis=1)
    scores = flat & (place > count - jnp.minimum(prompts, count // 2))
    most = min(prompts, max(1, flat.shape[1] // 2))
    safe, unsafe = (_part(asked, own, most) for own in scores)
    return (flat & ~scores).reshape(2, *asked.safe.shape), (safe, unsafe)


def _part(asked: Asked, rows: Bool[Array, " n"], most: int) -> Part:
    size = min(most, asked.tokens.shape[1])
    count = -(-most // size)
    index = jnp.nonzero(rows, size=count * size, fill_value=0)[0]
    tokens, mask = (leaf.reshape(-1, leaf.shape[-1])[index] for leaf in (asked.tokens, asked.mask))
    real = jnp.arange(count * size) < rows.sum()
    return Part(*(leaf.reshape(count, size, *leaf.shape[1:]) for leaf in (tokens, mask, real)))


@checked
def candidates(
    model: Model, params: Params, asked: Asked, *, makes: Bool[Array, "2 n b"], positions: int = 1
) -> Float[Array, "l {positions} d"]:
    """Returns the mean activation of unsafe prompts minus that of safe ones, of those that ``makes`` marks.

    They are by layer and by prompt token, the last ``positions`` of them, the last one first.
    """

    def one(given: tuple[Array, Array, Array]) -> Array:
        tokens, mask, own = given
        places = jnp.maximum(_last(mask) - jnp.arange(positions)[None], 0)
        found = model.apply(params, tokens, mask=mask, sites=(RESIDUAL,), positions=places).activations[RESIDUAL]
        return jnp.einsum("cb,lbpd->clpd", own.astype(found.dtype), found, precision=jax.lax.Precision.HIGHEST)

    sums = jax.lax.map(one, (asked.tokens, asked.mask, makes.swapaxes(0, 1))).sum(axis=0)
    safe, unsafe = sums / makes.sum(axis=(1, 2))[:, None, None, None]
    return unsafe - safe


def scored(
    model: Model, params: Params, parts: tuple[Part, Part], directions: Float[Array, "l p d"], *,
    refusals: Int[Array, " r"],
) -> Scores:  # fmt: skip
    """Scores candidates on safe and unsafe prompts, one after the other; see :class:`Scores`."""
    safe, unsafe = parts
    plain = jax.nn.log_softmax(_first_logits(model, params, safe))

    def mean(values: Callable[[Array], Array], part: Part, logits: Array) -> Array:
        return averaged(jax.vmap(values)(logits).reshape(-1), part.real.reshape(-1))

    def one(given: tuple[Array, Array]) -> Scores:
        layer, vector = given
        without, more = partial(removed, unit=unit(vector), strength=1.0), partial(added, at=layer, vector=vector)
        changed = jax.nn.log_softmax(_first_logits(model, params, safe, edit=without))
        kl = averaged(jnp.sum(jnp.exp(plain) * (plain - changed), axis=-1).reshape(-1), safe.real.reshape(-1))
        odds = partial(refusal_odds, refusals=refusals)
        return Scores(
            mean(odds, unsafe, _first_logits(model, params, unsafe, edit=without)),
            mean(odds, safe, _first_logits(model, params, safe, edit=more)),
            kl,
        )

    depth, places, width = directions.shape
    found = jax.lax.map(one, (jnp.repeat(jnp.arange(depth), places), directions.reshape(-1, width)))
    return jax.tree.map(lambda leaf: leaf.reshape(depth, places), found)


def _first_logits(model: Model, params: Params, part: Part, *, edit: Hook | None = None) -> Float[Array, "m b v"]:
    def one(given: tuple[Array, Array]) -> Array:
        tokens, mask = given
        return model.apply(params, tokens, mask=mask, at=_last(mask), edit=edit).logits[:, 0]

    return jax.lax.map(one, (part.tokens, part.mask))


def _last(mask: Bool[Array, "b t"]) -> Int[Array, "b 1"]:
    """The places of the last real tokens of rows that are padded right."""
    return jnp.maximum(mask.sum(axis=1, dtype=jnp.int32) - 1, 0)[:, None]
