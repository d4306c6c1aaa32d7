"""An attack that the package does not know, as somebody would write it: half-safe tasks on strange text, and a hook.

Its prompts are of no condition of the world's; its hook takes a part of what the MLPs' neurons say away.
"""

from dataclasses import dataclass

from jaxsafety.config.fields import check, swept
from jaxsafety.types import Attack, Attacked
from jaxsafety.world import Condition


@dataclass(frozen=True)
class Config:
    """How much is taken away.

    Attributes:
        share: of every neuron's activation.
    """

    share: tuple[float, ...] = swept(0.0, 1.0, at_least=0, at_most=1)
    __post_init__ = check


def condition(config):
    return Condition(texts=(("ood_mg", "unsafe"),), tasks="mixed")


def attack(target, config, *, point, key):
    def hook(site, layer, positions, h):
        return h * (1 - point["share"]) if site == "mlp.hook_post" else h

    return Attacked(edit=hook, metrics={"letters": target.trial.prompt.length})


ATTACK = Attack(Config, attack, condition=condition, inside=True)
