"""The models of a study as a graph: every named one, with what it is trained from, as lanes.

A field of a model may list several values, or name them (``lr: {eta_M: 1e-3, eta_S: 1e-4}``), and ``from`` several
models: every combination is a lane of that model. Lanes that agree in all but traced scalars train as one program,
whatever they start from.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from jaxsafety.config.fields import typed
from jaxsafety.config.names import check_name
from jaxsafety.recipe.nodes import Data, Node, Training, default_pool, made

# What a lane's ancestors are called, whatever their names.
PARENT, ROOT = "parent", "root"
# Every lane is read, checked and planned, and has a directory named after its values.
_MOST_LANES = 4096
_MOST_LETTERS = 200
_SCALARS = (int, float, str, bool)


@dataclass(frozen=True)
class Lane:
    """One model of a study at one point of its values; all its seeds.

    Attributes:
        label: the model's name in the recipe.
        point: what tells it from the other lanes of that model, such as ``eta_M`` or ``from=sft.eta_M.steps=10``; empty
            where it is the only one.
        parent: the lane that its training begins with; None for one that begins with fresh parameters.
        training: how it is trained, every field with its value.
    """

    label: str
    point: str
    parent: "Lane | None"
    training: Training

    @property
    def name(self) -> str:
        """Its name among all lanes, a plain file name."""
        return f"{self.label}.{self.point}" if self.point else self.label

    @property
    def ancestors(self) -> tuple["Lane", ...]:
        """The lanes before it, the nearest first."""
        return () if self.parent is None else (self.parent, *self.parent.ancestors)

    @property
    def root(self) -> "Lane":
        """Its first ancestor, or itself."""
        return (self, *self.ancestors)[-1]

    @property
    def stage(self) -> Literal["pretrain", "tune"]:
        """The stage that trains it."""
        return "pretrain" if self.parent is None else "tune"

    @property
    def reference(self) -> "Lane | None":
        """What its method compares it with; None for a method that asks for nothing."""
        if self.training.load().reference is None:
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


class _Axis(NamedTuple):
    """A field of a model that has several values: its path, and what names call each of them, in order."""

    path: tuple[str, ...]
    values: dict[str, Any]


def expand(models: Mapping[str, Any]) -> tuple[Lane, ...]:
    """Returns the lanes of a recipe's models, parents before children, else in the order of the recipe.

    Raises:
        ValueError: no model, a bad name, an unknown parent, models that wait for each other, too many lanes, an unknown
            field or a bad value; the model is named.
    """
    found: dict[str, tuple[Lane, ...]] = {}
    for label in _ordered(models):
        found[label] = _lanes(label, models[label], found)
        if (count := sum(map(len, found.values()))) > _MOST_LANES:
            raise ValueError(
                f"models must have at most {_MOST_LANES} lanes in all, got {count} up to {label}: give it fewer "
                "values, or split the recipe"
            )
    return tuple(itertools.chain(*found.values()))


def resolved(given: Mapping[str, Any], lanes: Sequence[Lane], as_dict: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns a model's fields with all defaults, as a recipe writes them; lists of values stay."""
    found = as_dict(lanes[0].training)
    parents = {"from": given["from"]} if "from" in given else {}
    for axis in _axes(lanes[0].label, given):
        where = found
        for name in axis.path[:-1]:
            where = where[name]
        named = isinstance(_at(given, axis.path), Mapping)
        where[axis.path[-1]] = dict(axis.values) if named else list(axis.values.values())
    return parents | found


def groups(lanes: Sequence[Lane]) -> list[tuple[Lane, ...]]:
    """Groups lanes that one program trains: of one generation, and alike in all but traced scalars; in their order."""
    found: dict[Any, list[Lane]] = {}
    for lane in lanes:
        found.setdefault((len(lane.ancestors), lane.training.program), []).append(lane)
    return [tuple(group) for _, group in sorted(found.items(), key=lambda item: item[0][0])]


def twins(one: Lane, other: Lane) -> bool:
    """Whether two lanes differ in nothing but their model: of one parent, at the same point."""
    return one.label != other.label and one.point == other.point and one.parent == other.parent


def _ordered(models: Mapping[str, Any]) -> list[str]:
    """The labels, parents first."""
    if not models:
        raise ValueError("models must name at least one model, got none")
    for label, given in models.items():
        if not re.fullmatch(r"[\w+-]{1,64}", label):
            raise ValueError(f"the name of a model must be at most 64 letters, digits and any of _ + -, got {label!r}")
        if label in (PARENT, ROOT, "tuned"):
            raise ValueError(f"{label!r} is the name of another model already: choose another")
        if not isinstance(given, Mapping):
            raise ValueError(f"models.{label} must hold fields such as `method: sft`, got {given!r}")
        for parent in _parents(label, given):
            check_name(f"model in models.{label}.from", parent, models)
    left, done = dict.fromkeys(models), []
    while left:
        ready = [label for label in left if set(_parents(label, models[label])) <= set(done)]
        if not ready:
            raise ValueError(f"models wait for each other: {' <- '.join(_circle(models, next(iter(left)), left))}")
        done.append(ready[0])
        del left[ready[0]]
    return done


def _circle(models: Mapping[str, Any], label: str, left: Mapping[str, Any]) -> list[str]:
    """The labels of a circle, the first one again at its end."""
    path = [label]
    while path[-1] not in path[:-1]:
        path.append(next(parent for parent in _parents(path[-1], models[path[-1]]) if parent in left))
    return path[path.index(path[-1]) :]


