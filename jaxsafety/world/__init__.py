"""The synthetic world: grammars, operators, prompts by condition, batches as pure draws.

``load("tiny")`` builds a world; ``batch_at(world, "jb_misgen", key=key, step=0, batch_size=32)`` draws from it.
"""

from jaxsafety.world.batches import batch_at, mixed_at, preferences
from jaxsafety.world.conditions import CONDITIONS, Condition
from jaxsafety.world.loading import load
from jaxsafety.world.spec import World

__all__ = ["CONDITIONS", "Condition", "World", "batch_at", "load", "mixed_at", "preferences"]
