"""The report stage: reads a run directory's results and writes ``report.html``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import polars as pl

from jaxsafety.report import (
    checkpoint_summary,
    claims_table,
    dead_lanes,
    figures,
    html,
    judged,
    matrix,
    plot,
    plotting,
    sections,
    tables,
    tradeoff,
)  # fmt: skip
from jaxsafety.report.tables import StudyRow, VerdictRow
from jaxsafety.rundir import manifest_file, printed, results
from jaxsafety.rundir.layout import ANALYSIS_FILE
from jaxsafety.rundir.printed import Form
from jaxsafety.types import Subject

_CURVES = {"pretrain": "Pretraining", "tune": "Safety fine-tuning"}
_NOTE = (
    "All models of a seed are judged on the same prompts, drawn from keys that no training stream uses. In a small "
    "world some of them occur in training all the same, by chance."
)


def write(directory: Path, *, form: Form = "table") -> str:
    """Writes ``report.html`` of a run and returns the result table, with where the report is behind a table for people.

    Claims and analyses, and the tables beside them, are there if the run has been analysed.

    Raises:
        ValueError: the run has not been evaluated.
    """
    found = judged.read(directory)
    recipe, about, labelled = found.recipe, found.about, found.labelled
    notes, curves = about.notes(found.options), found.curves
    table, verdicts = found.table(), tables.verdict_table(found.evaluated)
    report, analyses = directory / "report.html", _analyses(directory)
    # Claims may be about what is judged alone.
    claimed = recipe is not None and recipe.claims and (directory / "results" / ANALYSIS_FILE).exists()
    there = not analyses.is_empty() or claimed
    html.write_report(
        report,
        title=f"jaxsafety study: {directory.resolve().name}",
        table=table,
        verdicts=verdicts,
        figures=_drawn(curves, verdicts, about) | _traded(found.evaluated, about, found.further),
        examples=_examples(directory / "results" / "examples.json"),
        config_yaml=(directory / "config.yaml").read_text(),
        manifest=manifest_file.read_manifest(directory),
        notes=notes if labelled else (*notes, _NOTE),
        **({"intervals": checkpoint_summary.INTERVALS} if labelled else {}),
        **(_analysed(directory, claims="measured" if labelled else "all") if there else {}),
    )
    if not labelled:
        told = tables.render(table, form)
    else:
        told = _told(table, checkpoint_summary.records(found.evaluated, analyses), form)
    return "\n".join([*filter(None, [told]), f"report: {report}\n"]) if form == "table" else told


def _drawn(curves: pl.DataFrame, verdicts: Sequence[VerdictRow], about: Subject) -> dict[str, str]:
    """The figures of what is not an analysis, by caption."""
    band, shown = "mean over seeds in a band from the lowest to the highest", figures.curves_of(about.conditions)
    drawn = {
        f"{title}: {band}": figures.learning_curves(curves, stage=stage, shown=shown)
        for stage, title in _CURVES.items()
        if stage in curves["stage"]
    }
    if verdicts:
        drawn["Complied, refused or other, by model and condition"] = figures.verdict_bars(verdicts)
    return drawn


def _traded(evaluated: pl.DataFrame, about: Subject, further: Sequence[str]) -> dict[str, str]:
    """What models can do against what they should refuse and do, where a subject's models read text."""
    if not about.speaks or len(about.conditions) < 2:
        return {}
    able = [about.conditions[0], *(name for name in further if name == "new_task" or name.endswith("_safe"))]
    caption = "What models can do against what they comply with: the mean over seeds, with 95 % intervals"
    try:
        return {caption: tradeoff.tradeoff(evaluated, able=able, harm=about.conditions[1])}
    except plot.NothingToDraw:
        return {}


def _told(table: Sequence[StudyRow], rows: list[dict[str, Any]], form: Form) -> str:
    """What is printed of a study whose prompts' own labels say the conditions."""
    if form in ("json", "csv"):
        return printed.records(rows, form)
    texts = [checkpoint_summary.answers_text(rows), checkpoint_summary.text(rows)]
    if form == "markdown":
        texts = ["".join(f"- {line}\n" for line in text.splitlines()) for text in texts]
    return "\n".join(filter(None, [tables.render(table, form) if table else "", *texts]))


def _analyses(directory: Path) -> pl.DataFrame:
    """The rows of a run's analyses, none where there are no analyses."""
    path = directory / "results" / ANALYSIS_FILE
    return results.read_results([path] if path.exists() else [], schema=results.ANALYSIS_SCHEMA)


def _examples(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: remove it and run its stage again, which writes it anew") from error


def _analysed(directory: Path, *, claims: Literal["all", "measured"]) -> dict[str, Any]:
    """What a report says about the analyses of a run, by argument of ``write_report``; writes their tables.

    Claims are all, or those alone that its analyses have a number for.

    Raises:
        ValueError: a file of them is damaged.
    """
    frames, figures_ = sections.read(directory), sections.of_run(directory)
    dead = dead_lanes.count_dead(frames["analyze"])
    family = claims_table.read(directory)
    judgements = [one for one in family.judgements if claims == "all" or one.values]
    shown = []
    for name, table in sections.write_tables(directory).items():
        section = figures_[name]
        try:
            picture = sections.draw(name, frames, figures_)
        except sections.NothingToDraw:
            # An analysis that left nothing finite to draw still has its table.
            if not dead:
                continue
            nothing = plotting.Picture(lambda _: None, 1, f"{section.title}: nothing to draw")
            picture = plotting.svg(plotting.with_dead(nothing, dead))
        shown.append(html.Analysis(name, section.title, section.paper, section.reading, section.claims, picture, table))
    # What the study is for comes first.
    lead = [shown.pop(0)] if shown and shown[0].name == matrix.MATRIX else []
    return {
        "lead": lead,
        "claims": claims_table.records(judgements),
        "claim_counts": claims_table.counted(judgements) if judgements else "",
        "claim_notes": claims_table.summary(family, judgements, dead=tables.dead_notes(dead)),
        "analyses": shown,
    }
