"""Training objectives as pure functions: a forward pass in, a ``Loss`` out.

A ``Loss`` maps ``(params, batch)`` to ``(loss[], metrics)``. Weights may be traced, so one compiled program serves a
grid of them. Pretraining takes a :class:`~jaxsafety.types.Batch`, the safety objectives a
:class:`~jaxsafety.types.PreferenceBatch`. Metric names are TRL's where TRL has one; log-probs are nats.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import losses
from jaxsafety.losses import Reduction
from jaxsafety.types import Batch, Forward, HParams, Loss, Metrics, Params, PreferenceBatch


def next_token(forward: Forward) -> Loss:
    """Mean negative log-likelihood of the scored targets, in nats per token."""

    def loss(params: Params, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        logits = forward(params, batch.tokens)
        value = losses.quotient(*losses.nll(losses.token_logprobs(logits, batch.targets), batch.mask))
        ok = losses.correct(logits, batch.targets)
        right = losses.masked_sum(ok.astype(jnp.float32), batch.mask)
        return value, {"token_accuracy": losses.quotient(*right)}

    return loss


def sft(forward: Forward) -> Loss:
    """Supervised safety fine-tuning: mean NLL of the preferred answers, in nats per scored token.

    References:
        Jain et al. 2024 (arXiv 2407.10264), SSFT. Fidelity: faithful (token-weighted mean over the batch).
    """
    base = next_token(forward)

    def loss(params: Params, batch: PreferenceBatch) -> tuple[Float[Array, ""], Metrics]:
        return base(params, batch.chosen)

    return loss


def unlearn(forward: Forward, *, hparams: HParams, reduction: Reduction) -> Loss:
    """Gradient-ascent unlearning: ``w_s * NLL(preferred) - w_u * NLL(dispreferred)``, mean over prompts.

    Args:
        forward: the model.
        hparams: ``weight_chosen`` (w_s), ``weight_rejected`` (w_u), ``ascent_bound`` (nats per token).
        reduction: whether a response's NLL is summed over its tokens or averaged.

    References:
        Jain et al. 2024 (arXiv 2407.10264). Fidelity: the bound is ours (``inf`` is the paper); the paper's mask swap
        between the two sides is not followed, each side is scored on its own answer.
    """

    def loss(params: Params, batch: PreferenceBatch) -> tuple[Float[Array, ""], Metrics]:
        chosen, rejected, metrics = _both(forward, params, batch)
        kept = -losses.sequence_logprobs(chosen, batch.chosen.mask, reduction=reduction)
        bounded = losses.bounded(rejected, bound=hparams.ascent_bound)
        pushed = -losses.sequence_logprobs(bounded, batch.rejected.mask, reduction=reduction)
        value = jnp.mean(hparams.weight_chosen * kept - hparams.weight_rejected * pushed)
        return value, metrics

    return loss


def dpo(forward: Forward, *, reference: Params, hparams: HParams, reduction: Reduction) -> Loss:
    """Direct preference optimisation against frozen reference parameters, mean over pairs, in nats.

    Args:
        forward: the model.
        reference: parameters of the frozen reference, usually the pretrained ones; no gradient flows into them.
        hparams: ``weight_chosen`` and ``weight_rejected``; equal weights are textbook DPO with that beta.
        reduction: whether a response's log-prob is summed over its tokens or averaged.

    References:
        Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. Fidelity to Jain et al. 2024: their log-probs are divided by
        the window (159) rather than the response, which is ``sum`` with both weights divided by 159.
    """

    def loss(params: Params, batch: PreferenceBatch) -> tuple[Float[Array, ""], Metrics]:
        chosen, rejected, metrics = _both(forward, params, batch)
        ref_chosen, ref_rejected, _ = _both(forward, jax.lax.stop_gradient(reference), batch)
        margins = [
            losses.sequence_logprobs(policy - ref, side.mask, reduction=reduction)
            for policy, ref, side in ((chosen, ref_chosen, batch.chosen), (rejected, ref_rejected, batch.rejected))
        ]
        weights = {"weight_chosen": hparams.weight_chosen, "weight_rejected": hparams.weight_rejected}
        value = losses.quotient(*losses.dpo(*margins, **weights))
        rewards = hparams.weight_chosen * margins[0], hparams.weight_rejected * margins[1]
        metrics |= {
            "rewards/chosen": jnp.mean(rewards[0]),
            "rewards/rejected": jnp.mean(rewards[1]),
            "rewards/margins": jnp.mean(rewards[0] - rewards[1]),
            "rewards/accuracies": jnp.mean(rewards[0] > rewards[1]),
            "rewards/slope": jnp.mean(losses.dpo_slope(rewards[0] - rewards[1])),
        }
        return value, metrics

    return loss


def _both(
    forward: Forward, params: Params, batch: PreferenceBatch
) -> tuple[Float[Array, "b t"], Float[Array, "b t"], Metrics]:
    """Token log-probs of both answers from one forward pass over the concatenated batch, and shared metrics."""
    both: Batch = jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch.chosen, batch.rejected)
    logits = forward(params, both.tokens)
    chosen, rejected = jnp.split(losses.token_logprobs(logits, both.targets), 2)
    ok = jnp.split(losses.correct(logits, both.targets), 2)[0]
    right = losses.masked_sum(ok.astype(jnp.float32), batch.chosen.mask)
    metrics = {
        "token_accuracy": losses.quotient(*right),
        "logps/chosen": _mean_per_response(chosen, batch.chosen.mask),
        "logps/rejected": _mean_per_response(rejected, batch.rejected.mask),
    }
    return chosen, rejected, metrics


def _mean_per_response(logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    return jnp.mean(losses.sequence_logprobs(logprobs, mask, reduction="sum"))
