"""What unlearning pushes away, and the term of what it keeps: shared by the methods that forget.

Pushed away are the dispreferred answers of unsafe prompts alone. Kept are, with ``nll``, the preferred answers of all
prompts, so that refusals are learned in the place of what is pushed away; with ``kl``, what the reference says at every
token of safe prompts' preferred answers, and no refusal; with ``none``, nothing. Either is a mean over scored tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import losses
from jaxsafety.training import answers
from jaxsafety.training.branching import branched
from jaxsafety.types import Model, Params, PreferenceBatch, SumCount, Terms

Retain = Literal["nll", "kl", "none"]


class Said(NamedTuple):
    """What one pass over both answers gives.

    Attributes:
        rejected: ``[b, t]`` log-prob of every target of the dispreferred answers, in nats.
        forgotten: ``[b, t]`` bool, the scored ones of unsafe prompts.
        terms: ``retain``, the weighted term of what is kept; none where nothing is.
        metrics: those of :func:`jaxsafety.training.answers.logprobs`.
    """

    rejected: Float[Array, "b t"]
    forgotten: Bool[Array, "b t"]
    terms: Terms
    metrics: Terms


def read(
    model: Model, params: Params, batch: PreferenceBatch, *, retain: Retain, weight: float | Float[Array, ""]
) -> Said:
    """Returns what a model says of both answers, with the term of what is kept.

    With ``kl`` that compares with ``batch.reference["kept"]``, as :func:`reference` has it.
    """
    stem, logits = branched(model, params, batch.chosen, batch.rejected)
    (chosen, rejected), metrics = answers.scored(logits, batch, stem=stem)
    terms = {}
    if retain != "none":
        total, count = _kept(logits[0], chosen, batch, retain=retain, stem=stem)
        terms = {"retain": (weight * total, count)}
    return Said(rejected, batch.rejected.mask & batch.unsafe[:, None], terms, metrics)


def reference(model: Model, params: Params, batch: PreferenceBatch) -> dict[str, Float[Array, "b t v"]]:
    """Returns the log-prob of every token at every place of the preferred answers, ``kept``, in nats.

    They are NaN within the stem.
    """
    stem, (logits,) = branched(model, params, batch.chosen)
    said = jax.nn.log_softmax(logits, axis=-1)
    return {"kept": jnp.pad(said, ((0, 0), (stem, 0), (0, 0)), constant_values=jnp.nan)}


def _kept(
    logits: Float[Array, "b u v"], chosen: Float[Array, "b t"], batch: PreferenceBatch, *, retain: Retain, stem: int
) -> SumCount:
    if retain == "nll":
        return losses.nll(chosen, batch.chosen.mask)
    mask = batch.chosen.mask & ~batch.unsafe[:, None]
    return losses.divergence(logits, batch.reference["kept"][:, stem:], mask[:, stem:])
