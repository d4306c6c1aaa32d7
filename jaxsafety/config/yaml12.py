"""YAML with the scalars of version 1.2: ``on`` is text and 1e-3 a number, where PyYAML alone has those of 1.1."""

import re
from typing import Any, ClassVar

import yaml

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
    return yaml.load(text, Loader=Loader)


def dump(values: Any) -> str:
    """Returns plain values as a document that :func:`load` reads, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