def _parents(label: str, given: Mapping[str, Any]) -> list[str]:
    named = given.get("from", [])
    parents = [named] if isinstance(named, str) else named
    if not isinstance(parents, list | tuple) or not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"models.{label}.from must be the name of a model, or a list of names, got {named!r}")
    if "from" in given and not parents:
        raise ValueError(f"models.{label}.from must name at least one model, got none")
    if len(set(parents)) < len(parents):
        raise ValueError(f"models.{label}.from must name distinct models, got {list(parents)}")
    return list(parents)


def _lanes(label: str, given: Mapping[str, Any], before: Mapping[str, tuple[Lane, ...]]) -> tuple[Lane, ...]:
    starts = [lane for parent in _parents(label, given) for lane in before[parent]]
    axes = list(_axes(label, given))
    plain = {name: value for name, value in given.items() if name != "from"}
    found = []
    for parent in starts or [None]:
        for combination in itertools.product(*(axis.values.items() for axis in axes)):
            words = [f"from={parent.name}"] if parent and len(starts) > 1 else []
            content = plain
            for axis, (word, value) in zip(axes, combination, strict=True):
                words.append(word)
                content = _with(content, axis.path, value)
            training = made(Training, content, owner=f"models.{label}")
            found.append(Lane(label, ".".join(words), parent, training))
            if len(found) > _MOST_LANES:
                raise ValueError(f"models.{label} must have at most {_MOST_LANES} lanes: give it fewer values")
    for lane in found:
        _check(lane)
    return tuple(found)


def _check(lane: Lane) -> None:
    if len(lane.name) > _MOST_LETTERS:
        raise ValueError(
            f"a lane is a directory named after its values, of at most {_MOST_LETTERS} letters, got {len(lane.name)}: "
            f"give values names, or make fewer lists ({lane.name[:40]}...)"
        )
    if lane.parent is None and lane.training.load().reference is not None:
        raise ValueError(
            f"models.{lane.label} has no `from`, and method {lane.training.method!r} asks the model that training "
            "begins with"
        )
    if lane.parent is None and lane.training.reference != PARENT:
        raise ValueError(f"models.{lane.label}.reference is {lane.training.reference!r}, and it has no `from`")
    if lane.parent is not None:
        lane.ancestor(lane.training.reference)


def _axes(label: str, given: Mapping[str, Any]) -> Iterator[_Axis]:
    """The fields that list or name several values where one scalar is expected."""
    for path, kind in _kinds(given):
        value = _at(given, path)
        if not _is_scalar(kind) or not isinstance(value, list | tuple | Mapping):
            continue
        where = ".".join(("models", label, *path))
        if not value:
            raise ValueError(f"{where} must have at least one value, got none")
        if isinstance(value, Mapping):
            named = {name: typed(one, kind, where) for name, one in value.items()}
        else:
            values = [typed(one, kind, where) for one in value]
            named = {f"{path[-1]}={_shown(one)}": one for one in values}
        if len(named) < len(value) or len({repr(one) for one in named.values()}) < len(value):
            raise ValueError(f"{where} must have distinct values, got {value}")
        for name in named:
            if not re.fullmatch(r"[\w.+=-]{1,64}", name):
                raise ValueError(f"{where}: a value's name must be letters, digits and any of _ . + -, got {name!r}")
        yield _Axis(path, named)


def _kinds(given: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field that is given of a model, with its type, those of its sections and of its method included.

    They come in the order in which they are declared: a lane has one name, however its model is written. What is
    unknown is left to be refused where the model is made.
    """
    method = _loaded(Training, given.get("method"))
    if method is None:
        return
    for name, kind in (_types(Training) | _types(method.Config)).items():
        value = given.get(name)
        if is_dataclass(kind) and isinstance(value, Mapping):
            below = _types(kind)
            if kind is Data and (pool := _loaded(Data, value.get("pool", default_pool(given["method"])))):
                below |= _types(pool.Config)
            yield from (((name, own), below[own]) for own in below if own in value)
        elif name in given:
            yield (name,), kind


def _loaded(of: type[Node], kind: Any) -> Any:
    """A method or a pool; None where there is none of that name."""
    try:
        return of.FOLDER.load(kind) if isinstance(kind, str) else None
    except ValueError:
        return None


def _types(of: type) -> dict[str, Any]:
    if not is_dataclass(of):
        return {}
    hints = get_type_hints(of)
    # A node's first field says what it is, and so which others it has.
    apart = ("options", fields(of)[0].name) if issubclass(of, Node) else ()
    return {one.name: hints[one.name] for one in fields(of) if one.name not in apart}


def _is_scalar(kind: Any) -> bool:
    inside = get_args(kind)
    optional = type(None) in inside and any(one in _SCALARS for one in inside)
    return kind in _SCALARS or get_origin(kind) is Literal or optional


def _at(given: Mapping[str, Any], path: Sequence[str]) -> Any:
    for name in path:
        given = given[name]
    return given


def _with(given: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    return {**given, first: _with(given[first], rest, value) if rest else value}


def _shown(value: Any) -> str:
    text = Path(value).stem if isinstance(value, str) and "/" in value else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)


def default_models() -> dict[str, Any]:
    """The paper's study: one pretraining, and its three methods at two learning rates."""
    tuned = {"from": "pretrained", "lr": {"eta_M": 1e-3, "eta_S": 1e-4}, "snapshots": 4, "role": "defence"}
    return {"pretrained": {"method": "pretrain", "steps": 400}} | {
        method: {"method": method} | tuned for method in ("sft", "dpo", "unlearn")
    }
