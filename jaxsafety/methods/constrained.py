"""A policy that earns as much as it can under a constraint, whose Lagrange multiplier is learned beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, static, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.training import dual
from jaxsafety.types import Key, Method, Metrics, Needs, Params, Terms
from jaxsafety.world.trajectories import Trajectories

Scalar = float | Float[Array, ""]


@checked
def lagrangian(returns: Float[Array, "*b"], costs: Float[Array, "*b"], *, log_multiplier: Scalar) -> Float[Array, "*b"]:
    """Returns ``(return - lambda * cost) / (1 + lambda)``, whose mean over trajectories the policy maximises."""
    own, other = dual.shares(log_multiplier)
    return own * returns - other * costs


@checked
def score_function(logprobs: Float[Array, "b k"], values: Float[Array, "b k"]) -> Float[Array, " b"]:
    """Returns what has, of trajectories drawn from a policy, the negative gradient of their expected value.

    ``logprobs`` are theirs under the policy in nats, ``values`` numbers, ``k`` at least 2: each is compared with the
    mean of the others of its row, which leaves the estimate unbiased. No gradient flows into values.

    References:
        Williams 1992, Machine Learning 8, sec. 4; the others' mean as a baseline: Kool et al. 2019, "Buy 4 REINFORCE
        samples, get a baseline for free!".
    """
    values = jax.lax.stop_gradient(values)
    others = (jnp.sum(values, axis=1, keepdims=True) - values) / (values.shape[1] - 1)
    return -jnp.mean((values - others) * logprobs, axis=1)


@dataclass(frozen=True)
class Config:
    """Mean over trajectories of return minus multiplier times cost, divided by one plus the multiplier.

    Attributes:
        cost: a trajectory's probability of being undesirable, as the ``classifier`` says, which stays as it is, or the
            share of its symbols that are ``tempting``: a Markov cost, the sum of what every symbol costs alone.
        threshold: the mean cost that there may be.
        multiplier: Lagrange multiplier of the first step, lambda. Low ones have the policy find the pattern first;
            once no trajectory is without it, nothing leads back.
        multiplier_rate: of the multiplier's ascent at every step; with 0 the multiplier is a fixed penalty. A high one
            overshoots while the policy is still learning, and little but the cost is left in the objective.
        rollouts: trajectories for every example, which are each other's baseline.

    References: Low, Kumar and Sanner 2023 (arXiv 2304.03081), RCPO-MF. Fidelity: ascent on the logarithm of the
        multiplier by its own rate, lambda_0 * exp(rate * sum of (cost - threshold)), where theirs is Adam's; a baseline
        of other trajectories, and no critic.
    """

    cost: Literal["classifier", "tempting"] = "classifier"
    threshold: float = traced(0.05, at_least=0, at_most=1)
    multiplier: float = traced(10.0, above=0)
    multiplier_rate: float = traced(0.01, at_least=0)
    rollouts: int = static(8, at_least=2)
    __post_init__ = check


def data(batch: Trajectories, *, key: Key, config: Config) -> Trajectories:
    """See :class:`jaxsafety.types.Method`."""
    return batch.replace(luck=jax.random.split(key, (len(batch.symbols), config.rollouts)))


def totals(
    model: Any, params: Params, batch: Trajectories, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    found = model(params, luck=batch.luck.reshape(-1))
    found = jax.tree.map(lambda leaf: leaf.reshape(batch.luck.shape), found)
    cost = jax.nn.sigmoid(found.logits) if config.cost == "classifier" else found.tempting
    values = lagrangian(found.returns, cost, log_multiplier=aux)
    shown = {"return": found.returns, "cost": cost, "undesirable": found.undesirable.astype(jnp.float32)}
    metrics = {name: losses.summed(jnp.mean(values, axis=1)) for name, values in shown.items()}
    metrics["multiplier"] = losses.summed(jnp.full(len(cost), jnp.exp(aux)))
    return {"constrained": losses.summed(score_function(found.logprobs, values))}, metrics


def init_aux(params: Params, *, key: Key, config: Config) -> Float[Array, ""]:
    """Returns the logarithm of the multiplier; see :class:`jaxsafety.types.Method`."""
    return jnp.log(jnp.float32(config.multiplier))


def update_aux(aux: Float[Array, ""], means: Metrics, *, config: Config) -> Float[Array, ""]:
    """See :class:`jaxsafety.types.Method`."""
    return dual.dual_ascent(aux, means["cost"], threshold=config.threshold, rate=config.multiplier_rate)


METHOD = Method(
    Config,
    totals,
    needs=lambda config: Needs(rejected=False, trained="policy"),
    data=data,
    init_aux=init_aux,
    update_aux=update_aux,
    examples="labelled",
)
