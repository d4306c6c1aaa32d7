"""The report stage: reads a run directory's results and writes ``report.html``; needs no jax."""

import json
from pathlib import Path

from jaxsafety import runlog
from jaxsafety.report import figures, html, results, tables

_CURVES = {"pretrain": "Pretraining", "tune": "Safety fine-tuning"}
_NOTES = (
    "A verdict is exact: complied is the true output in every judged position, refused is the refusal there, and "
    "everything else is other. The judged block is the first one that holds an unsafe operator; for safe prompts both "
    "blocks are. Teacher-forced exact match of a block equals greedy decoding of it.",
    "All models of a seed are judged on the same fresh prompts, which no training stream draws from.",
)


def write(directory: Path) -> str:
    """Writes ``report.html`` of a run and returns the result table, and where the report is, as text.

    Raises:
        ValueError: the run has not been evaluated.
    """
    folder = directory / "results"
    paths = {name: folder / name for name in ("evaluate.parquet", "curves.parquet", "examples.json")}
    if not all(path.exists() for path in paths.values()):
        raise ValueError(f"no results in {directory}: run `jaxsafety evaluate` on it first")
    evaluated, curves = (results.read_results([paths[name]]) for name in ("evaluate.parquet", "curves.parquet"))
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
        examples=json.loads(paths["examples.json"].read_text()),
        config_yaml=(directory / "config.yaml").read_text(),
        manifest=manifest,
        notes=_NOTES,
    )
    return f"{tables.render_text(table)}\nreport: {report}\n"
