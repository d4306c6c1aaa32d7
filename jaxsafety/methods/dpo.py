"""Direct preference optimisation (DPO), with a weight of its own for either side."""

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
def dpo(
    margin_chosen: Float[Array, " b"], margin_rejected: Float[Array, " b"], *, weight_chosen: Weight,
    weight_rejected: Weight,
) -> Float[Array, " b"]:  # fmt: skip
    """Returns ``-log sigmoid(w_c * margin_chosen - w_r * margin_rejected)`` per pair, in nats; ``log 2`` at the start.

    A margin is an answer's log-prob under the policy minus under the reference, in nats; a weight is DPO's beta on that
    side: equal weights are the textbook loss.

    References:
        Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; two weights as in Jain et al. 2024 (arXiv 2407.10264).

    Example:
        >>> import jax.numpy as jnp
        >>> chosen, rejected = jnp.float32([0.0, 2.0]), jnp.float32([0.0, -3.0])
        >>> print(dpo(chosen, rejected, weight_chosen=1.0, weight_rejected=1.0).round(3))
        [0.693 0.007]
    """
    return -jax.nn.log_sigmoid(weight_chosen * margin_chosen - weight_rejected * margin_rejected)


@checked
def slope(margins: Float[Array, " b"]) -> Float[Array, " b"]:
    """Weight that DPO gives the gradient of each pair, ``sigmoid(-margin)`` in (0, 1), of the weighted margin.

    It is 1/2 at policy == reference. As long as it stays there, DPO's gradient is parallel to that of unlearning with
    the same ratio of weights; near 0 the pair is satisfied and pushes no more.

    References:
        Rafailov et al. 2023 (arXiv 2305.18290), section 4: the weight in the gradient of eq. 7.
    """
    return jax.nn.sigmoid(-margins)


@dataclass(frozen=True)
class Config:
    """Mean over pairs against the model that tuning began with, in nats.

    Attributes:
        weight_chosen: beta on the preferred side.
        weight_rejected: beta on the dispreferred side.
        reduction: a response's log-prob is summed over its tokens, or averaged per token (``mean``).

    Fidelity: to Jain et al. 2024: their log-probs are divided by the window (159) rather than the response, which is
        ``sum`` with both weights divided by 159.
    """

    weight_chosen: float = traced(0.1, at_least=0)
    weight_rejected: float = traced(0.1, at_least=0)
    reduction: Literal["sum", "mean"] = "sum"
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    margins, metrics = preferences.margins(model, params, batch, reduction=config.reduction)
    weights = {"weight_chosen": config.weight_chosen, "weight_rejected": config.weight_rejected}
    rewards = config.weight_chosen * margins[0], config.weight_rejected * margins[1]
    metrics |= preferences.rewards(*rewards) | {"rewards/slope": losses.summed(slope(rewards[0] - rewards[1]))}
    return {"dpo": losses.summed(dpo(*margins, **weights))}, metrics


METHOD = Method(Config, totals, needs=lambda config: Needs(), reference=preferences.reference)
