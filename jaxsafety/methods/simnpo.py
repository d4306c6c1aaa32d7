"""Simple negative preference optimisation (SimNPO): harmful answers' mean log-prob is lowered, without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.training import retain
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms

Weight = float | Float[Array, ""]


@checked
def simnpo(mean: Float[Array, " b"], *, beta: Weight, gamma: Weight) -> Float[Array, " b"]:
    """Returns ``-(2 / beta) log sigmoid(-beta * mean - gamma)`` per answer, in nats per token.

    ``mean`` is that of the log-probs of an answer's tokens under the policy, in nats per token. The gradient is that of
    ``mean`` times ``2 sigmoid(beta * mean + gamma)``: near 2 where an answer is as good as certain and ``gamma`` is
    large, and 0 where it has become unlikely.

    References:
        Fan et al. 2024 (arXiv 2410.07163), the objective of SimNPO.

    Example:
        >>> import jax.numpy as jnp
        >>> mean_logprobs = jnp.float32([-0.1, -3.0])
        >>> print([round(float(one), 3) for one in simnpo(mean_logprobs, beta=4.5, gamma=0.0)])
        [0.219, 0.0]
    """
    return -2 / beta * jax.nn.log_sigmoid(-beta * mean - gamma)


@dataclass(frozen=True)
class Config:
    """Weighted sum of the forgetting, a mean over unsafe prompts, and of what is kept, a mean over tokens, in nats.

    Attributes:
        beta: inverse temperature of the mean log-probs.
        gamma: by how much ``beta`` times that of a harmful answer should be below 0.
        weight_forget: of the harmful answers' term.
        retain: what is kept: ``nll``, the preferred answers of all prompts; ``kl``, all that the model that tuning
            began with says at safe prompts' answers; or ``none``.
        weight_retain: of its term.

    References: Fan et al. 2024 (arXiv 2410.07163). Fidelity: the forgetting is faithful; the default ``beta`` and
        weights are those that open-unlearning has for it, with no margin, as there. The paper's kept examples are of a
        set of their own: here ``nll`` has refusals among them, as :mod:`jaxsafety.methods.unlearn` has, and ``kl`` has
        not.
    """

    beta: float = traced(4.5, above=0)
    gamma: float = traced(0.0, at_least=0)
    weight_forget: float = traced(0.125, at_least=0)
    retain: Literal["nll", "kl", "none"] = "nll"
    weight_retain: float = traced(1.0, at_least=0)
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    said = retain.read(model, params, batch, retain=config.retain, weight=config.weight_retain)
    mean = losses.sequence_logprobs(said.rejected, said.forgotten, reduction="mean")
    values = config.weight_forget * simnpo(mean, beta=config.beta, gamma=config.gamma)
    shown = {"rewards/rejected": losses.masked_sum(config.beta * mean, batch.unsafe)}
    return said.terms | {"forget": losses.masked_sum(values, batch.unsafe)}, said.metrics | shown


def reference(model: Model, params: Params, batch: PreferenceBatch, config: Config) -> dict[str, Array]:
    """Returns what the model that tuning began with says of preferred answers; see :mod:`jaxsafety.training.retain`."""
    return retain.reference(model, params, batch)


def needs(config: Config) -> Needs:
    """See :class:`jaxsafety.types.Method`."""
    return Needs(unsafe=True, reference=config.retain == "kl")


METHOD = Method(Config, totals, needs=needs, reference=reference)
