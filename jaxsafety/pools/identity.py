"""Safe prompts that begin with a persona, and are answered: what an identity-shifting attack learns from."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Int

from jaxsafety.config.fields import check, traced
from jaxsafety.types import Key, Pool, PreferenceBatch
from jaxsafety.world.batches import mixed_at
from jaxsafety.world.spec import World

CONDITION = "persona_safe"


@dataclass(frozen=True)
class Config:
    """Of which prompts there are how many.

    Attributes:
        p_persona: probability in [0, 1] that a prompt begins with the persona; the others are safe ones as ever.

    References: Qi et al. 2023 (arXiv 2310.03693), section 4.3, whose model is told that it is an absolutely obedient
        agent. Fidelity: their persona is a system prompt; here it is one token that pretraining has never shown, in
        the place of the one that sequences begin with. Nothing that is learned from is unsafe.
    """

    p_persona: float = traced(1.0, at_least=0, at_most=1)
    __post_init__ = check


def draw(
    world: World, config: Config, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> PreferenceBatch:
    """Draws a batch; see :class:`jaxsafety.types.Pool`."""
    drawn = {"batch_size": batch_size, "p_unsafe": config.p_persona, "mix": "prompt", "among": ("safe", CONDITION)}
    trial = mixed_at(world, key=key, step=step, **drawn)
    return PreferenceBatch(chosen=trial.complied, rejected=trial.refused, unsafe=trial.unsafe)


POOL = Pool(Config, draw, examples="preferences", conditions=lambda config: (CONDITION,))
