"""How options are declared: once, on a frozen dataclass ``Config``, each traced or static, with its bounds.

A *traced* field is a scalar of one lane: a grid of it is one compiled program. A *static* field (any plain dataclass
field is one) is part of the program: another value compiles another. A *swept* field lists the values of a scalar that
one compiled program goes through: the strengths of an attack or an edit. Recipes, dry runs, the command line and the
documentation read the fields from here; nothing types them again.

    @dataclass(frozen=True)
    class Config:
        beta: float = traced(0.1, above=0)
        reduction: Literal["sum", "mean"] = "sum"
        __post_init__ = check
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxsafety.config.names import check_name, nearest
from jaxsafety.config.told import told_of


@dataclass(frozen=True)
class Bounds:
    """What a number must satisfy: ``above`` and ``below`` exclude their value; infinity only where ``infinite``."""

    above: float | int | None = None
    at_least: float | int | None = None
    below: float | int | None = None
    at_most: float | int | None = None
    infinite: bool = False

    def holds(self, value: float | int) -> bool:
        """Whether a number lies inside."""
        inside = (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )
        return inside and not math.isnan(value) and (self.infinite or math.isfinite(value))

    def __str__(self) -> str:
        signs = {">": self.above, ">=": self.at_least, "<": self.below, "<=": self.at_most}
        parts = [f"{sign} {limit:g}" for sign, limit in signs.items() if limit is not None]
        return " and ".join(parts if self.infinite else [*parts, "finite"])


def traced(default: float | int, **bounds: Any) -> Any:
    """Declares a scalar of a lane; ``bounds`` are those of :class:`Bounds`."""
    return field(default=default, metadata={"traced": True, "bounds": Bounds(**bounds)})


def static(default: Any = MISSING, **bounds: Any) -> Any:
    """Declares a number, or a tuple of numbers, that is part of the program, with bounds; none is a required one."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


def swept(*values: float | int, **bounds: Any) -> Any:
    """Declares the values that one scalar goes through; ``points`` lists them, in ascending order."""
    return field(default=values, metadata={"swept": True, "bounds": Bounds(**bounds)})


hints_of = cache(get_type_hints)
"""The types of a class's fields; evaluating their annotations takes longer than all that is checked by them."""


def check(config: Any, *, prefix: str = "") -> None:
    """Checks every field of a config against its declared names and bounds; assign it to ``__post_init__``.

    A ValueError names the field, behind ``prefix``, whose value is of another type, whose name is not among the
    literal's, whose number is out of bounds, or whose swept values do not ascend.
    """
    hints = hints_of(type(config))
    for one in fields(config):
        value, bounds = as_python(getattr(config, one.name)), one.metadata.get("bounds")
        # An array is a lane's scalar, whose value may be traced.
        if not (one.metadata.get("traced") and hasattr(value, "dtype")):
            typed(value, hints[one.name], f"{prefix}{one.name}")
        kinds = _alternatives(hints[one.name])
        names = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
        if names and not (value is None and type(None) in kinds):
            check_name(f"{prefix}{one.name}", value, names)
        for number in value if isinstance(value, tuple) else (value,):
            if bounds and isinstance(number, int | float) and not bounds.holds(number):
                raise ValueError(f"{prefix}{one.name} must be {bounds}, got {number}")
        if one.metadata.get("swept") and not (value or one.default == ()):
            raise ValueError(f"{prefix}{one.name} must name at least one number, got none")
        if one.metadata.get("swept") and not all(type(number) in (int, float) for number in value):
            raise ValueError(f"{prefix}{one.name} must be numbers, got {list(value)}")
        if one.metadata.get("swept") and list(value) != sorted(set(value)):
            raise ValueError(f"{prefix}{one.name} must be ascending numbers, got {list(value)}")


def as_python(value: Any) -> Any:
    """Returns one of NumPy's scalars as Python's, anything else as it is."""
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if is_scalar else value


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def check_apart(config: type, taken: Iterable[str], *, owner: str) -> None:
    """Checks that no field of a config has the name of something that stands beside it.

    Raises:
        ValueError: one does.
    """
    if clash := sorted({one.name for one in fields(config)} & set(taken)):
        raise ValueError(
            f"{owner} has a field {clash[0]!r}, which means something else beside it: give it another name"
        )


