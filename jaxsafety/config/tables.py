"""Literal tables of what has a file of its own, ``name -> module``, and somebody else's as ``package.module:NAME``."""

import ast
import importlib
import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jaxsafety.config.names import check_name


def load(name: str, table: Mapping[str, str], *, kind: str, record: type | None = None) -> Any:
    """Returns what a table's name, or ``package.module:NAME``, stands for; only its own module is imported.

    Args:
        name: the name.
        table: names of ours to modules.
        kind: what they are, for the message; in capitals it is the attribute that the modules of the table hold.
        record: what one of them is an instance of; None for the class of :mod:`jaxsafety.types` that has the kind's
        name.

    Raises:
        ValueError: an unknown name, no such module, nothing of that name in it, or something else.
    """
    module, _, wanted = name.partition(":")
    attribute = kind.upper()
    if not wanted:
        check_name(kind, name, table)
        return getattr(importlib.import_module(table[name]), attribute)
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{kind} {name!r}: {module!r} is no module, expected package.module:{attribute}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that it imports itself
        raise ValueError(f"{kind} {name!r}: there is no module {module!r} on the path of Python") from error
    if not hasattr(found, wanted):
        raise ValueError(f"{kind} {name!r}: module {module!r} has no {wanted!r}, expected such as {attribute!r}")
    if record is None:
        record = getattr(importlib.import_module("jaxsafety.types"), kind.capitalize())
    if not isinstance(one := getattr(found, wanted), record):
        raise ValueError(f"{kind} {name!r} is a {type(one).__name__}, expected a {record.__module__}.{record.__name__}")
    return one


class Declared(NamedTuple):
    """A field of a record as its source declares it: texts, ``default`` None where it has none."""

    name: str
    type: str
    kind: str
    default: str | None
    doc: str


# What a field's factory makes, as a recipe writes it; of a record its name is shown.
_EMPTY = {"dict": "{}", "list": "[]", "tuple": "[]"}


def fields_of(module: str, record: str = "Config") -> tuple[Declared, ...]:
    """Returns the fields of a module's record as its source declares them: nothing is imported for a help text.

    What the record's docstring says of each comes with it; ``kind`` is traced, swept or static.
    """
    return _fields(_place(module), record)


@cache
def _fields(place: str, record: str) -> tuple[Declared, ...]:
    body = next(node for node in _parsed(place).body if isinstance(node, ast.ClassDef) and node.name == record)
    entry = r"^    (\w+(?:, \w+)*): (.+?)(?=\n    \w+(?:, \w+)*: |\n\n|\Z)"
    found = re.findall(entry, ast.get_docstring(body) or "", re.DOTALL | re.MULTILINE)
    docs = {name: " ".join(doc.split()) for names, doc in found for name in names.split(", ")}
    return tuple(_declared(node, docs) for node in body.body if isinstance(node, ast.AnnAssign))


def _declared(node: ast.AnnAssign, docs: Mapping[str, str]) -> Declared:
    name, kind, default = ast.unparse(node.target), "static", node.value and ast.unparse(node.value)
    call = ast.unparse(node.value.func).rpartition(".")[2] if isinstance(node.value, ast.Call) else ""
    if call in ("traced", "static", "swept"):
        words, kind = [ast.unparse(word) for word in node.value.args], call
        default = f"[{', '.join(words)}]" if kind == "swept" else next(iter(words), None)
    elif call == "field":
        made = {word.arg: ast.unparse(word.value) for word in node.value.keywords}.get("default_factory")
        default = _EMPTY.get(made, made)
    return Declared(name, ast.unparse(node.annotation), kind, default, docs.get(name, ""))


def constant(module: str, name: str) -> dict[str, Any]:
    """Returns a literal dict of a module's, which is not imported for it."""
    body = parsed(module).body
    found = next(node for node in body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name)
    return ast.literal_eval(found.value)


def declared(module: str) -> list[str]:
    """Returns the fields of a module's ``Config``, each with its name, kind, default, and what the docstring says."""
    return [f"{one.name} ({one.kind}, default {one.default}): {one.doc}" for one in fields_of(module)]


def summary(module: str) -> str:
    """Returns the first line of a module's docstring, which is not imported for it."""
    return (ast.get_docstring(parsed(module)) or "").partition("\n")[0]


def parsed(module: str) -> ast.Module:
    """Returns a module's source as a tree; it is not imported."""
    return _parsed(_place(module))


def _place(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no module {module!r} on the path of Python")
    return spec.origin


@cache
def _parsed(place: str) -> ast.Module:
    return ast.parse(Path(place).read_text())
