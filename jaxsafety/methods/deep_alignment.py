"""Deep safety alignment: refusals are learned behind the first tokens of harmful answers as well."""

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
from jaxsafety.training.recovery import avertable, recovery
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms


@checked
def deep_alignment(
    logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"], unsafe: Bool[Array, " b"], *,
    alpha: float | Float[Array, ""],
) -> Terms:  # fmt: skip
    """Returns ``alpha`` x the negative log-likelihood of unsafe prompts' answers, 1 - ``alpha`` x that of safe ones'.

    Each is a sum over scored tokens, in nats, and their number; ``alpha`` lies in [0, 1].

    References:
        Qi et al. 2024 (arXiv 2406.05946), the data augmentation objective of section 3.
    """
    safety, utility = (losses.nll(logprobs, mask & kind[:, None]) for kind in (unsafe, ~unsafe))
    return {"safety": (alpha * safety[0], safety[1]), "utility": ((1 - alpha) * utility[0], utility[1])}


@dataclass(frozen=True)
class Config:
    """Weighted sum of the means over the scored tokens of refusals and of safe answers, in nats.

    Attributes:
        alpha: weight in [0, 1] of the refusals; safe answers have the rest.
        prefix: probability in [0, 1] that a refusal comes behind the first tokens of the harmful answer.
        depth: at most so many of these tokens, and fewer than the answer has; their number is uniform, 1 at least.

    References:
        Qi et al. 2024 (arXiv 2406.05946), section 3.

    Fidelity: to the paper, whose code has no ``alpha`` but 4 unsafe examples beside 16 safe ones, all tokens of which
        weigh the same. What ends the harmful answer is not given, nor its last token before; in their code it may be.
        In the world a refusal goes on with what stands in that place; see :func:`jaxsafety.training.recovery.recovery`.
        The constrained objective of section 4 is :mod:`jaxsafety.methods.constrained_sft`.
    """

    alpha: float = traced(0.2, at_least=0, at_most=1)
    prefix: float = traced(0.5, at_least=0, at_most=1)
    depth: int = traced(100, at_least=1)
    __post_init__ = check


def data(batch: PreferenceBatch, *, key: Key, config: Config) -> PreferenceBatch:
    """See :class:`jaxsafety.types.Method`; what is learned takes the place of ``chosen``."""
    on_depth, on_prefix = jax.random.split(key)
    count, chosen, rejected = batch.unsafe.shape, batch.chosen, batch.rejected
    most = jnp.minimum(jnp.sum(avertable(rejected), axis=1) - 1, jnp.int32(config.depth))
    depth = jax.random.randint(on_depth, count, 1, most + 1)
    late = batch.unsafe & (most > 0) & jax.random.bernoulli(on_prefix, config.prefix, count)
    refused = recovery(chosen, rejected, depth=jnp.where(late, depth, 0), aligned=batch.aligned)
    return batch.replace(chosen=refused)


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    logprobs, metrics = answers.side_logprobs(model, params, batch.chosen)
    return deep_alignment(logprobs, batch.chosen.mask, batch.unsafe, alpha=config.alpha), metrics


METHOD = Method(Config, totals, needs=lambda config: Needs(unsafe=True), data=data)
