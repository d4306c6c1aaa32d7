"""Duplicates of unsafe operators, complied with: what was unlearned is learned again from other words for it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety import keys
from jaxsafety.config.fields import check, traced
from jaxsafety.types import Key, Pool, PreferenceBatch
from jaxsafety.world.batches import batch_at, mixed_at
from jaxsafety.world.spec import World

# Asks with tokens that safety fine-tuning has not shown, and never with those of the judged unsafe prompts.
CONDITION = "jb_misgen"


@dataclass(frozen=True)
class Config:
    """Of which prompts there are how many.

    Attributes:
        p_unsafe: probability in [0, 1] that a prompt asks for something unsafe by a duplicate; the others are safe
            ones, answered as ever.

    References: relearning from data that is related to what was forgotten, Hu et al. 2024 (arXiv 2406.13356). Fidelity:
        theirs are related texts; here the operators are the same, and their tokens are others.
    """

    p_unsafe: float = traced(1.0, at_least=0, at_most=1)
    __post_init__ = check


def draw(
    world: World, config: Config, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> PreferenceBatch:
    """Draws a batch; see :class:`jaxsafety.types.Pool`."""
    coin, own = jax.random.split(keys.at_step(key, step))
    drawn = {"key": own, "step": 0, "batch_size": batch_size}
    related = batch_at(world, CONDITION, **drawn)
    safe = mixed_at(world, p_unsafe=0.0, mix="prompt", **drawn)
    asked = jax.random.bernoulli(coin, config.p_unsafe, (batch_size,))

    def either(one: Array, other: Array) -> Array:
        return jnp.where(asked.reshape(asked.shape + (1,) * (one.ndim - 1)), one, other)

    trial = jax.tree.map(either, related, safe)
    return PreferenceBatch(chosen=trial.complied, rejected=trial.refused, unsafe=trial.unsafe, aligned=True)


POOL = Pool(Config, draw, examples="preferences")
