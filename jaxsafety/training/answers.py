"""What a model says of texts, and of both answers to the same prompts: what methods share."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.training.branching import branched, filled
from jaxsafety.types import Batch, Model, Params, PreferenceBatch, SumCount, Terms


def logprobs(
    model: Model, params: Params, batch: PreferenceBatch
) -> tuple[tuple[Float[Array, "b t"], Float[Array, "b t"]], Terms]:
    """Returns the log-probability of every target of both answers, from one pass over them together, and metrics.

    Log-probs are nats, at most 0, also where nothing is scored, but NaN within the batch's stem. Metrics have TRL's
    names where TRL has one.
    """
    stem, logits = branched(model, params, batch.chosen, batch.rejected)
    return scored(logits, batch, stem=stem)


def scored(
    logits: Sequence[Float[Array, "b u v"]], batch: PreferenceBatch, *, stem: int
) -> tuple[tuple[Float[Array, "b t"], Float[Array, "b t"]], Terms]:
    """Returns what :func:`logprobs` does, of the logits of both answers behind so many first places."""
    sides = (batch.chosen, batch.rejected)
    chosen, rejected = (_logprobs(one, side, stem=stem) for one, side in zip(logits, sides, strict=True))
    metrics = {
        "token_accuracy": _right(logits[0], batch.chosen, stem=stem),
        "logps/chosen": losses.summed(losses.sequence_logprobs(chosen, batch.chosen.mask, reduction="sum")),
        "logps/rejected": losses.summed(losses.sequence_logprobs(rejected, batch.rejected.mask, reduction="sum")),
    }
    return (chosen, rejected), metrics


def next_token(model: Model, params: Params, batch: Batch) -> tuple[Terms, Terms]:
    """Returns the negative log-likelihood of one :class:`Batch`, and how many of its targets are the likeliest token.

    Both are sums over the scored targets, in nats, and their number.
    """
    found, metrics = side_logprobs(model, params, batch)
    return {"nll": losses.nll(found, batch.mask)}, metrics


def side_logprobs(model: Model, params: Params, batch: Batch) -> tuple[Float[Array, "b t"], Terms]:
    """Returns the log-probability of every target of one answer, as :func:`logprobs` of two, and metrics."""
    stem, (logits,) = branched(model, params, batch)
    return _logprobs(logits, batch, stem=stem), {"token_accuracy": _right(logits, batch, stem=stem)}


def _logprobs(logits: Float[Array, "b u v"], side: Batch, *, stem: int) -> Float[Array, "b t"]:
    # A stem that is scored against its contract has no number, rather than none of its tokens counted.
    return filled(losses.token_logprobs(logits, side.targets[:, stem:]), stem=stem, value=jnp.nan)


def _right(logits: Float[Array, "b u v"], side: Batch, *, stem: int) -> SumCount:
    ok = filled(losses.correct(logits, side.targets[:, stem:]), stem=stem, value=False)
    return losses.masked_sum(ok.astype(jnp.float32), side.mask)
