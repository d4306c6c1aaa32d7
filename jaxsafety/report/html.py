"""The study as one self-contained HTML file: inline style and SVG, no script, nothing fetched.

Every value passes Jinja's autoescape; only the SVG strings of ``jaxsafety.report.plotting`` are taken as markup. Links
lead to the tables beside the page and nowhere else.
"""

import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from jaxsafety.config.names import check_name
from jaxsafety.report import tables
from jaxsafety.report.tables import VERDICTS, StudyRow, VerdictRow, model_label, percent
from jaxsafety.rundir import atomic, opening

_CLAIM_KEYS = ("name", "number", "statement", "where", "statistic", "expected", "estimate", "adjusted", "spread",
               "verdict", "marked", "holm", "why")  # fmt: skip
_EXAMPLE_KEYS = ("condition", "prompt", "answers")
_INTERVALS = (
    "In every figure each seed is faint and the mean bold, in a band or on a bar of its 95 % Student-t interval over "
    "seeds."
)
_ANSWER_KEYS = ("model", "answer", "verdict")
# Of the answers of a dead lane there is no verdict.
_ANSWER_VERDICTS = (*VERDICTS, "dead")
CLAIM_VERDICTS = ("supported", "contradicted", "no effect", "undecided")
# The page fetches nothing: its only links lead to files beside it.
_RELATIVE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


class Analysis(NamedTuple):
    """One figure of ``jaxsafety.report.sections`` as the page shows it, with ``name`` as its anchor.

    ``svg`` is inserted unescaped; ``table`` is the path of its table beside the page, without the suffix (.csv and
    .parquet).
    """

    name: str
    title: str
    paper: str
    reading: str
    claims: Sequence[str]
    svg: str
    table: str


def write_report(
    path: str | Path,
    *,
    title: str,
    table: Sequence[StudyRow],
    verdicts: Sequence[VerdictRow],
    figures: Mapping[str, str],
    examples: Sequence[Mapping[str, Any]],
    config_yaml: str,
    manifest: Mapping[str, Any],
    notes: Sequence[str],
    claims: Sequence[Mapping[str, Any]] = (),
    claim_notes: Sequence[str] = (),
    claim_counts: str = "",
    analyses: Sequence[Analysis] = (),
    lead: Sequence[Analysis] = (),
    intervals: str = _INTERVALS,
) -> None:
    """Writes the report, atomically.

    ``table`` are rows of ``study_table``, none for no such table, and ``verdicts`` of ``verdict_table``. ``figures``
    are captions to SVGs of ``jaxsafety.report.figures``, inserted unescaped. ``examples`` have ``condition``,
    ``prompt`` and ``answers``, a list of mappings with ``model``, ``answer`` and ``verdict`` (complied, refused, other
    or dead), and where there are such ``expected`` and ``refusal``. The manifest's nested mappings are shown with
    dotted names; ``notes`` are paragraphs of plain text. ``claims`` are records of ``jaxsafety.report.claims_table``,
    under which ``claim_notes`` stand; with ``claim_counts``, a sentence, the first screen has it and the claims that
    Holm's bound decides. ``lead`` are figures like ``analyses``, before everything else. ``intervals`` says what the
    bands and bars of the figures are.

    Raises:
        ValueError: an example or a claim lacks a key or has an unknown verdict, or a table's path is not relative.
    """
    for example in examples:
        _check_example(example)
    _check_analyses(claims, [*lead, *analyses])
    page = _template().render(
        title=title,
        columns=tables.column_names(table),
        verdict_names=VERDICTS,
        table=table,
        table_notes=tables.table_notes(table),
        seed_rows=list(_seed_rows(table)),
        verdicts={(row.model, row.condition): row for row in verdicts},
        verdict_models=list(dict.fromkeys(row.model for row in verdicts)),
        dead_notes=[f"* {note}" for note in tables.dead_notes(tables.dead_in_table(table))],
        verdict_conditions=list(dict.fromkeys(row.condition for row in verdicts)),
        figures=figures,
        examples=examples,
        config_yaml=config_yaml,
        manifest={
            name: value if isinstance(value, str) else json.dumps(value, default=str)
            for name, value in opening.flat(manifest).items()
        },
        notes=notes,
        claims=claims,
        claim_notes=claim_notes,
        claim_counts=claim_counts,
        claims_told=[claim for claim in claims if claim_counts and claim["holm"]],
        claims_of={one.name: [claim for claim in claims if claim["name"] in one.claims] for one in (*lead, *analyses)},
        analyses=analyses,
        lead=lead,
        intervals=intervals,
    )
    atomic.atomic_write(Path(path), page)


@cache
def _template() -> jinja2.Template:
    source = importlib.resources.files("jaxsafety.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    labels = {name: getattr(tables, f"{name}_label") for name in ("method", "lr", "condition")}
    environment.filters |= {"percent": percent, "label": model_label} | labels
    return environment.from_string(source)


def _seed_rows(table: Sequence[StudyRow]) -> Iterator[tuple[str, int, list[str]]]:
    """``(model, seed, one text per column)`` for every seed of every model."""
    for row in table:
        for seed in sorted({seed for cell in row.cells.values() if cell for seed in cell.values}):
            yield model_label(row.model), seed, [_seed_text(cell, seed) for cell in row.cells.values()]


def _seed_text(cell: Any, seed: int) -> str:
    if cell is None or seed not in cell.values:
        return "-"
    return "dead" if cell.values[seed] is None else percent(cell.values[seed])


def _check_example(example: Mapping[str, Any]) -> None:
    _check_keys(example, _EXAMPLE_KEYS, "example")
    for answer in example["answers"]:
        _check_keys(answer, _ANSWER_KEYS, "answer of an example")
        if answer["verdict"] not in _ANSWER_VERDICTS:
            expected = ", ".join(_ANSWER_VERDICTS)
            raise ValueError(f"unknown verdict {answer['verdict']!r} in an example: expected {expected}")


def _check_analyses(claims: Sequence[Mapping[str, Any]], analyses: Sequence[Analysis]) -> None:
    for claim in claims:
        _check_keys(claim, _CLAIM_KEYS, "claim")
        check_name("verdict of a claim", claim["verdict"], CLAIM_VERDICTS)
    for analysis in analyses:
        if not _RELATIVE.fullmatch(analysis.table):
            raise ValueError(f"table {analysis.table!r} is not a plain relative path: expected one below the page")


def _check_keys(mapping: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
    if missing := [key for key in keys if key not in mapping]:
        raise ValueError(f"{what} lacks {missing[0]!r}: expected {', '.join(keys)}")
