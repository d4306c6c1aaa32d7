"""Simple preference optimisation (SimPO): an answer's reward is the mean log-prob of its tokens; no reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.training import answers, preferences
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms

Weight = float | Float[Array, ""]


@checked
def simpo(
    mean_chosen: Float[Array, " b"], mean_rejected: Float[Array, " b"], *, beta: Weight, gamma: Weight
) -> Float[Array, " b"]:
    """Returns ``-log sigmoid(beta * (mean_chosen - mean_rejected) - gamma)`` per pair, in nats.

    A mean is that of the log-probs of an answer's tokens under the policy, in nats per token.

    References:
        Meng et al. 2024 (arXiv 2405.14734), the objective of SimPO.

    Example:
        >>> import jax.numpy as jnp
        >>> mean_chosen, mean_rejected = jnp.float32([-0.1, -2.0]), jnp.float32([-2.0, -0.1])
        >>> print(simpo(mean_chosen, mean_rejected, beta=2.0, gamma=1.0).round(3))
        [0.059 4.808]
    """
    return -jax.nn.log_sigmoid(beta * (mean_chosen - mean_rejected) - gamma)


@dataclass(frozen=True)
class Config:
    """Mean over pairs, in nats.

    Attributes:
        beta: scale of the rewards, the answers' mean log-probs.
        gamma: by how much the preferred answer's reward should be the higher one.

    References: Meng et al. 2024 (arXiv 2405.14734). Fidelity: faithful; the defaults are among the values
        that the paper searched.
    """

    beta: float = traced(2.0, above=0)
    gamma: float = traced(1.0, at_least=0)
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    found, metrics = answers.logprobs(model, params, batch)
    chosen, rejected = (
        losses.sequence_logprobs(own, side.mask, reduction="mean")
        for own, side in zip(found, (batch.chosen, batch.rejected), strict=True)
    )
    metrics |= preferences.rewards(config.beta * chosen, config.beta * rejected)
    return {"simpo": losses.summed(simpo(chosen, rejected, beta=config.beta, gamma=config.gamma))}, metrics


METHOD = Method(Config, totals, needs=lambda config: Needs())
