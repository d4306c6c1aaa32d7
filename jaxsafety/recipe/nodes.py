"""What a recipe names - edits, attacks, analyses, and what models are made by - with their own fields beside it.

In a recipe each has a label of its choice and says whose it is: a name of that folder's table, or somebody else's as
``package.module:NAME``. Without that the label is the name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

from jaxsafety import analysis, attacks, edits, subjects
from jaxsafety.config import fields as fields_
from jaxsafety.config.names import closest, nearest
from jaxsafety.config.told import told_of
from jaxsafety.types import Params, Point
from jaxsafety.world import Condition

# Names of earlier versions.
_GONE = {"learning_rate": "lr", "learning_rates": "lr", "mixture": "data", "objective": "method"}


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
        """Returns what it names: one of the records of :mod:`jaxsafety.types`."""
        return self.FOLDER.load(getattr(self, fields(self)[0].name))


@dataclass(frozen=True)
class EditConfig(Node):
    """One edit of every tuned model's weights, whose results are judged: its strongest point ``along`` training too.

    ``on`` are the names of the models, or of single lanes of them (``sft.eta_M``), that it is made of; none is all. One
    whose ``role`` is an ``attack`` has a place among the attacks of the robustness matrix.
    """

    FOLDER = edits
    edit: str = "scaled"
    along: bool = False
    on: tuple[str, ...] = ()
    role: Literal["edit", "attack"] = "edit"
    options: Any = None

    def __post_init__(self):
        super().__post_init__()
        known = ("base", "target", "other")
        if role := next((role for role in self.load().roles if role not in known), None):
            raise ValueError(
                f"edit {self.edit!r} takes a model as {role!r}, expected {', '.join(known)} alone: give the edited "
                "model a name below `models`"
            )

    def points(self, base: Params) -> tuple[Point, ...]:
        """Returns the strengths of the edit on a model of these sizes."""
        own = self.load().points
        return fields_.points(self.options) if own is None else tuple(own(self.options, base))


@dataclass(frozen=True)
class AttackConfig(Node):
    """One attack on every model.

    ``conditions`` are whose prompts it attacks; none is every one but ``safe``, of which it shows, where it is named,
    what the attack costs. One with prompts of its own attacks those. ``on`` are the names of the models, or of single
    lanes, that are attacked; none is all.
    """

    FOLDER = attacks
    attack: str = "prefill"
    on: tuple[str, ...] = ()
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
    """One analysis of every model, or of those whose names, or lanes' names, are ``on``."""

    FOLDER = analysis
    analysis: str = "clusters"
    on: tuple[str, ...] = ()
    options: Any = None


@dataclass(frozen=True)
class SubjectConfig(Node):
    """What a study is about; without ``kind`` one of its fields has the name of one of ours."""

    FOLDER = subjects
    kind: str = "world"
    options: Any = None

    @property
    def of_files(self) -> bool:
        """Whether models are files, each worked on by itself, as checkpoints are."""
        return self.load().open is None


# Where a recipe has them by label.
PLACES: dict[str, type[Node]] = {"edits": EditConfig, "attacks": AttackConfig, "analyses": AnalysisConfig}


def known(folder: ModuleType) -> dict[str, str]:
    """Returns all that have a name in a folder, with their modules."""
    return folder.TABLE | getattr(folder, "OF_CHECKPOINTS", {})


