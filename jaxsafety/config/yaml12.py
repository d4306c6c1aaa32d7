"""YAML with the scalars of version 1.2: ``on`` is text and 1e-3 a number, where PyYAML alone has those of 1.1."""

import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import yaml

_MAX_NODES = 10_000
_OTHER = (":bool", ":float", ":timestamp")
_KEPT = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(_OTHER)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Loader(yaml.SafeLoader):
    """Reads plain values."""

    yaml_implicit_resolvers: ClassVar = dict(_KEPT)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read as text."""

    yaml_implicit_resolvers: ClassVar = dict(_KEPT)


for _class in (Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
    )
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"^([-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
        ),
        [*"-+0123456789."],
    )  # fmt: skip


def load(text: str) -> Any:
    """Returns the plain values of a document; raises as ``yaml.safe_load``."""
    return deepcopy(_loaded(text))


@lru_cache(maxsize=8)
def _loaded(text: str) -> Any:
    # A recipe is read three times until it is one: for its keys, for its fields, and by the parser of these.
    return yaml.load(text, Loader=Loader)


def dump(values: Any) -> str:
    """Returns plain values as a document that :func:`load` reads, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read(path: Path, *, what: str = "a recipe", such: str = "subject: {world: tiny}") -> dict[str, Any]:
    """Returns the fields that a YAML file holds, as plain values; ``what`` it is of, ``such`` as a field.

    Raises:
        ValueError: no file, not YAML, not fields, or a key twice.
    """
    if not path.is_file():
        raise ValueError(f"no {what.removeprefix('a ')} file at {path}")
    try:
        text = path.read_text()
        root = yaml.compose(text, Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    _check_keys(root, where=str(path))
    try:
        found = load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number that is none is a ValueError
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if found is None:
        raise ValueError(f"{path} is empty: expected the fields of {what}, such as `{such}`")
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold fields such as `{such}`, got a {type(found).__name__}")
    return found


def _check_keys(root: yaml.Node | None, *, where: str) -> None:
    """Refuses a key that stands twice in one mapping, where YAML would let the last one win, or is no text.

    Aliases may repeat a part, but not without end: a recipe of a few lines could name more fields than fit in memory.
    """
    pending, seen = [root], 0
    while pending:
        node, seen = pending.pop(), seen + 1
        if seen > _MAX_NODES:
            raise ValueError(f"{where} holds more than {_MAX_NODES} values, or repeats itself without end")
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                    shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "it"
                    raise ValueError(f"{where} has a key that is no text: put {shown} in quotes or rename it")
                if names.count(key.value) > 1:
                    raise ValueError(f"{where} names {key.value!r} twice in one place")
            pending += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
