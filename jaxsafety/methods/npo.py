"""Negative preference optimisation (NPO): unlearning that fades where a harmful answer has become unlikely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.training import answers, preferences, retain
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms

Weight = float | Float[Array, ""]


@checked
def npo(margin: Float[Array, " b"], *, beta: Weight) -> Float[Array, " b"]:
    """Returns ``-(2 / beta) log sigmoid(-beta * margin)`` per answer, in nats; ``2 / beta * log 2`` at the reference.

    A margin is an answer's log-prob under the policy minus under the reference, in nats. The gradient is that of the
    answer's log-prob times ``2 sigmoid(beta * margin)``: 1 at the reference, 0 where the answer has become far less
    likely. Towards ``beta`` 0 it is gradient ascent on the negative log-likelihood.

    References:
        Zhang et al. 2024 (arXiv 2404.05868), eq. 3.

    Example:
        >>> import jax.numpy as jnp
        >>> margins = jnp.float32([2.0, 0.0, -50.0])
        >>> print(npo(margins, beta=0.1).round(2))
        [15.96 13.86  0.13]
    """
    return -2 / beta * jax.nn.log_sigmoid(-beta * margin)


@dataclass(frozen=True)
class Config:
    """Weighted sum of the forgetting, a mean over unsafe prompts, and of what is kept, a mean over tokens, in nats.

    Attributes:
        beta: inverse temperature; towards 0 it is gradient ascent.
        weight_forget: of the harmful answers' term.
        retain: what is kept: ``nll``, the preferred answers of all prompts; ``kl``, all that the model that tuning
            began with says at safe prompts' answers; or ``none``.
        weight_retain: of its term.
        reduction: a harmful answer's log-prob is summed over its tokens, or averaged per token (``mean``).

    References: Zhang et al. 2024 (arXiv 2404.05868). Fidelity: to the paper, whose kept examples are of a set of their
        own, and are not what is answered in the place of what is forgotten: here ``nll`` has refusals among them, as
        :mod:`jaxsafety.methods.unlearn` has, and ``kl`` has not.
    """

    beta: float = traced(0.1, above=0)
    weight_forget: float = traced(1.0, at_least=0)
    retain: Literal["nll", "kl", "none"] = "nll"
    weight_retain: float = traced(1.0, at_least=0)
    reduction: Literal["sum", "mean"] = "sum"
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    said = retain.read(model, params, batch, retain=config.retain, weight=config.weight_retain)
    margin = preferences.margin(
        said.rejected, batch.reference["rejected"], said.forgotten, reduction=config.reduction
    )  # fmt: skip
    values = config.weight_forget * npo(margin, beta=config.beta)
    shown = {"rewards/rejected": losses.masked_sum(config.beta * margin, batch.unsafe)}
    return said.terms | {"forget": losses.masked_sum(values, batch.unsafe)}, said.metrics | shown


def reference(model: Model, params: Params, batch: PreferenceBatch, config: Config) -> dict[str, Array]:
    """Returns what the model that tuning began with says of dispreferred answers, and of others that are kept so."""
    rejected = answers.side_logprobs(model, params, batch.rejected)[0]
    kept = retain.reference(model, params, batch) if config.retain == "kl" else {}
    return {"rejected": rejected} | kept


METHOD = Method(Config, totals, needs=lambda config: Needs(unsafe=True), reference=reference)
