"""What a recipe names - methods, pools, edits, attacks, analyses - with their own fields beside those of the study's.

In a recipe each has a label of its choice and says whose it is: a name of that folder's table, or somebody else's as
``package.module:NAME``. Without that the label is the name.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field, fields, is_dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal, get_type_hints

from jaxsafety import analysis, attacks, edits, methods, pools
from jaxsafety.config import fields as fields_
from jaxsafety.config.names import check_name, nearest
from jaxsafety.training.optim import OptimConfig
from jaxsafety.types import HParams, Needs, Params, Point
from jaxsafety.world import Condition

# Of what a method may learn from, the pool unless a recipe says otherwise.
_POOLS = {"preferences": "safety", "text": "text"}


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
class Data(Node):
    """The examples of a training: of a pool's, ``prompts`` different ones in turn, or new ones at every step.

    ``prompts`` is traced where there is a number of them: every number is the same program.
    """

    FOLDER = pools
    pool: str = "safety"
    # Positions in the stream are products of two of them, in int32.
    prompts: int | None = fields_.static(None, at_least=1, at_most=2**15)
    options: Any = None

    def at_point(self, point: HParams) -> Any:
        """Returns the pool's fields with the scalars of one lane."""
        own = fields_.traced_names(self.options)
        return fields_.at_point(self.options, {name: point.data[name] for name in own})


