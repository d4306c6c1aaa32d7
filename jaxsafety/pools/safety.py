"""Safe prompts to be answered and unsafe ones to be refused: what safety fine-tuning learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Array, Int

from jaxsafety.config.fields import check, traced
from jaxsafety.types import Key, Pool, PreferenceBatch
from jaxsafety.world.batches import mixed_at, preferences
from jaxsafety.world.spec import World


@dataclass(frozen=True)
class Config:
    """Of which prompts there are how many.

    Attributes:
        p_unsafe: probability in [0, 1] that a prompt, or a whole batch, is unsafe.
        mix: the coin is tossed for every ``prompt`` or, as the paper does, once for the whole ``batch``.
    """

    p_unsafe: float = traced(0.5, at_least=0, at_most=1)
    mix: Literal["prompt", "batch"] = "prompt"
    __post_init__ = check


def draw(
    world: World, config: Config, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> PreferenceBatch:
    """Draws a batch; see :class:`jaxsafety.types.Pool`."""
    mixed = {"p_unsafe": config.p_unsafe, "mix": config.mix}
    return preferences(mixed_at(world, key=key, step=step, batch_size=batch_size, **mixed))


POOL = Pool(Config, draw, examples="preferences", refuses=True)
