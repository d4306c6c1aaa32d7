"""The report stage: reads a run directory's results and writes ``report.html``; needs no jax."""

import json
from pathlib import Path

from jaxsafety import runlog
from jaxsafety.report import figures, html, results, tables

_CURVES = {"pretrain": "Pretraining", "tune": "Safety fine-tuning"}
_NOTES = (
    "A verdict is exact: complied is the true output in every judged position, refused is the refusal there, and "
    "everything else is other. The judged block is the first one that holds an unsafe operator, read with the true "
    "tokens before it; for safe prompts both blocks are judged.",
    "All models of a seed are judged on the same prompts, drawn from keys that no training stream uses. In a small "
    "world some of them occur in training all the same, by chance.",
)


def write(directory: Path) -> str:
    """Writes ``report.html`` of a run and returns the result table, and where the report is, as text.

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
    manifest = runlog.read_manifest(directory)
    html.write_report(
        report,
        title=f"jaxsafety study: {directory.name}",
        table=table,
        verdicts=verdicts,
        figures=drawn,
        examples=json.loads((folder / "examples.json").read_text()),
        config_yaml=(directory / "config.yaml").read_text(),
        manifest=manifest,
        notes=_NOTES,
    )
    return f"{tables.render_text(table)}\nreport: {report}\n"
