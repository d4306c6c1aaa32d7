"""``jaxsafety list``: what a recipe can name, read from the sources of the literal tables; none of it is imported.

Of single claims and figures, which are no files, the modules are imported.
"""

from collections.abc import Iterator, Mapping

from jaxsafety import analysis, attacks, claims, edits, methods, parametrisations, pools, subjects
from jaxsafety.config import tables
from jaxsafety.config.names import check_name
from jaxsafety.rundir import printed
from jaxsafety.rundir.printed import Form

KINDS = (
    ("subjects", "subject", subjects.TABLE),
    ("methods", "method", methods.TABLE),
    ("pools", "pool", pools.TABLE),
    ("parametrisations", "parametrisation", parametrisations.TABLE),
    ("edits", "edit", edits.TABLE),
    ("attacks", "attack", attacks.TABLE),
    ("analyses", "analysis", analysis.TABLE | analysis.OF_CHECKPOINTS),
)

FOLDERS = {kinds: table for kinds, _, table in KINDS}


def told(table: Mapping[str, str], *, prefix: str = "") -> str:
    """Returns every name with its first line, and its fields behind ``prefix``: kind, default and meaning."""
    lines = []
    for name, module in table.items():
        lines.append(f"  {name}: {tables.summary(module)}")
        lines += [f"    {prefix}{field}" for field in tables.declared(module)]
    return "\n".join(lines)


def written(kind: str, name: str) -> str:
    """Returns how a recipe names one of a kind."""
    return f"`{kind}: {{kind: {name}}}`" if kind in ("subject", "parametrisation") else f"`{kind}: {name}`"


def render(form: Form = "table", *, kind: str | None = None) -> str:
    """Returns what ``jaxsafety list`` prints; records have a row for every field, and for what has none.

    Of one ``kind``, such as ``methods``, ``claims`` or ``figures``, there is one line, or record, for each.

    Raises:
        ValueError: an unknown kind.
    """
    if kind is None:
        return _text() if form == "table" else printed.records(list(_records()), form)
    check_name("kind", kind, [*FOLDERS, *_SINGLE])
    rows = _SINGLE[kind]() if kind in _SINGLE else _summaries(kind)
    if form != "table":
        return printed.records(rows, form)
    width = max(len(row["name"]) for row in rows)
    return "".join(f"{row['name']:{width}}  {row['summary']}\n" for row in rows)


def _summaries(kind: str) -> list[dict[str, str]]:
    return [{"name": name, "summary": tables.summary(module)} for name, module in FOLDERS[kind].items()]


def _claims() -> list[dict[str, str]]:
    return [
        {"name": claim.name, "summary": claim.statement, "of": paper, "where": claim.where}
        for paper in claims.TABLE
        for claim in claims.load(paper)
    ]


def _figures() -> list[dict[str, str]]:
    from jaxsafety.report import section_list

    return [
        {"name": name, "summary": shown.title, "of": shown.paper} for name, shown in section_list.sections().items()
    ]


_SINGLE = {"claims": _claims, "figures": _figures}


def _records() -> Iterator[dict[str, str]]:
    claimed = ("claims", "claims", claims.TABLE)
    for kinds, _, table in (*KINDS, claimed):
        for name, module in table.items():
            row = {"folder": kinds, "name": name, "summary": tables.summary(module)}
            own = [] if table is claims.TABLE else tables.fields_of(module)
            for one in own or [tables.Declared("", "", "", None, "")]:
                told = {"field": one.name, "type": one.type, "kind": one.kind, "default": one.default or ""}
                yield row | told | {"meaning": one.doc}


def _text() -> str:
    parts = [
        f"{kinds}, {written(kind, 'NAME')} in a recipe, or one of your own as "
        f"{written(kind, f'package.module:{kind.upper()}')}\n"
        f"{told(table)}\n\n"
        for kinds, kind, table in KINDS
    ]
    papers = "\n".join(f"  {name}: {tables.summary(module)}" for name, module in claims.TABLE.items())
    return (
        "Several values of a traced field are one compiled program, and so are those of a swept one; every value of\n"
        f"a static field is another program.\n\n{''.join(parts)}"
        f"claims, `claims: [NAME]` in a recipe, or your own as `package.module:CLAIMS`\n{papers}\n"
    )
