"""A pool that the package does not know, as somebody would write it: safe prompts alone, answered or refused."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxsafety.config.fields import check, traced
from jaxsafety.keys import at_step
from jaxsafety.types import Pool, PreferenceBatch
from jaxsafety.world import batch_at


@dataclass(frozen=True)
class Config:
    """How often to refuse.

    Attributes:
        over_refused: probability in [0, 1] that the preferred answer to a safe prompt is the refusal.
    """

    over_refused: float = traced(0.5, at_least=0, at_most=1)
    __post_init__ = check


def draw(world, config, *, key, step, total_steps, batch_size):
    trial = batch_at(world, "safe", key=key, step=step, batch_size=batch_size)
    refuse = jax.random.bernoulli(at_step(key, step), config.over_refused, (batch_size,))

    def where(a, b):
        return jnp.where(refuse.reshape(refuse.shape + (1,) * (a.ndim - 1)), a, b)

    return PreferenceBatch(
        chosen=jax.tree.map(where, trial.refused, trial.complied),
        rejected=jax.tree.map(where, trial.complied, trial.refused),
        unsafe=trial.unsafe,
    )


POOL = Pool(Config, draw)
