"""Training objectives as pure functions: a forward pass in, a ``Loss`` out.

A ``Loss`` maps ``(params, batch)`` to ``(loss[], metrics)``. Weights may be traced, so one compiled program serves a
grid of them. Pretraining takes a :class:`~jaxsafety.types.Batch`, the safety objectives a
:class:`~jaxsafety.types.PreferenceBatch`. Metric names are TRL's where TRL has one; log-probs are nats.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.losses import Reduction
from jaxsafety.methods import totals
from jaxsafety.types import Forward, HParams, Loss, Metrics, Params, PreferenceBatch, ReferencedBatch, Totals


def mean(summed: Totals) -> Loss:
    """Returns the loss that sums over a whole batch make: each over its own count."""

    def loss(params: Params, batch: Any) -> tuple[Float[Array, ""], Metrics]:
        value, metrics = summed(params, batch)
        return losses.quotient(*value), {name: losses.quotient(*own) for name, own in metrics.items()}

    return loss


def next_token(forward: Forward) -> Loss:
    """Mean negative log-likelihood of the scored targets, in nats per token."""
    return mean(totals.next_token(forward))


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
    return mean(totals.unlearn(forward, hparams=hparams, reduction=reduction))


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
    against = mean(totals.dpo(forward, hparams=hparams, reduction=reduction))

    def loss(params: Params, batch: PreferenceBatch) -> tuple[Float[Array, ""], Metrics]:
        chosen, rejected, _ = totals.both(forward, jax.lax.stop_gradient(reference), batch)
        return against(params, ReferencedBatch(batch, chosen, rejected))

    return loss
