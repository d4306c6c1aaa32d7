"""JB-MisGen in other readings than the condition ``jb_misgen``: prompts of their own, judged as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxsafety.config.fields import check
from jaxsafety.types import Attack, Attacked, Key, Point, Section, Target
from jaxsafety.world.conditions import CONDITIONS, Condition


@dataclass(frozen=True)
class Config:
    """Which prompts.

    Attributes:
        reading: ``drawn``, the pool of duplicates as it is defined, some of whose prompts ask nothing unsafe (3 in 32
            of the paper's; ``jb_misgen`` draws these again); or ``released``, what the released generator writes, whose
            flag for that pool has no effect: ordinary safe operators on the same texts, to be complied with.

    References: Jain et al. 2024 (arXiv 2407.10264), appendix on jailbreaks by mismatched generalisation.
    Fidelity: what was published may be of either; that is not known.
    """

    reading: Literal["drawn", "released"] = "drawn"
    __post_init__ = check


def condition(config: Config) -> Condition:
    """Returns the condition of the prompts, on the texts of ``jb_misgen``."""
    kind = "duplicates_drawn" if config.reading == "drawn" else "safe"
    return Condition(texts=CONDITIONS["jb_misgen"].texts, tasks=kind)


def attack(target: Target, config: Config, *, point: Point, key: Key) -> Attacked:
    """See :class:`jaxsafety.types.Attack`; the prompts are all of it."""
    return Attacked()


SECTION = Section(
    "JB-MisGen in another reading",
    "Fig. 2 (d)",
    "Beside the table's JB-MisGen, whose prompts all ask something unsafe: of the pool as it is drawn some do not, and "
    "of that which the released generator writes none does, so that complying there is no success of an attack.",
)
ATTACK = Attack(Config, attack, condition=condition, section=SECTION)