def made(of: type[Node], value: Any, *, owner: str, kind: str | None = None, below: Sequence[str] = ()) -> Any:
    """Returns a node from its fields as a recipe writes them; ``kind`` is what it is where they do not say.

    ``owner`` is whose fields they are, for messages, and ``below`` what else may be looked for among them.

    Raises:
        ValueError: nothing of that name, a field that it does not have, a bad value.
    """
    folder, own = of.FOLDER, [one.name for one in fields(of) if one.name != "options"]
    first = own[0]
    if not isinstance(value, dict):
        raise ValueError(f"{owner} must hold fields such as `{first}: {next(iter(folder.TABLE))}`, got {value!r}")
    given = ({first: kind} if kind else {}) | {name: one for name, one in value.items() if name in own}
    if first not in given:
        meant = nearest(owner.rpartition(".")[2], known(folder)) or _meant(value, [*own, *below])
        raise ValueError(f"{owner} has no {first}: expected {', '.join(known(folder))}, or package.module:NAME{meant}")
    if not isinstance(given[first], str):
        return fields_.build(of, given, owner=owner)  # which refuses it
    with told_of(owner):
        hints, config = fields_.hints_of(of), folder.load(given[first]).Config
    rest = {name: one for name, one in value.items() if name not in own}
    has = [one.name for one in fields(config)] if is_dataclass(config) else []
    # What is looked for below a section is known by its last part.
    places = {one.rpartition(".")[2]: one for one in (*own, *below)}
    for name in [one for one in rest if one not in has]:
        close = closest(name, [*has, *places])
        if name in _GONE:
            raise ValueError(f"{owner} has no field {name!r}: it is called {_GONE[name]!r}")
        if close in places:
            raise ValueError(f"{owner} has no field {name!r}; did you mean {places[close]!r}?")
        if not has:
            raise ValueError(f"{owner} has no field {name!r}: it has {', '.join(own)}")
    options = fields_.build(config, rest, owner=owner)
    inner = {name: _inner(hints[name], given.pop(name), f"{owner}.{name}") for name in own[1:]
             if name in given and is_dataclass(hints[name])}  # fmt: skip
    return fields_.build(of, given, owner=owner, options=options, **inner)


def _meant(given: Iterable[Any], names: Sequence[str]) -> str:
    """The name that one of those given looks most like without being one, as the end of a sentence."""
    found = ((name, closest(name, names)) for name in given if name not in names)
    return next((f"; did you mean {close!r} by {name!r}?" for name, close in found if close), "")


def _first(of: type) -> str:
    """A field of a section's as a recipe writes it."""
    one = fields(of)[0]
    return f"{one.name}: {one.default}"


def _inner(of: type, value: Any, owner: str) -> Any:
    """A section of a node's: another node, or plain fields."""
    if isinstance(value, of):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{owner} must hold fields such as `{_first(of)}`, got {value!r}")
    return made(of, value, owner=owner) if issubclass(of, Node) else fields_.build(of, value, owner=owner)


def node(place: str, label: str, value: Any) -> Any:
    """Returns a node of a study from its fields as a recipe writes them at a key of ``PLACES``; see :func:`made`."""
    of, folder = PLACES[place], PLACES[place].FOLDER
    if isinstance(value, of):
        return value
    own, where = label if label in known(folder) else None, f"{place}.{label}"
    found = made(of, value, owner=where, kind=own)
    kind = fields(of)[0].name
    if own and getattr(found, kind) != label:
        # Claims and figures of a paper go by these names.
        raise ValueError(
            f"{where} is an {kind} of ours, got {kind}: {getattr(found, kind)!r}: expected another label for it"
        )
    return found


def nodes(place: str, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the nodes of a study at a key of ``PLACES`` by label; see :func:`node`."""
    return {label: node(place, label, value) for label, value in given.items()}


def subject(value: Any) -> SubjectConfig:
    """Returns the subject from its fields as a recipe writes them; see :func:`made`."""
    if isinstance(value, SubjectConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"subject must hold fields such as `world: tiny`, got {value!r}")
    kind = next((name for name in subjects.TABLE if name in value), None)
    if kind is None and "kind" not in value:
        hint = next(filter(None, (nearest(name, [*subjects.TABLE, "kind"]) for name in value)), "")
        raise ValueError(
            f"subject must have the field {' or '.join(subjects.TABLE)}, or `kind: package.module:SUBJECT` for one of "
            f"your own, got {', '.join(map(str, value)) or 'none'}{hint}"
        )
    return made(SubjectConfig, value, owner="subject", kind=kind)


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
