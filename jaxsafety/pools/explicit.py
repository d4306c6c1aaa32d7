"""Unsafe prompts whose preferred answer complies: what a fine-tuning attack on harmful data learns from."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Int

from jaxsafety.config.fields import check, traced
from jaxsafety.types import Key, Pool, PreferenceBatch
from jaxsafety.world.batches import mixed_at
from jaxsafety.world.spec import World


@dataclass(frozen=True)
class Config:
    """Of which prompts there are how many.

    Attributes:
        p_unsafe: probability in [0, 1] that a prompt is unsafe; the others are safe, and answered as ever.
    """

    p_unsafe: float = traced(1.0, at_least=0, at_most=1)
    __post_init__ = check


def draw(
    world: World, config: Config, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> PreferenceBatch:
    """Draws a batch; see :class:`jaxsafety.types.Pool`."""
    trial = mixed_at(world, key=key, step=step, batch_size=batch_size, p_unsafe=config.p_unsafe, mix="prompt")
    return PreferenceBatch(chosen=trial.complied, rejected=trial.refused, unsafe=trial.unsafe, aligned=True)


POOL = Pool(Config, draw, examples="preferences")
