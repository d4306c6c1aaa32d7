"""Fields of a model that list or name several values where one scalar is expected: the axes of a product."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from jaxsafety.config.fields import hints_of, swept_names, typed
from jaxsafety.recipe.models import Data, Edited, Reused, Training, default_pool, kind_of
from jaxsafety.recipe.nodes import Node

_SCALARS = (int, float, str, bool)


class Axis(NamedTuple):
    """A field that has several values: its path, what names call each of them, in order, and whether these are given.

    ``swept`` is a field of an edit's strengths, which holds a tuple; a single one of these is called nothing.
    """

    path: tuple[str, ...]
    values: dict[str, Any]
    named: bool
    swept: bool = False


def axes(label: str, given: Mapping[str, Any]) -> Iterator[Axis]:
    """Yields the axes of a model's product, in the order in which its fields are declared.

    So a lane has one name, however its model is written. What is unknown is left to be refused where it is made.

    Raises:
        ValueError: no value, a value twice or of another type, or a bad name.
    """
    for path, kind, default in _fields(given):
        swept = default is not None
        value = _at(given, path, default)
        if not _is_scalar(kind) or not isinstance(value, list | tuple | Mapping):
            if swept and not isinstance(value, list | tuple):
                yield Axis(path, {"": typed(value, kind, ".".join(("models", label, *path)))}, named=True, swept=True)
            continue
        where = ".".join(("models", label, *path))
        if value == () == default:
            raise ValueError(f"{where} is not given: which values there are depends on the model's sizes")
        if not value:
            raise ValueError(f"{where} must have at least one value, got none")
        if named := isinstance(value, Mapping):
            values = {name: typed(one, kind, where) for name, one in value.items()}
        else:
            plain = [typed(one, kind, where) for one in value]
            values = {f"{path[-1]}={word}": one for word, one in zip(_words(plain), plain, strict=True)}
        if len(values) < len(value) or len({repr(one) for one in values.values()}) < len(value):
            raise ValueError(f"{where} must have distinct values, got {value}")
        for name in values:
            if not re.fullmatch(r"[\w.+=-]{1,64}", name):
                raise ValueError(f"{where}: a value's name must be letters, digits and any of _ . + -, got {name!r}")
        yield Axis(path, values, named, swept)


def at(given: Mapping[str, Any], axis: Axis, value: Any) -> dict[str, Any]:
    """Returns a model's fields with one value of an axis."""
    return _with(given, axis.path, (value,) if axis.swept else value)


def restored(found: dict[str, Any], axis: Axis) -> None:
    """Puts all values of an axis into a model's fields, as a recipe writes them."""
    where = found
    for name in axis.path[:-1]:
        where = where[name]
    if "" in axis.values:
        where[axis.path[-1]] = axis.values[""]
    else:
        where[axis.path[-1]] = dict(axis.values) if axis.named else list(axis.values.values())


def _fields(given: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Every field that is given of a model, with its type, and the swept ones of an edit, which have a default."""
    of = kind_of(given)
    if of is Reused:
        yield from ((("from", name), str, None) for name in ("run", "model") if name in given["from"])
    if of not in (Training, Edited):
        return
    made_by = loaded(of, given.get(fields(of)[0].name))
    if made_by is None:
        return
    swept = swept_names(made_by.Config) if is_dataclass(made_by.Config) else ()
    defaults = {one.name: one.default for one in fields(made_by.Config)} if swept else {}
    for name, kind in (_types(of) | _types(made_by.Config)).items():
        value = given.get(name)
        if name in swept:
            yield (name,), get_args(kind)[0], defaults[name]
        elif is_dataclass(kind) and isinstance(value, Mapping):
            below = _types(kind)
            if issubclass(kind, Node):
                first = fields(kind)[0]
                # Not every method has a pool that its examples come from by default.
                default = default_pool(given["method"]) if kind is Data and first.name not in value else first.default
                named = value.get(first.name, default)
                below |= _types(getattr(loaded(kind, named), "Config", object))
            yield from (((name, own), below[own], None) for own in below if own in value)
        elif name in given:
            yield (name,), kind, None


def loaded(of: type[Node], kind: Any) -> Any:
    """Returns a method, a pool, an edit and their like; None where there is none of that name, which is told later."""
    try:
        return of.FOLDER.load(kind) if isinstance(kind, str) else None
    except ValueError:
        return None


def _types(of: type) -> dict[str, Any]:
    if not is_dataclass(of):
        return {}
    hints = hints_of(of)
    # A node's first field says what it is, and so which others it has.
    apart = ("options", fields(of)[0].name) if issubclass(of, Node) else ()
    return {one.name: hints[one.name] for one in fields(of) if one.name not in apart}


def _is_scalar(kind: Any) -> bool:
    inside = get_args(kind)
    optional = type(None) in inside and any(one in _SCALARS for one in inside)
    return kind in _SCALARS or get_origin(kind) is Literal or optional


def _at(given: Mapping[str, Any], path: Sequence[str], default: Any) -> Any:
    for name in path:
        given = given.get(name, default) if default is not None else given[name]
    return given


def _with(given: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    return {**given, first: _with(given[first], rest, value) if rest else value}


def _words(values: Sequence[Any]) -> list[str]:
    """What names call values; of paths the last part, with numbers where these are the same."""
    words = [_shown(value) for value in values]
    same = len(set(words)) < len(words) and len({repr(value) for value in values}) == len(values)
    return [f"{number}-{word}" for number, word in enumerate(words, 1)] if same else words


def _shown(value: Any) -> str:
    text = Path(value).name if isinstance(value, str) and "/" in value else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)
