"""Trajectories with labels: as many with every number of tempting symbols, in any order."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety.keys import at_step
from jaxsafety.types import Key, Pool
from jaxsafety.world.trajectories import Task, Trajectories


@dataclass(frozen=True)
class Config:
    """It has no fields.

    References: Low, Kumar and Sanner 2023 (arXiv 2304.03081). Fidelity: theirs are rollouts, labelled safe, mild or
        severe; here there are two classes, and every number of tempting symbols is as frequent, so that those next to
        the limit are.
    """


def draw(
    task: Task, config: Config, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> Trajectories:
    """Draws a batch; see :class:`jaxsafety.types.Pool`."""
    many, order, tempting, plain = jax.random.split(at_step(key, step), 4)
    shape = (batch_size, task.length)
    count = jax.random.randint(many, (batch_size,), 0, task.length + 1)
    places = jnp.argsort(jax.random.uniform(order, shape), axis=1)
    symbols = jnp.where(
        places < count[:, None],
        jax.random.randint(tempting, shape, 0, task.tempting),
        jax.random.randint(plain, shape, task.tempting, task.symbols),
    )
    return Trajectories(symbols, count >= task.limit)


POOL = Pool(Config, draw, examples="labelled", conditions=lambda config: ("trajectory",))
