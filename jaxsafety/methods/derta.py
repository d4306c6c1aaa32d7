"""Decoupled refusal training (DeRTa): to refuse wherever in a harmful answer, not only where it would begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsafety.config.fields import check, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_alike
from jaxsafety.training import answers
from jaxsafety.training.recovery import avertable, recovery
from jaxsafety.types import Batch, Key, Method, Model, Needs, Params, PreferenceBatch, Terms


@checked
def transition(chosen: Batch, rejected: Batch, *, aligned: bool) -> Batch:
    """Returns the dispreferred answers, in every place of which the target is how the preferred one would go on there.

    That is its first token or, of ``aligned`` answers, the one whose place it is; see
    :func:`jaxsafety.training.recovery.recovery`. What ends the dispreferred answer is not scored.

    References:
        Yuan et al. 2024 (arXiv 2407.09121), reinforced transition optimisation (RTO).

    Raises:
        ValueError: batches of different shapes.
    """
    check_alike(chosen=chosen, rejected=rejected)
    places, first = avertable(rejected), jnp.argmax(chosen.mask, axis=1)[:, None]
    turned = chosen.targets if aligned else jnp.take_along_axis(chosen.targets, first, axis=1)
    return chosen.replace(tokens=rejected.tokens, targets=jnp.where(places, turned, rejected.targets), mask=places)


@dataclass(frozen=True)
class Config:
    """Mean negative log-likelihood per scored token of safe answers, refusals behind prefixes, and transitions.

    With neither share it is SFT, so a grid of 0 and the default of each is the paper's ablation, and one program.

    Attributes:
        prefix: share in [0, 1] of the refusals that come after so many tokens of the harmful answer, 0 at least; the
            others come at once.
        rto: share in [0, 1] of unsafe prompts that are learned from by the transition at every token of their harmful
            answer instead.

    References:
        Yuan et al. 2024 (arXiv 2407.09121): maximum likelihood with a harmful response prefix, and RTO.

    Fidelity: to the data of their code, where the two terms have examples of their own, as many of one as of the other,
        and all scored tokens of a batch weigh the same: here a coin is tossed for every unsafe prompt. The depth is
        uniform over the tokens of the harmful answer, from 0 to one less than these, as in their formula (their code
        cuts at words, every third time at 0, which is a ``prefix`` of 2/3), and drawn anew at every step. What ends the
        harmful answer is none of its tokens, in either term, which in their code has a transition. The refusal's token
        is what the example's own refusal begins with. In the world, where a refusal fills a block of the answer's
        length, it goes on with what stands in that place; see :func:`jaxsafety.training.recovery.recovery`.
    """

    prefix: float = traced(1.0, at_least=0, at_most=1)
    rto: float = traced(0.5, at_least=0, at_most=1)
    __post_init__ = check


def data(batch: PreferenceBatch, *, key: Key, config: Config) -> PreferenceBatch:
    """See :class:`jaxsafety.types.Method`; what is learned takes the place of ``chosen``."""
    on_depth, on_prefix, on_rto = jax.random.split(key, 3)
    count, chosen, rejected = batch.unsafe.shape, batch.chosen, batch.rejected
    depth = jax.random.randint(on_depth, count, 0, jnp.sum(avertable(rejected), axis=1))
    late = batch.unsafe & jax.random.bernoulli(on_prefix, config.prefix, count)
    refused = recovery(chosen, rejected, depth=jnp.where(late, depth, 0), aligned=batch.aligned)
    turned = transition(chosen, rejected, aligned=batch.aligned)
    at_every = (batch.unsafe & jax.random.bernoulli(on_rto, config.rto, count))[:, None]
    return batch.replace(chosen=jax.tree.map(lambda a, b: jnp.where(at_every, a, b), turned, refused))


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    return answers.next_token(model, params, batch.chosen)


METHOD = Method(Config, totals, needs=lambda config: Needs(unsafe=True), data=data)
