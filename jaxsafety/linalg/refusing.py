"""Candidates for a direction of refusing: scored by what a model does with and without them, and ranked.

References: Arditi et al. 2024 (arXiv 2406.11717).
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety import tree
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.programs import compiled
from jaxsafety.linalg.contrasts import ablated, at_last
from jaxsafety.linalg.descent import unit
from jaxsafety.linalg.masked import averaged
from jaxsafety.types import RESIDUAL, Hook, Leaf, Model, Params, Trial

STREAM = ("hook_resid_pre", "hook_resid_mid", RESIDUAL)
# Why a candidate is kept or dropped, by the number that :class:`Ranking` has of each.
REASONS = ("kept", "not finite", "too late a layer", "adding it induces no refusal", "too large a divergence on safe")
Scalar = float | Float[Array, ""]


@flax.struct.dataclass
class Scores:
    """What candidates ``[l, p]`` do on held-out prompts; refusal scores are in nats, means over prompts.

    Attributes:
        bypass: refusal score of unsafe prompts with the direction ablated; the lower, the better it is.
        induce: refusal score of safe prompts with the difference of means added at its layer.
        kl: divergence of the first answer token's distribution on safe prompts, from ablated to as it was.
    """

    bypass: Leaf
    induce: Leaf
    kl: Leaf


@flax.struct.dataclass
class Ranking:
    """Candidates, flattened ``[c]`` from ``[l, p]``, with why each was kept or dropped.

    Attributes:
        order: their indices, the best first: those that were kept by their bypass, then the others by theirs.
        reason: of each candidate, an index of :data:`REASONS`.
    """

    order: Leaf
    reason: Leaf


@checked
def candidates(model: Model, params: Params, pairs: Trial, *, positions: int = 1) -> Float[Array, "l {positions} d"]:
    """Returns the mean activation of unsafe prompts minus that of safe ones, of ``[2, b, ...]`` safe and unsafe ones.

    They are by layer and by prompt token, the last ``positions`` of them, the last one first.
    """
    safe, unsafe = (at_last(model, params, tree.lane(pairs, i), count=positions).mean(axis=1) for i in (0, 1))
    return unsafe - safe


@checked
def refusal_score(
    logits: Float[Array, "b v"], *, refusal: Int[Array, " b"], complied: Int[Array, " b"]
) -> Float[Array, " b"]:
    """Returns ``log p(refusal) - log p(complied)`` of the answer's first token, in nats: above 0 it refuses.

    Fidelity: Arditi et al. 2024 (arXiv 2406.11717) take the log-odds of tokens that refusals begin with against all
        others; here there is one that an answer which complies begins with.
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    one, other = (jnp.take_along_axis(wide, token[:, None], axis=1)[:, 0] for token in (refusal, complied))
    return one - other


@checked
def removed(
    site: str, layer: Int[Array, ""], positions: Int[Array, "b t"], h: Float[Array, "b t f"], *,
    unit: Float[Array, " d"], strength: Scalar = 1.0,
) -> Float[Array, "b t f"]:  # fmt: skip
    """A :data:`jaxsafety.types.Hook` that ablates a direction from the stream at every layer and position."""
    return ablated(h, unit, strength=strength) if site in STREAM else h


@checked
def added(
    site: str, layer: Int[Array, ""], positions: Int[Array, "b t"], h: Float[Array, "b t f"], *, at: Int[Array, ""],
    vector: Float[Array, " d"],
) -> Float[Array, "b t f"]:  # fmt: skip
    """A :data:`jaxsafety.types.Hook` that adds a vector to what one layer hands on, at every position."""
    if site != RESIDUAL:
        return h
    return h + jnp.where(layer == at, vector, 0).astype(h.dtype)[None, None]


@checked
def scored(model: Model, params: Params, pairs: Trial, directions: Float[Array, "l p d"]) -> Scores:
    """Scores candidates on ``[2, b, ...]`` safe and unsafe prompts, one after the other."""
    return _scored(params, pairs, directions, model=model)


@compiled("model")
def _scored(params, pairs, directions, *, model):
    safe, unsafe = (tree.lane(pairs, i) for i in (0, 1))
    plain = jax.nn.log_softmax(_first_logits(model, params, safe))

    def one(given: tuple[Array, Array]) -> Scores:
        layer, vector = given
        without = partial(removed, unit=unit(vector), strength=1.0)
        changed = jax.nn.log_softmax(_first_logits(model, params, safe, edit=without))
        kl = jnp.sum(jnp.exp(plain) * (plain - changed), axis=-1)
        moved = partial(added, at=layer, vector=vector)
        bypass, induce = (
            averaged(_score(_first_logits(model, params, trial, edit=edit), trial), trial.refused.mask.any(axis=1))
            for trial, edit in ((unsafe, without), (safe, moved))
        )
        return Scores(bypass, induce, averaged(kl, safe.refused.mask.any(axis=1)))

    depth, places, width = directions.shape
    layers = jnp.repeat(jnp.arange(depth), places)
    found = jax.lax.map(one, (layers, directions.reshape(-1, width)))
    return jax.tree.map(lambda leaf: leaf.reshape(depth, places), found)


@checked
def ranked(scores: Scores, *, most_kl: Scalar = 0.1, depth: Scalar = 0.8) -> Ranking:
    """Ranks candidates by their bypass, those that are kept before those that are dropped.

    Kept are those of the first ``depth`` of the layers whose induce is above 0 and whose kl is at most ``most_kl``.
    Where none is, the best of the others comes first.
    """
    layers, places = scores.bypass.shape
    bypass, induce, kl = (leaf.reshape(-1) for leaf in (scores.bypass, scores.induce, scores.kl))
    layer = jnp.repeat(jnp.arange(1, layers + 1), places)
    finite = jnp.isfinite(bypass) & jnp.isfinite(induce) & jnp.isfinite(kl)
    # A share of a number of layers is off by rounding.
    failed = jnp.stack([~finite, layer > depth * layers + 1e-4, ~(induce > 0), ~(kl <= most_kl)])
    reason = jnp.where(failed.any(axis=0), 1 + jnp.argmax(failed, axis=0), 0)
    return Ranking(order=jnp.lexsort((bypass, ~finite, reason > 0)), reason=reason)


def _first_logits(model: Model, params: Params, trial: Trial, *, edit: Hook | None = None) -> Float[Array, "b v"]:
    """What is said of the first token that decides the verdict."""
    return model.apply(params, trial.refused.tokens, at=_place(trial.refused.mask), edit=edit).logits[:, 0]


def _score(logits: Float[Array, "b v"], trial: Trial) -> Float[Array, " b"]:
    refusal, complied = (
        jnp.take_along_axis(side.targets, _place(trial.refused.mask), axis=1)[:, 0]
        for side in (trial.refused, trial.complied)
    )
    return refusal_score(logits, refusal=refusal, complied=complied)


def _place(mask: Bool[Array, "b t"]) -> Int[Array, "b 1"]:
    return jnp.argmax(mask, axis=1)[:, None]
