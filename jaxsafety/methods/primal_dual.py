"""Safe answers are learned as well as refusals that stay likely enough leave room for, by a learned multiplier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.training import answers, dual
from jaxsafety.types import Key, Method, Metrics, Model, Needs, Params, PreferenceBatch, Terms

Scalar = float | Float[Array, ""]


@checked
def primal_dual(
    logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"], unsafe: Bool[Array, " b"], *, log_multiplier: Scalar
) -> Terms:
    """Returns the negative log-likelihood of safe prompts' answers and of unsafe ones', times their shares.

    These are ``1 / (1 + lambda)`` and ``lambda / (1 + lambda)``; each is a sum over scored tokens, in nats, and their
    number. The constraint's threshold is a constant in it, and left out.

    Example:
        >>> import jax.numpy as jnp
        >>> logprobs, mask = jnp.float32([[-1.0, -1.0], [-2.0, -4.0]]), jnp.ones((2, 2), bool)
        >>> terms = primal_dual(logprobs, mask, jnp.array([False, True]), log_multiplier=0.0)
        >>> print({name: (float(total), float(count)) for name, (total, count) in terms.items()})
        {'utility': (1.0, 2.0), 'safety': (3.0, 2.0)}
    """
    utility, safety = (losses.nll(logprobs, mask & kind[:, None]) for kind in (~unsafe, unsafe))
    own, other = dual.shares(log_multiplier)
    return {"utility": (own * utility[0], utility[1]), "safety": (other * safety[0], safety[1])}


@dataclass(frozen=True)
class Config:
    """Mean NLL of safe answers plus multiplier times that of refusals, divided by one plus the multiplier, in nats.

    Attributes:
        threshold: nats per token that refusals' mean NLL may have.
        multiplier: Lagrange multiplier of the first step, lambda.
        multiplier_rate: of the multiplier's ascent at every step; with 0 the multiplier is a fixed penalty. A batch
            without refusals leaves it as it is. A high one overshoots where a model begins without refusals, and comes
            back slowly.

    References: Chamon and Ribeiro 2020 (arXiv 2006.05487), constrained learning by dual ascent. Fidelity: ascent on the
        logarithm of the multiplier and the objective's division by ``1 + lambda`` are those of
        :mod:`jaxsafety.methods.constrained`; between two steps of the multiplier the parameters take one, where theirs
        are those of the minimum.
    """

    threshold: float = traced(0.1, at_least=0)
    multiplier: float = traced(1.0, above=0)
    multiplier_rate: float = traced(0.01, at_least=0)
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    mask, unsafe = batch.chosen.mask, batch.unsafe
    logprobs, metrics = answers.side_logprobs(model, params, batch.chosen)
    refusals = mask & unsafe[:, None]
    metrics |= {
        "cost": losses.nll(logprobs, refusals),
        # Unlike the cost, it is 0 where there is no refusal.
        "excess": losses.masked_sum(-logprobs - config.threshold, refusals),
        "multiplier": losses.summed(jnp.full(len(unsafe), jnp.exp(aux))),
    }
    return primal_dual(logprobs, mask, unsafe, log_multiplier=aux), metrics


def init_aux(params: Params, *, key: Key, config: Config) -> Float[Array, ""]:
    """Returns the logarithm of the multiplier; see :class:`jaxsafety.types.Method`."""
    return jnp.log(jnp.float32(config.multiplier))


def update_aux(aux: Float[Array, ""], means: Metrics, *, config: Config) -> Float[Array, ""]:
    """See :class:`jaxsafety.types.Method`."""
    return dual.dual_ascent(aux, means["excess"], threshold=0.0, rate=config.multiplier_rate)


METHOD = Method(
    Config,
    totals,
    needs=lambda config: Needs(rejected=False, unsafe=True),
    init_aux=init_aux,
    update_aux=update_aux,
)
