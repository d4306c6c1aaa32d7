"""What a model says of texts, and of both answers to the same prompts: what methods share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.types import Batch, Model, Params, PreferenceBatch, Terms


def logprobs(
    model: Model, params: Params, batch: PreferenceBatch
) -> tuple[tuple[Float[Array, "b t"], Float[Array, "b t"]], Terms]:
    """Returns the log-probability of every target of both answers, from one pass over them together, and metrics.

    Log-probs are nats, at most 0, also where nothing is scored. Metrics have TRL's names where TRL has one.
    """
    together: Batch = jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch.chosen, batch.rejected)
    logits = model.apply(params, together.tokens).logits
    chosen, rejected = jnp.split(losses.token_logprobs(logits, together.targets), 2)
    ok = jnp.split(losses.correct(logits, together.targets), 2)[0]
    metrics = {
        "token_accuracy": losses.masked_sum(ok.astype(jnp.float32), batch.chosen.mask),
        "logps/chosen": losses.summed(losses.sequence_logprobs(chosen, batch.chosen.mask, reduction="sum")),
        "logps/rejected": losses.summed(losses.sequence_logprobs(rejected, batch.rejected.mask, reduction="sum")),
    }
    return (chosen, rejected), metrics


def next_token(model: Model, params: Params, batch: Batch) -> tuple[Terms, Terms]:
    """Returns the negative log-likelihood of one :class:`Batch`, and how many of its targets are the likeliest token.

    Both are sums over the scored targets, in nats, and their number.
    """
    logits = model.apply(params, batch.tokens).logits
    ok = losses.correct(logits, batch.targets)
    right = losses.masked_sum(ok.astype(jnp.float32), batch.mask)
    return {"nll": losses.nll(losses.token_logprobs(logits, batch.targets), batch.mask)}, {"token_accuracy": right}
