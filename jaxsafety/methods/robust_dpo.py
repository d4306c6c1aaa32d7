"""Robust DPO: the loss that would be had if no label were flipped, estimated from labels of which some are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.training import preferences
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms

Weight = float | Float[Array, ""]


@checked
def robust_dpo(
    margin_chosen: Float[Array, " b"], margin_rejected: Float[Array, " b"], *, beta: Weight, flipped: Weight
) -> Float[Array, " b"]:
    """Returns ``[-(1 - e) log sigmoid(z) + e log sigmoid(-z)] / (1 - 2 e)`` per pair, in nats, which may be negative.

    ``z`` is ``beta * (margin_chosen - margin_rejected)``, a margin an answer's log-prob under the policy minus under
    the reference, in nats, and ``e``, in [0, 1/2), the probability ``flipped`` that a pair's label is the wrong one:
    over labels so flipped, the mean is DPO's loss of the true ones. With 0 it is DPO's.

    References:
        Chowdhury et al. 2024 (arXiv 2403.00409), the robust loss.

    Example:
        >>> import jax.numpy as jnp
        >>> margins = jnp.float32([0.0, 5.0])
        >>> print(robust_dpo(margins, -margins, beta=1.0, flipped=0.1).round(3))
        [ 0.693 -1.25 ]
    """
    difference = beta * margin_chosen - beta * margin_rejected
    kept, turned = jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)
    return (flipped * turned - (1 - flipped) * kept) / (1 - 2 * flipped)


@dataclass(frozen=True)
class Config:
    """Mean over pairs against the model that tuning began with, in nats.

    Attributes:
        beta: inverse temperature of the rewards.
        flipped: probability that the label of a pair is the wrong one; 0 is DPO.
        reduction: a response's log-prob is summed over its tokens, or averaged per token (``mean``).

    References: Chowdhury et al. 2024 (arXiv 2403.00409). Fidelity: faithful. Labels are not flipped here: ``flipped``
        says how many of the examples' are.
    """

    beta: float = traced(0.1, at_least=0)
    flipped: float = traced(0.1, at_least=0, below=0.5)
    reduction: Literal["sum", "mean"] = "sum"
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    margins, metrics = preferences.margins(model, params, batch, reduction=config.reduction)
    metrics |= preferences.rewards(*(config.beta * own for own in margins))
    values = robust_dpo(*margins, beta=config.beta, flipped=config.flipped)
    return {"robust_dpo": losses.summed(values)}, metrics


METHOD = Method(Config, totals, needs=lambda config: Needs(), reference=preferences.reference)
