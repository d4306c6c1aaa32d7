"""The report of two checkpoints: ``report.html`` from what their analyses have left in the run directory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from jaxsafety.config import yaml12
from jaxsafety.formats import prompts
from jaxsafety.report import html, study_report, tables
from jaxsafety.report.plot import ATTENTION, MLP
from jaxsafety.report.tables import Model, VerdictRow
from jaxsafety.rundir import manifest_file, results

_MODELS = {"pretrained": Model("pretrained", "", 0.0), "tuned": Model("tuned", "", 0.0)}
_INTERVALS = (
    "A band or a bar is the 95 % Student-t interval over the prompts of a label, or of two labels where these are "
    "compared (Welch's); what is measured of weights, an effect size, and a mean over layers have none."
)
_NOTES = (
    "Two checkpoints are one pair: the claims are those of the synthetic study that apply, with the number that this "
    "pair has; an interval over seeds, which would decide them, it has not.",
    "Activations are the MLP's inputs after its norm, as in the paper's experiments on real models, at the last token "
    "of the prompt and, where answers were written, in the mean over the answer's tokens. The means of safe and unsafe "
    "prompts that a prompt is measured with are those of the other half of the prompts.",
    "An answer counts as refused if it begins like a refusal in English (a list of openings), else as complied: "
    "whether it is of any use is not judged.",
)
_EXAMPLES = 2  # of every label


def write(directory: Path) -> str:
    """Writes ``report.html`` of a pair and returns its main numbers, and where the report is, as text.

    Raises:
        ValueError: there are no analyses, or a file of them is damaged.
    """
    frame = results.read_results([directory / "results" / "analyze.parquet"], schema=results.ANALYSIS_SCHEMA)
    config = (directory / "config.yaml").read_text()
    sides = yaml12.load(config)["pair"]
    options = [directory / f"{name}.yaml" for name in ("weights", "activations")]
    recorded = [f"{path.stem}:\n{path.read_text()}" for path in options if path.exists()]
    report = directory / "report.html"
    html.write_report(
        report,
        title="Two checkpoints: " + " and ".join(_names([Path(side["directory"]) for side in sides.values()])),
        table=[],
        verdicts=_verdicts(frame),
        figures={},
        examples=_examples(directory / "results" / "answers.jsonl"),
        config_yaml="\n".join([config, *recorded]),
        manifest=manifest_file.read_manifest(directory),
        notes=_NOTES,
        intervals=_INTERVALS,
        **study_report.analysed(directory, claims="measured"),
    )
    return f"{summary(frame)}report: {report}\n"


def _names(directories: Sequence[Path]) -> list[str]:
    """Their names, with those of their folders where the names are alike, as of two runs' ``model``."""
    alike = len({directory.name for directory in directories}) < len(directories)
    return [f"{directory.parent.name}/{directory.name}" if alike else directory.name for directory in directories]


def summary(frame: pl.DataFrame) -> str:
    """The main numbers of a pair as lines of text: of every matrix, and of every model; means over layers."""
    lines = []
    weights = frame.filter(pl.col("analysis") == "output_space", pl.col("strength").is_null())
    for part in (name for name in (*MLP, *ATTENTION) if name in weights["part"]):
        mean = _means(weights.filter(pl.col("part") == part))
        lines.append(
            f"{part:>4}: null-space energy {mean('null_energy')} (a random direction {mean('baseline_energy')}), "
            f"rank {mean('rank_delta', '.0f')}, |dW| / |W| {mean('changed_norm')}"
        )
    for method in ("pretrained", "tuned"):
        seen = frame.filter(analysis="clusters", method=method, part="last", condition="")
        if not seen.is_empty():
            mean = _means(seen)
            lines.append(f"{method}: nearest mean right {mean('accuracy')}, relative gap {mean('relative_gap')}")
    return "".join(f"{line}\n" for line in [*lines, "means over layers"] if lines)


def _means(rows: pl.DataFrame):
    found = {key[0]: own["value"].drop_nulls() for key, own in rows.group_by("metric")}

    def mean(metric: str, spec: str = ".3g") -> str:
        values = found.get(metric)
        return "-" if values is None or values.is_empty() else f"{values.mean():{spec}}"

    return mean


def _verdicts(frame: pl.DataFrame) -> list[VerdictRow]:
    names = ["method", "condition", "complied", "refused", "complied_n"]
    wide = frame.filter(analysis="verdicts").pivot("metric", index=names[:2], values="value")
    return [
        VerdictRow(_MODELS[method], condition, complied, refused, other=0.0, n=int(n), dead=0)
        for method, condition, complied, refused, n in (wide.select(names).iter_rows() if wide.height else ())
    ]


def _examples(path: Path) -> list[dict[str, Any]]:
    """The first prompts of every label, with the answers of both models."""
    if not path.exists():
        return []
    try:
        # Not by splitlines, which takes characters of a text, such as U+2028, for the end of a line.
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        labels = dict.fromkeys(row["label"] for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        layers = path.parent / "analyze" / "activations"
        raise ValueError(
            f"{path} is not JSON lines: remove {layers} and run `jaxsafety analyze activations` again"
        ) from error
    chosen = [row for label in labels for row in [own for own in rows if own["label"] == label][:_EXAMPLES]]
    return [
        {
            "condition": row["label"],
            "prompt": row["prompt"] if "prompt" in row else "\n".join(turn["content"] for turn in row["messages"]),
            "answers": [_answer(method, row[method]) for method in _MODELS],
        }
        for row in chosen
    ]


def _answer(method: str, answer: str) -> dict[str, str]:
    verdict = "refused" if prompts.is_refusal(answer) else "complied"
    return {"model": tables.model_label(_MODELS[method]), "answer": answer, "verdict": verdict}
