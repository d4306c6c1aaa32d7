"""Identity preference optimisation (IPO): answers are told apart by a margin, and no further."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.training import preferences
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms

Weight = float | Float[Array, ""]


@checked
def ipo(
    margin_chosen: Float[Array, " b"], margin_rejected: Float[Array, " b"], *, tau: Weight
) -> Float[Array, " b"]:  # fmt: skip
    """Returns ``(margin_chosen - margin_rejected - 1 / (2 tau))^2`` per pair, in nats squared.

    A margin is an answer's log-prob under the policy minus under the reference, in nats. Unlike DPO's, the loss rises
    again where the difference has passed ``1 / (2 tau)``, so that ``tau`` > 0 holds the policy near to the reference
    however sure the preferences are.

    References:
        Azar et al. 2023 (arXiv 2310.12036), the sampled loss of IPO.

    Example:
        >>> import jax.numpy as jnp
        >>> margins = jnp.float32([0.0, 5.0, 9.0])
        >>> print(ipo(margins, jnp.zeros(3), tau=0.1))
        [25.  0. 16.]
    """
    return jnp.square(margin_chosen - margin_rejected - 1 / (2 * tau))


@dataclass(frozen=True)
class Config:
    """Mean over pairs against the model that tuning began with, in nats squared.

    Attributes:
        tau: strength of the regularisation; the difference of the margins is led to ``1 / (2 tau)``.
        reduction: a response's log-prob is averaged per token, or summed over its tokens (``sum``).

    References: Azar et al. 2023 (arXiv 2310.12036). Fidelity: the paper has no lengths, which is ``sum``; the average
        is what TRL takes, whose ``beta`` is this ``tau``.
    """

    tau: float = traced(0.1, above=0)
    reduction: Literal["sum", "mean"] = "mean"
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    (chosen, rejected), metrics = preferences.margins(model, params, batch, reduction=config.reduction)
    metrics |= preferences.rewards(config.tau * chosen, config.tau * rejected)
    return {"ipo": losses.summed(ipo(chosen, rejected, tau=config.tau))}, metrics


METHOD = Method(Config, totals, needs=lambda config: Needs(), reference=preferences.reference)