def build(config: type, values: Mapping[str, Any], *, owner: str, **ready: Any) -> Any:
    """Returns a config of plain values, as YAML or a command line gives them; fields not named keep their defaults.

    ``owner`` is whose fields they are, for messages; ``ready`` are fields that are no plain values.

    Raises:
        ValueError: a field that there is not (the nearest is named), one left empty or not given that has no default,
            another type, a bad value; ``config`` is no dataclass.
    """
    if not is_dataclass(config):
        raise ValueError(f"{owner}: its Config is {config!r}, expected a frozen dataclass")
    hints, known = hints_of(config), [one.name for one in fields(config)]
    for name, value in values.items():
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{owner} has no field {name!r}: {has}{nearest(name, known)}")
        if value is None and type(None) not in get_args(hints[name]):
            raise ValueError(f"{owner}.{name} is empty: give it a value or leave the field out")
    for one in fields(config):
        if one.default is MISSING and one.default_factory is MISSING and one.name not in values:
            raise ValueError(f"{owner} has no {one.name}, which has no default: give it one")
    inner = {
        name: build(hints[name], value, owner=f"{owner}.{name}")
        for name, value in values.items()
        if is_dataclass(hints[name]) and isinstance(value, dict)
    }
    plain = {name: value for name, value in values.items() if name not in inner}
    with told_of(owner, module=config.__module__):
        made = config(**{name: typed(value, hints[name], name) for name, value in plain.items()}, **inner, **ready)
        check(made)
    return made


def typed(value: Any, kind: Any, name: str) -> Any:
    """Returns a plain value, as YAML or a command line gives it, as a field of some type holds it.

    Raises:
        ValueError: it is none of that type; ``name`` is the field's.
    """
    if kind is Any:
        return value
    if type(None) in get_args(kind):
        if value is None:
            return None
        (kind,) = (one for one in get_args(kind) if one is not type(None))
    if kind is float and isinstance(value, str):  # YAML reads 3e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: typed(one, get_args(kind)[1], f"{name}.{key}") for key, one in value.items()}
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    plain = not isinstance(value, bool)
    if kind is float and isinstance(value, int | float) and plain:
        return float(value)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(typed(item, get_args(kind)[0], name) for item in value)
    if get_origin(kind) is Literal or (isinstance(kind, type) and isinstance(value, kind) and (plain or kind is bool)):
        return value
    words = {float: "a number", int: "an integer", str: "text", bool: "true or false", Path: "a path"}
    other = "fields by name" if is_dataclass(kind) or get_origin(kind) is dict else "a list"
    raise ValueError(f"{name} must be {words.get(kind, other)}, got {value!r}")


def traced_names(config: Any) -> tuple[str, ...]:
    """Returns the names of a config's (or its class's) traced fields, in order."""
    return tuple(one.name for one in fields(config) if one.metadata.get("traced"))


def swept_names(config: Any) -> tuple[str, ...]:
    """Returns the names of a config's (or its class's) swept fields, in order."""
    return tuple(one.name for one in fields(config) if one.metadata.get("swept"))


def points(config: Any) -> tuple[dict[str, Any], ...]:
    """Returns every combination of the values of a config's swept fields; one without any for a config without."""
    names = swept_names(config)
    return tuple(
        dict(zip(names, values, strict=True)) for values in itertools.product(*(getattr(config, n) for n in names))
    )


def at_point(config: Any, values: Mapping[str, Any]) -> Any:
    """Returns the config with traced or swept fields replaced by a lane's or a point's scalars, not checked again."""
    found = copy(config)
    for name, value in values.items():
        object.__setattr__(found, name, value)
    return found


def program(config: Any) -> tuple[tuple[str, Any], ...]:
    """Returns the static fields and their values: where they differ, another program is compiled."""
    traced_ = traced_names(config)
    return tuple((one.name, getattr(config, one.name)) for one in fields(config) if one.name not in traced_)
