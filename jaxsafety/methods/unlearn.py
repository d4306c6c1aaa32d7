"""Gradient-ascent unlearning: the likelihood of the dispreferred answers is pushed down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.training import answers
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms

Weight = float | Float[Array, ""]


@checked
def unlearn(
    nll_chosen: Float[Array, " b"], nll_rejected: Float[Array, " b"], *, weight_chosen: Weight,
    weight_rejected: Weight,
) -> Float[Array, " b"]:  # fmt: skip
    """Returns ``w_s * NLL(preferred) - w_u * NLL(dispreferred)`` per prompt, in nats.

    The dispreferred side's is of token log-probs that :func:`losses.bounded` limits.

    References:
        Jain et al. 2024 (arXiv 2407.10264).

    Example:
        >>> import jax.numpy as jnp
        >>> print(unlearn(jnp.float32([0.5]), jnp.float32([2.0]), weight_chosen=1.0, weight_rejected=0.1).round(3))
        [0.3]
    """
    return weight_chosen * nll_chosen - weight_rejected * nll_rejected


@dataclass(frozen=True)
class Config:
    """Mean over prompts of the difference of the two sides' negative log-likelihoods, in nats.

    Attributes:
        weight_chosen: of the preferred side, w_s.
        weight_rejected: of the dispreferred side, w_u.
        ascent_bound: nats per token beyond which the ascent stops pushing; ``.inf`` for the paper's unbounded one.
        reduction: a response's NLL is summed over its tokens, or averaged per token (``mean``).

    Fidelity: the bound is ours (``inf`` is the paper); the paper's mask swap between the two sides is not followed,
        each side is scored on its own answer.
    """

    weight_chosen: float = traced(1.0, at_least=0)
    weight_rejected: float = traced(1.0, at_least=0)
    ascent_bound: float = traced(10.0, above=0, infinite=True)
    reduction: Literal["sum", "mean"] = "sum"
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    (chosen, rejected), metrics = answers.logprobs(model, params, batch)
    kept = -losses.sequence_logprobs(chosen, batch.chosen.mask, reduction=config.reduction)
    bounded = losses.bounded(rejected, bound=config.ascent_bound)
    pushed = -losses.sequence_logprobs(bounded, batch.rejected.mask, reduction=config.reduction)
    weights = {"weight_chosen": config.weight_chosen, "weight_rejected": config.weight_rejected}
    return {"unlearn": losses.summed(unlearn(kept, pushed, **weights))}, metrics


METHOD = Method(Config, totals, needs=lambda config: Needs())
