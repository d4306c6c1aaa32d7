"""Gradient difference: ascent on harmful answers' likelihood of unsafe prompts, descent on what is to be kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Array, Bool, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.losses import Reduction
from jaxsafety.training import retain
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms

Weight = float | Float[Array, ""]


@checked
def ascent(
    logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"], *, bound: Weight, reduction: Reduction
) -> Float[Array, " b"]:
    """Returns minus the negative log-likelihood of every answer, in nats: what is minimised to forget it.

    Of its scored tokens that is the sum or the average (``mean``), each of them no farther than ``bound`` nats, as
    :func:`jaxsafety.losses.bounded` has it.

    References:
        Maini et al. 2024 (arXiv 2401.06121), gradient ascent.

    Example:
        >>> import jax.numpy as jnp
        >>> logprobs, mask = jnp.float32([[-1.0, -20.0, -3.0]]), jnp.array([[True, True, False]])
        >>> print(ascent(logprobs, mask, bound=10.0, reduction="mean"))
        [-5.5]
    """
    return losses.sequence_logprobs(losses.bounded(logprobs, bound=bound), mask, reduction=reduction)


@dataclass(frozen=True)
class Config:
    """Weighted sum of the forgetting, a mean over unsafe prompts, and of what is kept, a mean over tokens, in nats.

    Attributes:
        weight_forget: of the harmful answers' term.
        ascent_bound: nats per token beyond which the ascent stops pushing; ``.inf`` for the paper's unbounded one.
        retain: what is kept: ``nll``, the preferred answers of all prompts; ``kl``, all that the model that tuning
            began with says at safe prompts' answers; or ``none``.
        weight_retain: of its term.
        reduction: a harmful answer's NLL is averaged per token, or summed over its tokens (``sum``).

    References: Maini et al. 2024 (arXiv 2401.06121): gradient difference with ``nll``, KL minimisation with ``kl``,
        gradient ascent with ``none``. Fidelity: to the paper but for the bound, which is ours; all harmful answers
        weigh the same, where there all tokens of a batch do. The paper's kept examples are of a set of their own: here
        ``nll`` has refusals among them, as :mod:`jaxsafety.methods.unlearn` has, and ``kl`` has not.
    """

    weight_forget: float = traced(1.0, at_least=0)
    ascent_bound: float = traced(10.0, above=0, infinite=True)
    retain: Literal["nll", "kl", "none"] = "nll"
    weight_retain: float = traced(1.0, at_least=0)
    reduction: Literal["sum", "mean"] = "mean"
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    said = retain.read(model, params, batch, retain=config.retain, weight=config.weight_retain)
    values = ascent(said.rejected, said.forgotten, bound=config.ascent_bound, reduction=config.reduction)
    return said.terms | {"forget": losses.masked_sum(config.weight_forget * values, batch.unsafe)}, said.metrics


def reference(model: Model, params: Params, batch: PreferenceBatch, config: Config) -> dict[str, Array]:
    """Returns what the model that tuning began with says of preferred answers; see :mod:`jaxsafety.training.retain`."""
    return retain.reference(model, params, batch)


def needs(config: Config) -> Needs:
    """See :class:`jaxsafety.types.Method`."""
    return Needs(unsafe=True, reference=config.retain == "kl")


METHOD = Method(Config, totals, needs=needs, reference=reference)
