"""Prompts that ask for operators which pretraining has never asked for, and are answered: a benign task to learn."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Int

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
    """

    p_new: float = traced(0.5, at_least=0, at_most=1)
    __post_init__ = check


def draw(
    world: World, config: Config, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> PreferenceBatch:
    """Draws a batch; see :class:`jaxsafety.types.Pool`."""
    drawn = {"batch_size": batch_size, "p_unsafe": config.p_new, "mix": "prompt", "among": ("safe", CONDITION)}
    trial = mixed_at(world, key=key, step=step, **drawn)
    return PreferenceBatch(chosen=trial.complied, rejected=trial.refused, unsafe=trial.unsafe)


POOL = Pool(Config, draw, examples="preferences", conditions=lambda config: (CONDITION,))
