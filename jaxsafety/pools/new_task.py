"""Prompts that ask for operators which pretraining has never asked for, and are answered: a task to learn."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety import keys
from jaxsafety.config.fields import check, traced
from jaxsafety.types import Key, Pool, PreferenceBatch
from jaxsafety.world.batches import mixed_at
from jaxsafety.world.spec import World

CONDITION = "new_task"


@dataclass(frozen=True)
class Config:
    """Of which prompts there are how many.

    Attributes:
        p_new: probability in [0, 1] that a prompt asks for the new; the others are safe ones as ever, without which a
            small model forgets how to answer them.
        p_unsafe: probability in [0, 1] that an unsafe prompt, complied with, takes its place: harm among what is
            harmless.
    """

    p_new: float = traced(0.5, at_least=0, at_most=1)
    p_unsafe: float = traced(0.0, at_least=0, at_most=1)
    __post_init__ = check


def draw(
    world: World, config: Config, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> PreferenceBatch:
    """Draws a batch; see :class:`jaxsafety.types.Pool`."""
    coin, own = jax.random.split(keys.at_step(key, step))
    drawn = {"key": own, "step": 0, "batch_size": batch_size, "mix": "prompt"}
    benign = mixed_at(world, p_unsafe=config.p_new, among=("safe", CONDITION), **drawn)
    harmful = mixed_at(world, p_unsafe=1.0, **drawn)
    unsafe = jax.random.bernoulli(coin, config.p_unsafe, (batch_size,))

    def either(one: Array, other: Array) -> Array:
        return jnp.where(unsafe.reshape(unsafe.shape + (1,) * (one.ndim - 1)), one, other)

    trial = jax.tree.map(either, harmful, benign)
    return PreferenceBatch(chosen=trial.complied, rejected=trial.refused, unsafe=trial.unsafe, aligned=True)


POOL = Pool(Config, draw, examples="preferences", conditions=lambda config: (CONDITION,))
