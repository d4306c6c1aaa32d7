"""A classifier of trajectories: whether one is undesirable, learned from labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import losses
from jaxsafety.entry.annotations import checked
from jaxsafety.types import Key, Method, Needs, Params, Terms
from jaxsafety.world.trajectories import Trajectories


@checked
def classify(logits: Float[Array, " b"], undesirable: Bool[Array, " b"]) -> Float[Array, " b"]:
    """Cross-entropy in nats of labels under ``sigmoid(logits)``, the probability of being undesirable.

    References:
        Low, Kumar and Sanner 2023 (arXiv 2304.03081). Fidelity: two classes instead of safe, mild and severe.
    """
    return -jax.nn.log_sigmoid(jnp.where(undesirable, logits, -logits))


@dataclass(frozen=True)
class Config:
    """Mean cross-entropy over trajectories; it has no fields. The policy stays as it is."""


def totals(
    model: Any, params: Params, batch: Trajectories, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    logits = model(params, batch.symbols).logits
    right = (logits > 0) == batch.undesirable
    terms = {"classify": losses.summed(classify(logits, batch.undesirable))}
    return terms, {"accuracy": losses.summed(right.astype(jnp.float32))}


METHOD = Method(
    Config, totals, needs=lambda config: Needs(rejected=False, trained="classifier/.*"), examples="labelled"
)
