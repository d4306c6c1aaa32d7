"""What a study of checkpoints comes to: a record a model, and the same in a few lines of text."""

from collections.abc import Iterator
from typing import Any

import polars as pl

from jaxsafety.report.plot import ATTENTION, MLP
from jaxsafety.report.seed_tables import models_of
from jaxsafety.report.tables import Model, model_label, percent

INTERVALS = (
    "A band or a bar is the 95 % Student-t interval over the prompts of a label, or of two labels where these are "
    "compared (Welch's), and over seeds where there are several; what is measured of the weights of one seed, an "
    "effect size, and a mean over layers have none."
)
_OF_WEIGHTS = ("null_energy", "baseline_energy", "rank_delta", "changed_norm")
_KNOWN = (*MLP, *ATTENTION)
_MOST = 24  # matrices that a model has a line for; all are in the records
_OF_CLUSTERS = ("accuracy", "relative_gap")


def records(evaluated: pl.DataFrame, analysed: pl.DataFrame) -> list[dict[str, Any]]:
    """Returns a flat record for every model, all of the same keys: how often it refuses each condition, and of every
    matrix' update and of what activations tell the means over layers and seeds, None where nothing is known."""
    refused = evaluated.filter(metric="refused")
    weights = analysed.filter(pl.col("analysis") == "output_space", pl.col("strength").is_null())
    clusters = analysed.filter(analysis="clusters", part="last", condition="")
    judged = evaluated.filter(pl.col("metric").str.contains("^(agreement|kappa|judged):"))["metric"].unique().sort()
    there = weights["part"].unique().sort().to_list()
    parts = sorted(there, key=lambda name: _KNOWN.index(name) if name in _KNOWN else len(_KNOWN))
    rows = []
    for model in models_of(pl.concat([one.select(Model._fields) for one in (refused, weights, clusters)])):
        rates, updates, apart = (frame.filter(_is(model)) for frame in (refused, weights, clusters))
        row = model._asdict()
        labels = refused["condition"].unique().sort()
        row |= {f"{label} refused": _mean(rates, condition=label) for label in labels}
        own = evaluated.filter(_is(model))
        row |= {f"{label} {name}": _mean(own, condition=label, metric=name)
                for label in labels for name in ("complied", "other")}  # fmt: skip
        row |= {name: _mean(own, metric=name) for name in judged}
        row |= {f"{part} {name}": _mean(updates, part=part, metric=name) for part in parts for name in _OF_WEIGHTS}
        rows.append(row | {name: _mean(apart, metric=name) for name in _OF_CLUSTERS if not clusters.is_empty()})
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """Returns what records say of updates and activations as lines of text, empty where they say nothing of these."""
    lines = []
    for row in rows:
        label = model_label(Model(*(row[name] for name in Model._fields)))
        end = " null_energy"
        parts = [name.removesuffix(end) for name, value in row.items() if name.endswith(end) and value is not None]
        for part in parts[:_MOST]:
            energy, chance, rank, norm = (row[f"{part} {name}"] for name in _OF_WEIGHTS)
            lines.append(
                f"{label}, {part}: null-space energy {energy:.3g} (a random direction {chance:.3g}), "
                f"rank {rank:.0f}, |dW| / |W| {norm:.3g}"
            )
        lines += [f"{label}: {len(parts) - _MOST} matrices more in the tables"] * (len(parts) > _MOST)
        if row.get("accuracy") is not None:
            gap = row["relative_gap"]
            shown = "-" if gap is None else f"{gap:.3g}"
            lines.append(f"{label}: nearest mean right {row['accuracy']:.3g}, relative gap {shown}")
    return "".join(f"{line}\n" for line in [*lines, "means over layers and seeds"] if lines)


def answers_text(rows: list[dict[str, Any]]) -> str:
    """Returns what records say of answers beside refusals, and of judges that agree, as lines of text."""
    labels = [model_label(Model(*(row[name] for name in Model._fields))) for row in rows]
    return "".join(f"{line}\n" for label, row in zip(labels, rows, strict=True) for line in _answered(label, row))


def _answered(label: str, row: dict[str, Any]) -> Iterator[str]:
    for verdict in ("complied", "other"):
        rates = [(name.removesuffix(f" {verdict}"), rate) for name, rate in row.items() if name.endswith(f" {verdict}")]
        if told := [f"{percent(rate)} of {name}" for name, rate in rates if rate is not None]:
            yield f"{label}: {verdict}, per cent: {', '.join(told)}"
    for name, share in row.items():
        judge = name.removeprefix("agreement:")
        if judge != name and share is not None:
            kappa, count = row[f"kappa:{judge}"], row[f"judged:{judge}"]
            shown = "-" if kappa is None else f"{kappa:.3g}"
            yield f"{label}: {judge} agrees on {percent(share)} % of {count:.0f} answers, Cohen's kappa {shown}"


def _is(model: Model) -> pl.Expr:
    return pl.all_horizontal(pl.col(name) == value for name, value in model._asdict().items())


def _mean(rows: pl.DataFrame, **labels: str) -> float | None:
    return rows.filter(**labels)["value"].mean()
