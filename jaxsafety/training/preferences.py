"""How far both answers to the same prompts have moved from a reference: what methods of pairs share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import losses
from jaxsafety.entry.annotations import checked
from jaxsafety.losses import Reduction
from jaxsafety.training import answers
from jaxsafety.types import Model, Params, PreferenceBatch, Terms


@checked
def margin(
    policy: Float[Array, "b t"], reference: Float[Array, "b t"], mask: Bool[Array, "b t"], *, reduction: Reduction
) -> Float[Array, " b"]:
    """Returns every answer's log-prob under the policy minus under the reference, in nats: 0 where they are one.

    Over its scored tokens it is summed, or averaged (``mean``, per token).
    """
    return losses.sequence_logprobs(policy - reference, mask, reduction=reduction)


def margins(
    model: Model, params: Params, batch: PreferenceBatch, *, reduction: Reduction
) -> tuple[tuple[Float[Array, " b"], Float[Array, " b"]], Terms]:
    """Returns the margins of the preferred and of the dispreferred answers, and metrics.

    ``batch.reference`` is what :func:`reference` says.
    """
    policy, metrics = answers.logprobs(model, params, batch)
    chosen, rejected = (
        margin(own, other, side.mask, reduction=reduction)
        for own, other, side in zip(policy, batch.reference, (batch.chosen, batch.rejected), strict=True)
    )
    return (chosen, rejected), metrics


@checked
def rewards(chosen: Float[Array, " b"], rejected: Float[Array, " b"]) -> Terms:
    """Returns the metrics of both answers' implicit rewards, under the names that TRL gives them."""
    shown = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
    }
    return {name: losses.summed(values) for name, values in shown.items()}


def reference(
    model: Model, params: Params, batch: PreferenceBatch, config: Any
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Returns the log-probability of every target of both answers under the model that tuning began with."""
    return answers.logprobs(model, params, batch)[0]