@dataclass(frozen=True)
class Training(Node):
    """How one model is trained.

    Attributes:
        method: a name of :data:`jaxsafety.methods.TABLE`, or somebody else's as ``package.module:NAME``.
        steps: optimiser steps.
        batch_size: examples a step, per seed.
        lr: peak learning rate.
        chunk_steps: steps per dispatch; metrics are averaged and a checkpoint written at each chunk's end.
        snapshots: how many log-spaced moments between the first and the last step to keep the parameters of, for the
            analyses along training; fewer where the run is too short to tell them apart.
        reference: whose likelihoods a method asks that compares with a reference: the model that training begins with
            (``parent``), the first of its ancestors (``root``), or the nearest one of that name.
        role: what it is in the study: a ``defence``, an ``attack``, or a ``model`` like any.
        data: see :class:`Data`.
        optim: optimiser and schedule.
        options: the method's own fields.
    """

    FOLDER = methods
    method: str = "sft"
    steps: int = fields_.static(200, above=0)
    batch_size: int = fields_.static(64, above=0)
    lr: float = fields_.traced(1e-3, above=0)
    chunk_steps: int = fields_.static(50, above=0)
    snapshots: int = fields_.static(0, at_least=0)
    reference: str = "parent"
    role: Literal["model", "defence", "attack"] = "model"
    data: Data = field(default_factory=Data)
    optim: OptimConfig = field(default_factory=OptimConfig)
    options: Any = None

    def __post_init__(self):
        super().__post_init__()
        wanted, there = self.load().examples, self.data.load().examples
        if wanted != there:
            raise ValueError(
                f"data.pool: got {self.data.pool!r}, which has {there}, expected a pool of {wanted}, which method "
                f"{self.method!r} learns from"
            )

    @property
    def needs(self) -> Needs:
        """What its method asks for."""
        return self.load().needs(self.options)

    def at_point(self, point: HParams) -> Any:
        """Returns the method's fields with the scalars of one lane."""
        return fields_.at_point(self.options, point.options)

    @property
    def scalars(self) -> dict[str, dict[str, float | int]]:
        """What is traced of it: a lane's own scalars of the method and of its examples, by name."""
        data = {name: getattr(self.data.options, name) for name in fields_.traced_names(self.data.options)}
        if self.data.prompts is not None:
            data["prompts"] = self.data.prompts
        own = {name: getattr(self.options, name) for name in fields_.traced_names(self.options)}
        return {"options": own, "data": data}

    @property
    def program(self) -> Hashable:
        """What two trainings must have in common for one compiled program to do both: all but the traced scalars."""
        sizes = (self.steps, self.batch_size, self.chunk_steps, self.snapshots)
        own = (self.method, fields_.program(self.options), self.optim)
        data = (self.data.pool, fields_.program(self.data.options), self.data.prompts is None)
        return (*sizes, *own, *data)

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Steps of the snapshots: ``steps ** (i / (snapshots + 1))``, rounded, distinct and before the last step."""
        exponents = (i / (self.snapshots + 1) for i in range(1, self.snapshots + 1))
        return tuple(sorted({round(self.steps**exponent) for exponent in exponents} - {self.steps}))


@dataclass(frozen=True)
class EditConfig(Node):
    """One edit of every tuned model's weights, whose results are judged: its strongest point ``along`` training too.

    ``on`` are the names of the models that it is made of; none is all.
    """

    FOLDER = edits
    edit: str = "scaled"
    along: bool = False
    on: tuple[str, ...] = ()
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
    those. ``on`` are the names of the models that are attacked; none is all.
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
    """One analysis of every model, or of those whose names are ``on``."""

    FOLDER = analysis
    analysis: str = "clusters"
    on: tuple[str, ...] = ()
    options: Any = None


# Where a recipe has them by label.
PLACES: dict[str, type[Node]] = {"edits": EditConfig, "attacks": AttackConfig, "analyses": AnalysisConfig}


def made(of: type[Node], value: Any, *, owner: str, kind: str | None = None) -> Any:
    """Returns a node from its fields as a recipe writes them; ``kind`` is what it is where they do not say.

    ``owner`` is whose fields they are, for messages.

    Raises:
        ValueError: nothing of that name, a field that it does not have, a bad value.
    """
    folder, own = of.FOLDER, [one.name for one in fields(of) if one.name != "options"]
    first = own[0]
    if not isinstance(value, dict):
        raise ValueError(f"{owner} must hold fields such as `{first}: {next(iter(folder.TABLE))}`, got {value!r}")
    given = ({first: kind} if kind else {}) | {name: one for name, one in value.items() if name in own}
    if first not in given:
        raise ValueError(f"{owner} has no {first}: expected {', '.join(folder.TABLE)}, or package.module:NAME")
    if not isinstance(given[first], str):
        return fields_.build(of, given, owner=owner)  # which refuses it
    try:
        hints, config = get_type_hints(of), folder.load(given[first]).Config
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error
    rest = {name: one for name, one in value.items() if name not in own}
    known = [one.name for one in fields(config)] if is_dataclass(config) else []
    for name in rest:
        if name not in known and (hint := nearest(name, [*own, *_below(of)])):
            raise ValueError(f"{owner} has no field {name!r}{hint}")
    options = fields_.build(config, rest, owner=owner)
    if of is Training:
        given["data"] = _fitting(given.get("data", {}), given[first])
    inner = {name: _inner(hints[name], given.pop(name), f"{owner}.{name}") for name in own[1:]
             if name in given and is_dataclass(hints[name])}  # fmt: skip
    return fields_.build(of, given, owner=owner, options=options, **inner)


def _below(of: type[Node]) -> list[str]:
    """What may be looked for beside a training's fields and lies below them."""
    return [f"data.{name}" for name in ("p_unsafe", "mix", "prompts", "pool")] if of is Training else []


def _fitting(data: Any, method: str) -> Any:
    """The data of a training, from a pool of what its method learns from where none is named."""
    return {"pool": default_pool(method)} | data if isinstance(data, dict) else data


def default_pool(method: str) -> str:
    """Returns the pool that a method's examples come from unless a recipe says otherwise."""
    return _POOLS[methods.load(method).examples]


def _inner(of: type, value: Any, owner: str) -> Any:
    """A section of a node's: another node, or plain fields."""
    if isinstance(value, of):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{owner} must hold fields, got {value!r}")
    return made(of, value, owner=owner) if issubclass(of, Node) else fields_.build(of, value, owner=owner)


def node(place: str, label: str, value: Any) -> Any:
    """Returns a node of a study from its fields as a recipe writes them at a key of ``PLACES``; see :func:`made`."""
    of, folder = PLACES[place], PLACES[place].FOLDER
    if isinstance(value, of):
        return value
    own, where = label if label in folder.TABLE else None, f"{place}.{label}"
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
