"""One model of a study at one point of its values, with where it stands in the graph."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from jaxsafety.config.names import check_name
from jaxsafety.recipe.models import Edited, How, Reused, Selected, Training

# What a lane's ancestors are called, whatever their names.
PARENT, ROOT = "parent", "root"


@dataclass(frozen=True, eq=False)
class Lane:
    """One model of a study at one point of its values; all its seeds.

    Attributes:
        label: the model's name in the recipe.
        words: by field, what tells it from the other lanes of that model, such as ``{"lr": "eta_M"}``; ``from`` is
            one of the fields.
        parent: the lane that it begins with; None for one that begins with fresh parameters, or is reused without.
        how: how it comes about, every field with its value.
        others: by role, the lanes that it goes by beside its parent: those of an edit, the candidates of a selection.
    """

    label: str
    words: Mapping[str, str]
    parent: "Lane | None"
    how: How
    others: Mapping[str, "Lane"]

    @property
    def point(self) -> str:
        """What tells it from the other lanes of its model, such as ``from=sft.eta_M.steps=10``; empty if none are."""
        return ".".join(word for word in self.words.values() if word)

    @cached_property
    def name(self) -> str:
        """Its name among all lanes, a plain file name."""
        return f"{self.label}.{self.point}" if self.point else self.label

    def is_among(self, names: Collection[str]) -> bool:
        """Whether it is one of those that models or lanes of these names are; no names are all."""
        return not names or self.label in names or self.name in names

    @cached_property
    def ancestors(self) -> tuple["Lane", ...]:
        """The lanes before it, the nearest first."""
        return () if self.parent is None else (self.parent, *self.parent.ancestors)

    @property
    def root(self) -> "Lane":
        """Its first ancestor, or itself."""
        return (self, *self.ancestors)[-1]

    @cached_property
    def generation(self) -> int:
        """How many trainings came before its own: models of one generation see the same examples.

        An edit is none, and a selection is of the generation of its candidates.
        """
        if isinstance(self.how, Reused) and self.parent is None:
            return self.how.generation
        if isinstance(self.how, Selected):
            return max(lane.generation for lane in self.others.values())
        before = -1 if self.parent is None else self.parent.generation
        return before if isinstance(self.how, Edited) else before + 1

    @cached_property
    def level(self) -> int:
        """How many lanes have to be there before it, one after the other."""
        needed = (*self.others.values(), *filter(None, (self.parent, self.reference)))
        return 1 + max((lane.level for lane in needed), default=-1)

    @property
    def stage(self) -> Literal["pretrain", "tune"]:
        """The stage that makes it."""
        return "pretrain" if self.parent is None else "tune"

    @property
    def training(self) -> Training | None:
        """How it is trained; None where it is not."""
        return self.how if isinstance(self.how, Training) else None

    @property
    def steps(self) -> int:
        """Steps of its training, 0 without one."""
        return 0 if self.training is None else self.training.steps

    @property
    def lr(self) -> float:
        """Peak learning rate of its training, 0 without one."""
        return 0.0 if self.training is None else self.training.lr

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Steps after which parameters on the way are kept."""
        return () if self.training is None else self.training.snapshot_steps

    @property
    def trees(self) -> dict[str, "Lane"]:
        """By role, the lanes that what is trained of it is joined with; none where all parameters are trained."""
        if self.training is None or self.parent is None or self.training.parametrisation.kind == "full":
            return {}
        options, roles = self.training.parametrisation.options, self.training.parametrisation.load().roles
        return {"parent": self.parent} | {role: self.ancestor(getattr(options, role)) for role in roles}

    @property
    def reference(self) -> "Lane | None":
        """What its method compares it with; None for a method that asks for nothing."""
        if self.training is None or not self.training.asks_reference:
            return None
        return self.ancestor(self.training.reference)

    def ancestor(self, name: str) -> "Lane":
        """Returns the ancestor that a name stands for: ``parent``, ``root``, or the nearest one of that model.

        Raises:
            ValueError: there is none.
        """
        by_name = {lane.label: lane for lane in reversed(self.ancestors)}
        if self.parent is not None:
            by_name |= {PARENT: self.parent, ROOT: self.root}
        check_name(f"ancestor of {self.name}", name, by_name)
        return by_name[name]
