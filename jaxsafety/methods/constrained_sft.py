"""Constrained fine-tuning: answers are learned while their first tokens stay near to what the model said before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.training import answers
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms

Beta = float | Float[Array, ""]


@checked
def constrained_sft(margins: Float[Array, "b t"], betas: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Returns ``-(2 / beta) log sigmoid(beta * margin)`` per token, in nats.

    A margin is a token's log-prob under the policy minus under the reference, in nats. The gradient is that of the
    negative log-likelihood times ``2 sigmoid(-beta * margin)``: 1 at the reference, and near 0 where a token has become
    likelier by more than some ``1 / beta``. Towards ``beta`` 0 it is the likelihood's own.

    References:
        Qi et al. 2024 (arXiv 2406.05946), eq. 3. Fidelity: faithful; their code has a floor of 1e-3 for that factor.
    """
    return -2 / betas * jax.nn.log_sigmoid(betas * margins)


@checked
def strengths(
    mask: Bool[Array, "b t"], *, first: Beta, early: Beta, late: Beta, early_tokens: int | Float[Array, ""]
) -> Float[Array, "b t"]:
    """Returns every token's beta by its number among the scored ones of its answer.

    The first has ``first``, the others up to ``early_tokens`` have ``early``, and those after them ``late``.
    """
    number = jnp.cumsum(mask, axis=1)
    return jnp.where(number <= 1, first, jnp.where(number <= early_tokens, early, late))


@dataclass(frozen=True)
class Config:
    """Mean over the scored tokens of the preferred answers against the model that tuning began with, in nats.

    Attributes:
        first: beta of an answer's first token, below that of the next ones, as its likelihood has farthest to go.
        early: beta of those after it.
        late: beta of the rest.
        early_tokens: how many tokens of an answer, the first among them, are not of the rest.

    References:
        Qi et al. 2024 (arXiv 2406.05946), section 4, whose betas these are.

    Fidelity: faithful. Meant for whoever lets others tune an aligned model, so that the examples are the attack's.
    """

    first: float = traced(0.5, above=0)
    early: float = traced(2.0, above=0)
    late: float = traced(0.1, above=0)
    early_tokens: int = traced(5, at_least=1)
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    mask = batch.chosen.mask
    policy, metrics = answers.side_logprobs(model, params, batch.chosen)
    betas = strengths(mask, first=config.first, early=config.early, late=config.late, early_tokens=config.early_tokens)
    # What is not scored may have no number, which would come back in the gradient.
    values = constrained_sft(jnp.where(mask, policy - batch.reference, 0.0), betas)
    return {"constrained_sft": losses.masked_sum(values, mask)}, metrics


def reference(model: Model, params: Params, batch: PreferenceBatch, config: Config) -> Float[Array, "b t"]:
    """Returns the log-probability of every target of the preferred answers under the model that tuning began with."""
    return answers.side_logprobs(model, params, batch.chosen)[0]


METHOD = Method(Config, totals, needs=lambda config: Needs(rejected=False), reference=reference)
