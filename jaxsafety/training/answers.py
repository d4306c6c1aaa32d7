"""What a model says of both answers to the same prompts: what the methods over preferences share."""

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
