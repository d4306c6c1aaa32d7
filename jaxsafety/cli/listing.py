"""``jaxsafety list``: what a recipe can name, read from the sources of the literal tables; none of it is imported."""

from collections.abc import Iterator, Mapping

from jaxsafety import analysis, attacks, claims, edits, methods, parametrisations, pools, subjects
from jaxsafety.config import tables
from jaxsafety.rundir import printed
from jaxsafety.rundir.printed import Form

_KINDS = (
    ("subjects", "subject", subjects.TABLE),
    ("methods", "method", methods.TABLE),
    ("pools", "pool", pools.TABLE),
    ("parametrisations", "parametrisation", parametrisations.TABLE),
    ("edits", "edit", edits.TABLE),
    ("attacks", "attack", attacks.TABLE),
    ("analyses", "analysis", analysis.TABLE | analysis.OF_CHECKPOINTS),
)


def told(table: Mapping[str, str], *, prefix: str = "") -> str:
    """Returns every name with its first line, and its fields behind ``prefix``: kind, default and meaning."""
    lines = []
    for name, module in table.items():
        lines.append(f"  {name}: {tables.summary(module)}")
        lines += [f"    {prefix}{field}" for field in tables.declared(module)]
    return "\n".join(lines)


def _written(kind: str, name: str) -> str:
    return f"`{kind}: {{kind: {name}}}`" if kind in ("subject", "parametrisation") else f"`{kind}: {name}`"


def render(form: Form = "table") -> str:
    """Returns what ``jaxsafety list`` prints; records have a row for every field, and for what has none."""
    return _text() if form == "table" else printed.records(list(_records()), form)


def _records() -> Iterator[dict[str, str]]:
    claimed = ("claims", "claims", claims.TABLE)
    for kinds, _, table in (*_KINDS, claimed):
        for name, module in table.items():
            row = {"folder": kinds, "name": name, "summary": tables.summary(module)}
            own = [] if table is claims.TABLE else tables.fields_of(module)
            for one in own or [tables.Declared("", "", "", None, "")]:
                told = {"field": one.name, "type": one.type, "kind": one.kind, "default": one.default or ""}
                yield row | told | {"meaning": one.doc}


def _text() -> str:
    parts = [
        f"{kinds}, {_written(kind, 'NAME')} in a recipe, or one of your own as "
        f"{_written(kind, f'package.module:{kind.upper()}')}\n"
        f"{told(table)}\n\n"
        for kinds, kind, table in _KINDS
    ]
    papers = "\n".join(f"  {name}: {tables.summary(module)}" for name, module in claims.TABLE.items())
    return (
        "Several values of a traced field are one compiled program, and so are those of a swept one; every value of\n"
        f"a static field is another program.\n\n{''.join(parts)}"
        f"claims, `claims: [NAME]` in a recipe, or your own as `package.module:CLAIMS`\n{papers}\n"
    )
