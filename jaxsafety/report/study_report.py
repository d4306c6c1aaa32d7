"""The report stage: reads a run directory's results and writes ``report.html``."""

import json
from pathlib import Path
from typing import Any, Literal

from jaxsafety.report import claims_table, dead_lanes, figures, html, plotting, sections, tables
from jaxsafety.rundir import manifest_file, results
from jaxsafety.rundir.printed import Form

_CURVES = {"pretrain": "Pretraining", "tune": "Safety fine-tuning"}
_NOTES = (
    "A verdict is exact: complied is the true output in every judged position, refused is the refusal there, and "
    "everything else is other. The judged block is the first one that holds an unsafe operator, read with the true "
    "tokens before it; for safe prompts both blocks are judged.",
    "All models of a seed are judged on the same prompts, drawn from keys that no training stream uses. In a small "
    "world some of them occur in training all the same, by chance.",
)


def write(directory: Path, *, form: Form = "table") -> str:
    """Writes ``report.html`` of a run and returns the result table, with where the report is behind a table for people.

    Claims and analyses, and the tables beside them, are there if the run has been analysed.

    Raises:
        ValueError: the run has not been evaluated.
    """
    folder = directory / "results"
    if not (folder / "evaluate.parquet").exists():
        raise ValueError(f"no results in {directory}: run `jaxsafety evaluate` on it first")
    evaluated, curves = (results.read_results([folder / f"{name}.parquet"]) for name in ("evaluate", "curves"))
    table, verdicts = tables.study_table(evaluated), tables.verdict_table(evaluated)
    band = "mean over seeds in a band from the lowest to the highest"
    drawn = {f"{title}: {band}": figures.learning_curves(curves, stage=stage) for stage, title in _CURVES.items()}
    drawn["Complied, refused or other, by model and condition"] = figures.verdict_bars(verdicts)
    report = directory / "report.html"
    manifest = manifest_file.read_manifest(directory)
    html.write_report(
        report,
        title=f"jaxsafety study: {directory.resolve().name}",
        table=table,
        verdicts=verdicts,
        figures=drawn,
        examples=_examples(folder / "examples.json"),
        config_yaml=(directory / "config.yaml").read_text(),
        manifest=manifest,
        notes=_NOTES,
        **(analysed(directory) if (folder / "analyze.parquet").exists() else {}),
    )
    return tables.render(table, form) + (f"\nreport: {report}\n" if form == "table" else "")


def _examples(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: remove it and run its stage again, which writes it anew") from error


def analysed(directory: Path, *, claims: Literal["all", "measured"] = "all") -> dict[str, Any]:
    """Returns what a report says about the analyses of a run, by argument of ``write_report``; writes their tables.

    Claims are all, or those alone that its analyses have a number for.

    Raises:
        ValueError: there are none, or a file of them is damaged.
    """
    frames, figures_ = sections.read(directory), sections.of_run(directory)
    dead = dead_lanes.count_dead(frames["analyze"])
    judgements = [one for one in claims_table.read(directory) if claims == "all" or one.values]
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
    return {
        "claims": claims_table.records(judgements),
        "claim_notes": claims_table.summary(judgements, dead=tables.dead_notes(dead)),
        "analyses": shown,
    }
