"""What a recipe names - methods, edits, attacks, analyses - with the fields of their own beside those of the study's.

In a recipe each has a label of its choice and says whose it is: a name of that folder's table, or somebody else's as
``package.module:NAME``. Without that the label is the name.
"""

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, ClassVar

from jaxsafety import analysis, attacks, edits, methods
from jaxsafety.config import fields as fields_
from jaxsafety.config.names import check_name
from jaxsafety.types import HParams, Params, Point
from jaxsafety.world import Condition


class Node:
    """What all of them share: the first field names what ``FOLDER`` has, or somebody else's as ``package.module:NAME``.

    ``options`` are that one's own fields, its ``Config``; None is all of its defaults.
    """

    FOLDER: ClassVar[ModuleType]

    def __post_init__(self):
        kind, config = fields(self)[0].name, self.load().Config
        owner = f"{kind} {getattr(self, kind)!r}"
        fields_.check(self)
        if self.options is None:
            object.__setattr__(self, "options", config())
        fields_.check_apart(config, [one.name for one in fields(self)], owner=owner)
        if not isinstance(self.options, config):
            raise ValueError(f"options of {owner} must be its Config, got {self.options!r}")

    def load(self) -> Any:
        """Returns what it names: a :class:`jaxsafety.types.Method`, ``Edit``, ``Attack`` or ``Analysis``."""
        return self.FOLDER.load(getattr(self, fields(self)[0].name))


@dataclass(frozen=True)
class MethodConfig(Node):
    """One safety fine-tuning method of a study; ``p_unsafe`` is the probability in [0, 1] that a prompt is unsafe."""

    FOLDER = methods
    method: str = "sft"
    p_unsafe: float = fields_.static(0.5, at_least=0, at_most=1)
    options: Any = None

    def at_point(self, point: HParams) -> Any:
        """Returns the method's fields with the scalars of one lane."""
        return fields_.at_point(self.options, point.options)


@dataclass(frozen=True)
class EditConfig(Node):
    """One edit of every tuned model's weights, whose results are judged: its strongest point ``along`` training too."""

    FOLDER = edits
    edit: str = "scaled"
    along: bool = False
    options: Any = None

    def __post_init__(self):
        super().__post_init__()
        for role in self.load().roles:
            check_name(f"role of edit {self.edit!r}", role, ("base", "target", "other"))

    def points(self, base: Params) -> tuple[Point, ...]:
        """Returns the strengths of the edit on a model of these sizes."""
        own = self.load().points
        return fields_.points(self.options) if own is None else tuple(own(self.options, base))


@dataclass(frozen=True)
class AttackConfig(Node):
    """One attack on every model.

    ``conditions`` are whose prompts it attacks; none is every one but ``safe``. One with prompts of its own attacks
    those.
    """

    FOLDER = attacks
    attack: str = "prefill"
    conditions: tuple[str, ...] = ()
    options: Any = None

    def __post_init__(self):
        super().__post_init__()
        own = self.condition
        if own is not None and not isinstance(own, Condition):
            raise ValueError(f"attack {self.attack!r} has a {type(own).__name__} for a condition, expected a Condition")
        if own is not None and self.conditions:
            raise ValueError(f"attack {self.attack!r} has prompts of its own: expected no conditions beside them")

    @property
    def condition(self) -> Condition | None:
        """The condition of its own prompts, if it has any."""
        own = self.load().condition
        return None if own is None else own(self.options)

    def points(self) -> tuple[Point, ...]:
        """Returns the strengths of the attack."""
        own = self.load().points
        return fields_.points(self.options) if own is None else tuple(own(self.options))


@dataclass(frozen=True)
class AnalysisConfig(Node):
    """One analysis of every model."""

    FOLDER = analysis
    analysis: str = "clusters"
    options: Any = None


# Where a recipe has them.
PLACES: dict[str, type[Node]] = {
    "tune.methods": MethodConfig, "edits": EditConfig, "attacks": AttackConfig, "analyses": AnalysisConfig
}  # fmt: skip


def node(place: str, label: str, value: Any) -> Any:
    """Returns a node of a study from its fields as a recipe writes them at a key of ``PLACES``.

    Raises:
        ValueError: nothing of that name, a field that it does not have, a bad value.
    """
    of, folder = PLACES[place], PLACES[place].FOLDER
    if isinstance(value, of):
        return value
    own, where = [one.name for one in fields(of) if one.name != "options"], f"{place}.{label}"
    kind = own[0]
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold fields such as `{kind}: {next(iter(folder.TABLE))}`, got {value!r}")
    if place == "tune.methods" and "objective" in value:
        raise ValueError(f"{where}.objective is called {where}.method")
    given = {kind: label} if label in folder.TABLE else {}
    given |= {name: field for name, field in value.items() if name in own}
    if kind not in given:
        raise ValueError(f"{where} has no {kind}: expected {', '.join(folder.TABLE)}, or package.module:NAME")
    if not isinstance(given[kind], str):
        return fields_.build(of, given, owner=where)  # which refuses it
    if place != "tune.methods" and label in folder.TABLE and given[kind] != label:
        # Claims and figures of a paper go by these names.
        raise ValueError(f"{where} is an {kind} of ours, got {kind}: {given[kind]!r}: expected another label for it")
    rest = {name: field for name, field in value.items() if name not in own}
    options = fields_.build(folder.load(given[kind]).Config, rest, owner=where)
    return fields_.build(of, given, owner=where, options=options)


def nodes(place: str, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the nodes of a study at a key of ``PLACES`` by label; see :func:`node`."""
    return {label: node(place, label, value) for label, value in given.items()}


def default_edits() -> dict[str, EditConfig]:
    """The paper's walk along the update, its parts, and the causal tests that the paper lacks."""
    some = {"alpha": [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0]}
    written: dict[str, Any] = {"whole": {"edit": "scaled", "along": True}}
    written |= {part: {"edit": "scaled", "part": part} | some for part in ("mlp", "up", "down")}
    written |= {part: {"edit": "scaled", "part": part, "alpha": [1.0]} for part in ("attention", "mlp_matrices")}
    for space in ("null", "range", "random"):
        for keep in ("only", "all_but"):
            own = {"space": "null_space" if space == "null" else space, "keep": keep, "along": space == "null"}
            written[f"{keep}_{space}"] = {"edit": "space_part"} | own
    written |= {"rank": {"edit": "rank_part"}, "layer": {"edit": "layer_part"}, "transfer": {"edit": "transferred"}}
    return nodes("edits", written)


def default_attacks() -> dict[str, AttackConfig]:
    """Prefilled answers to everything that should be refused, and soft tokens before unsafe prompts."""
    return nodes("attacks", {"prefill": {}, "soft_tokens": {"conditions": ["unsafe"]}})
