"""What a recipe names - methods, edits, attacks, analyses - with the fields of their own beside those of the study's.

In a recipe each has a label of its choice and says whose it is: a name of that folder's table, or somebody else's as
``package.module:NAME``. Without that the label is the name.
"""

from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

from jaxsafety import analysis, attacks, edits, methods
from jaxsafety.config import fields as fields_
from jaxsafety.types import Analysis, Attack, Edit, HParams, Method, Params, Point


def _check(node: Any) -> None:
    """Loads what a node names and gives it its options; assign it to ``__post_init__``."""
    kind, config = fields(node)[0].name, node.load().Config
    if node.options is None:
        object.__setattr__(node, "options", config())
    fields_.check_apart(config, [one.name for one in fields(node)], owner=f"{kind} {getattr(node, kind)!r}")
    if not isinstance(node.options, config):
        raise ValueError(f"options of {kind} {getattr(node, kind)!r} must be its Config, got {node.options!r}")


@dataclass(frozen=True)
class MethodConfig:
    """One safety fine-tuning method of a study.

    Attributes:
        method: a name of :data:`jaxsafety.methods.TABLE`, or somebody else's as ``package.module:NAME``.
        p_unsafe: probability in [0, 1] that a prompt is unsafe.
        options: the method's own fields, its ``Config``; None is all of its defaults.
    """

    method: str = "sft"
    p_unsafe: float = 0.5
    options: Any = None

    def __post_init__(self):
        _check(self)
        if not 0 <= self.p_unsafe <= 1:
            raise ValueError(f"p_unsafe of a method must be in [0, 1], got {self.p_unsafe}")

    def load(self) -> Method:
        """Returns the method."""
        return methods.load(self.method)

    def at_point(self, point: HParams) -> Any:
        """Returns the method's fields with the scalars of one lane."""
        return fields_.at_point(self.options, point.options)


@dataclass(frozen=True)
class EditConfig:
    """One edit of every tuned model's weights, whose results are judged.

    Attributes:
        edit: a name of :data:`jaxsafety.edits.TABLE`, or somebody else's as ``package.module:NAME``.
        along: whether its strongest point is made and judged along training, too.
        options: the edit's own fields, its ``Config``; None is all of its defaults.
    """

    edit: str = "scaled"
    along: bool = False
    options: Any = None
    __post_init__ = _check

    def load(self) -> Edit:
        """Returns the edit."""
        return edits.load(self.edit)

    def points(self, base: Params) -> tuple[Point, ...]:
        """Returns the strengths of the edit on a model of these sizes."""
        own = self.load().points
        return fields_.points(self.options) if own is None else tuple(own(self.options, base))


@dataclass(frozen=True)
class AttackConfig:
    """One attack on every model.

    Attributes:
        attack: a name of :data:`jaxsafety.attacks.TABLE`, or somebody else's as ``package.module:NAME``.
        conditions: whose prompts it attacks; none is every one but ``safe``. One with prompts of its own attacks those.
        options: the attack's own fields, its ``Config``; None is all of its defaults.
    """

    attack: str = "prefill"
    conditions: tuple[str, ...] = ()
    options: Any = None
    __post_init__ = _check

    def load(self) -> Attack:
        """Returns the attack."""
        return attacks.load(self.attack)

    def points(self) -> tuple[Point, ...]:
        """Returns the strengths of the attack."""
        own = self.load().points
        return fields_.points(self.options) if own is None else tuple(own(self.options))


@dataclass(frozen=True)
class AnalysisConfig:
    """One analysis of every model.

    Attributes:
        analysis: a name of :data:`jaxsafety.analysis.TABLE`, or somebody else's as ``package.module:NAME``.
        options: the analysis' own fields, its ``Config``; None is all of its defaults.
    """

    analysis: str = "clusters"
    options: Any = None
    __post_init__ = _check

    def load(self) -> Analysis:
        """Returns the analysis."""
        return analysis.load(self.analysis)


Node = MethodConfig | EditConfig | AttackConfig | AnalysisConfig
# Where a recipe has them, and in what folder ours are.
PLACES: dict[str, tuple[type[Node], ModuleType]] = {
    "tune.methods": (MethodConfig, methods),
    "edits": (EditConfig, edits),
    "attacks": (AttackConfig, attacks),
    "analyses": (AnalysisConfig, analysis),
}


def node(place: str, label: str, value: Any) -> Any:
    """Returns a node of a study from its fields as a recipe writes them at a key of ``PLACES``.

    Raises:
        ValueError: nothing of that name, a field that it does not have, a bad value.
    """
    of, folder = PLACES[place]
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
    made = fields_.build(of, given, owner=where)
    rest = {name: field for name, field in value.items() if name not in own}
    return replace(made, options=fields_.build(made.load().Config, rest, owner=where))


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
