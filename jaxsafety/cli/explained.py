"""``jaxsafety explain NAME``: what one thing is, its formula, fidelity, source and fields, read from its file.

Nothing is imported but what judges a claim.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from jaxsafety import claims
from jaxsafety.cli import listing
from jaxsafety.config import tables
from jaxsafety.config.names import nearest

if TYPE_CHECKING:
    from jaxsafety.claims.judging import Claim


def text(name: str) -> str:
    """Returns all that files say of a name: of a method, an edit, an attack and so on, or of a claim.

    Raises:
        ValueError: nothing has that name; the nearest that there is is told.
    """
    named = [(kind, table[name]) for _, kind, table in listing.KINDS if name in table]
    if named:
        return "\n".join(_told(kind, name, module) for kind, module in named)
    found = {claim.name: (paper, claim) for paper in claims.TABLE for claim in claims.load(paper)}
    if name not in found:
        hint = nearest(name, [*(one for table in listing.FOLDERS.values() for one in table), *found])
        raise ValueError(f"nothing is called {name!r}, `jaxsafety list KIND` lists what there is{hint}")
    return _told_claim(*found[name])


def _told(kind: str, name: str, module: str) -> str:
    body = tables.parsed(module)
    lines = [f"{name}: {_docstring(body)}", "", f"In a recipe {listing.written(kind, name)}; in Python {module}", ""]
    for function in _public(body):
        lines += [f"{function.name}({ast.unparse(function.args)})", textwrap.indent(_docstring(function), "    "), ""]
    record = next(node for node in body.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    lines += ["Fields of a recipe:" if tables.fields_of(module) else "It has no fields.", *_fields(module)]
    lines += ["", *_notes(_docstring(record))]
    return "\n".join(lines).rstrip() + "\n"


def _docstring(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


# What a table's record is made of: read by a study, not by people.
_OF_RECORDS = ("totals", "needs", "reference", "data", "init_aux", "update_aux", "edit", "attack", "measure", "draw",
               "init", "join", "condition", "points", "models", "notes", "opened", "further")  # fmt: skip


def _public(body: ast.Module) -> Iterator[ast.FunctionDef]:
    """The functions that people import."""
    for node in body.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in _OF_RECORDS:
            yield node


def _fields(module: str) -> Iterator[str]:
    for one in tables.fields_of(module):
        default = "required" if one.default is None else f"default {one.default}"
        yield textwrap.fill(
            f"{one.name} ({one.type}, {one.kind}, {default}): {one.doc}", 100,
            initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False,
        )  # fmt: skip


def _notes(docstring: str) -> list[str]:
    """What a record's docstring says beside its fields: what its numbers are, references, fidelity."""
    kept: list[str] = []
    paragraphs = [part for part in docstring.split("\n\n") if not part.startswith("Attributes:")]
    for part in paragraphs:
        kept += [part, ""]
    return kept


def _told_claim(paper: str, claim: "Claim") -> str:
    margin = claim.margin
    told: Mapping[str, str] = {
        "statement": claim.statement,
        "where": claim.where,
        "number of a seed": claim.statistic,
        "expected": claim.side,
        "margin": "none" if margin is None else f"{margin.value:g}: {margin.reason}",
        "in a recipe": f"claims: [{paper}]",
    }
    return f"{claim.name}\n" + "".join(f"  {name}: {value}\n" for name, value in told.items())
