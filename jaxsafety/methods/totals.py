"""The objectives as sums over a part of a batch, beside the counts that they are means over.

Sums and counts of parts add up, and so do gradients of sums: a batch taken in parts, or by several devices, has the
loss and the gradient of the whole. Metric names are TRL's where TRL has one; log-probs are nats.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.losses import Reduction, SumCount
from jaxsafety.types import Batch, Forward, HParams, Params, PreferenceBatch, ReferencedBatch, Totals


def next_token(forward: Forward) -> Totals:
    """Negative log-likelihood of the scored targets of a :class:`Batch`, in nats, and their number."""

    def totals(params: Params, batch: Batch) -> tuple[SumCount, dict[str, SumCount]]:
        logits = forward(params, batch.tokens)
        ok = losses.correct(logits, batch.targets)
        right = losses.masked_sum(ok.astype(jnp.float32), batch.mask)
        return losses.nll(losses.token_logprobs(logits, batch.targets), batch.mask), {"token_accuracy": right}

    return totals


def unlearn(forward: Forward, *, hparams: HParams, reduction: Reduction) -> Totals:
    """``w_s * NLL(preferred) - w_u * NLL(dispreferred)`` of a :class:`PreferenceBatch`, and its number of prompts.

    See :func:`jaxsafety.methods.objectives.unlearn`.
    """

    def totals(params: Params, batch: PreferenceBatch) -> tuple[SumCount, dict[str, SumCount]]:
        chosen, rejected, metrics = both(forward, params, batch)
        kept = -losses.sequence_logprobs(chosen, batch.chosen.mask, reduction=reduction)
        bounded = losses.bounded(rejected, bound=hparams.ascent_bound)
        pushed = -losses.sequence_logprobs(bounded, batch.rejected.mask, reduction=reduction)
        return _summed(hparams.weight_chosen * kept - hparams.weight_rejected * pushed), metrics

    return totals


def dpo(forward: Forward, *, hparams: HParams, reduction: Reduction) -> Totals:
    """DPO's loss on a :class:`ReferencedBatch`, and its number of pairs; see :func:`objectives.dpo`."""

    def totals(params: Params, referenced: ReferencedBatch) -> tuple[SumCount, dict[str, SumCount]]:
        batch = referenced.batch
        chosen, rejected, metrics = both(forward, params, batch)
        margins = [
            losses.sequence_logprobs(policy - reference, side.mask, reduction=reduction)
            for policy, reference, side in (
                (chosen, referenced.chosen_logprobs, batch.chosen),
                (rejected, referenced.rejected_logprobs, batch.rejected),
            )
        ]
        weights = {"weight_chosen": hparams.weight_chosen, "weight_rejected": hparams.weight_rejected}
        rewards = hparams.weight_chosen * margins[0], hparams.weight_rejected * margins[1]
        metrics |= {
            "rewards/chosen": _summed(rewards[0]),
            "rewards/rejected": _summed(rewards[1]),
            "rewards/margins": _summed(rewards[0] - rewards[1]),
            "rewards/accuracies": _summed((rewards[0] > rewards[1]).astype(jnp.float32)),
            "rewards/slope": _summed(losses.dpo_slope(rewards[0] - rewards[1])),
        }
        return losses.dpo(*margins, **weights), metrics

    return totals


def both(
    forward: Forward, params: Params, batch: PreferenceBatch
) -> tuple[Float[Array, "b t"], Float[Array, "b t"], dict[str, SumCount]]:
    """Token log-probs of both answers, from one forward pass over the concatenated batch, and shared metrics."""
    together: Batch = jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch.chosen, batch.rejected)
    logits = forward(params, together.tokens)
    chosen, rejected = jnp.split(losses.token_logprobs(logits, together.targets), 2)
    ok = jnp.split(losses.correct(logits, together.targets), 2)[0]
    metrics = {
        "token_accuracy": losses.masked_sum(ok.astype(jnp.float32), batch.chosen.mask),
        "logps/chosen": _summed(losses.sequence_logprobs(chosen, batch.chosen.mask, reduction="sum")),
        "logps/rejected": _summed(losses.sequence_logprobs(rejected, batch.rejected.mask, reduction="sum")),
    }
    return chosen, rejected, metrics


def _summed(values: Float[Array, " b"]) -> SumCount:
    return jnp.sum(values), jnp.float32(values.shape[0])
