"""Supervised safety fine-tuning (SSFT): the likelihood of the preferred answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Bool, Float

from jaxsafety import losses
from jaxsafety.entry.annotations import checked
from jaxsafety.losses import SumCount
from jaxsafety.training import answers
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms


@checked
def sft(logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> SumCount:
    """Negative log-likelihood in nats of the scored tokens, and their number.

    References:
        Jain et al. 2024 (arXiv 2407.10264), SSFT. Fidelity: faithful (token-weighted mean over the batch).
    """
    return losses.nll(logprobs, mask)


@dataclass(frozen=True)
class Config:
    """Mean negative log-likelihood of the preferred answers, per scored token; it has no fields."""


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    return answers.next_token(model, params, batch.chosen)


METHOD = Method(Config, totals, needs=lambda config: Needs(rejected=False))
