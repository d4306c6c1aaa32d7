"""``python -m experiments.compare_runs RUN OTHER``: do two runs of one recipe agree, within what seeds differ by?

Differences OTHER - RUN are paired over the seeds: both runs give a seed the same initial parameters, data and prompts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from jaxsafety.claims.intervals import Interval, student_interval
from jaxsafety.report.tables import COLUMNS

_MODEL = ["method", "lr_name"]
_CURVES = (("train", "loss"), ("safe", "exact_match"), ("unsafe", "refused"))


def main(arguments: Sequence[str]) -> None:
    """Prints the final table's differences in points, then those of the learning curves."""
    run, other = arguments
    table, curves = (_paired(_read(run, name), _read(other, name)) for name in ("evaluate", "curves"))
    print(final_table(table), end="\n\n")
    print(curve_table(curves))


def _read(run: str, name: str) -> pl.DataFrame:
    return pl.read_parquet(Path(run) / "results" / f"{name}.parquet")


def _paired(left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    """Returns ``left`` and ``right``, the values of two runs, by model, step, condition, metric and seed."""
    keys = [*_MODEL, "step", "condition", "metric", "seed"]
    columns = (rows.select(*keys, pl.col("value").alias(side)) for rows, side in ((left, "left"), (right, "right")))
    joined = next(columns).join(next(columns), on=keys, maintain_order="left")
    if not len(joined) == len(left) == len(right):
        raise ValueError("the runs differ in models, steps, metrics or seeds: compare runs of one recipe")
    return joined


def final_table(pairs: pl.DataFrame) -> str:
    """Returns the table's paired differences in points, 95 % intervals, and in brackets the first run's deviation."""
    models = pairs.select(_MODEL).unique(maintain_order=True).rows()
    lines = [f"| model | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    differences = []
    for model in models:
        cells = []
        for column in COLUMNS.values():
            left, right = (100 * side[0] for side in _values(pairs, *model, *column))
            differences.append(right - left)
            cells.append(f"{_shown(student_interval(right - left), '+.1f')} ({np.std(left, ddof=1):.1f})")
        lines.append(f"| {' '.join(model).strip()} | {' | '.join(cells)} |")
    size = len(differences)
    counts = [sum(_excludes_zero(d, level=level) for d in differences) for level in (0.95, 1 - 0.05 / size)]
    same = sum(not d.any() for d in differences)
    lines += ["", f"{size} differences, {same} of them 0 in every seed. Intervals without 0: {counts[0]} at 95 %,"]
    return "\n".join([*lines, f"{counts[1]} at 1 - 0.05 / {size}."])


def curve_table(pairs: pl.DataFrame) -> str:
    """Returns, for every curve, the paired difference of its mean over the steps and how many of its points differ."""
    heads = "model | curve | mean | difference of the mean | deviation over seeds | points without 0"
    lines = [f"| {heads} |", "|---|---|---:|---:|---:|---:|"]
    for model in pairs.select(_MODEL).unique(maintain_order=True).rows():
        for condition, metric in _CURVES:
            left, right = _values(pairs, *model, condition, metric)
            means = np.mean(left, axis=0)
            found = student_interval(np.mean(right - left, axis=0))
            cells = [f"{np.mean(means):.3f}", _shown(found, "+.4f"), f"{np.std(means, ddof=1):.4f}"]
            points = sum(_excludes_zero(point) for point in right - left)
            name = metric if condition == "train" else f"{condition} {metric}"
            cells = [" ".join(model).strip(), name, *cells, f"{points} of {len(left)}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _values(pairs: pl.DataFrame, *wanted: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns both runs' values ``[step, seed]`` of a method, learning rate, condition and metric."""
    names = (*_MODEL, "condition", "metric")
    rows = pairs.filter(pl.col(n) == value for n, value in zip(names, wanted, strict=True)).sort("step", "seed")
    shape = (rows["step"].n_unique(), rows["seed"].n_unique())
    return tuple(rows[side].to_numpy().reshape(shape) for side in ("left", "right"))


def _excludes_zero(differences: np.ndarray, *, level: float = 0.95) -> bool:
    found = student_interval(differences, level=level)
    return found.low > 0 or found.high < 0


def _shown(found: Interval, form: str) -> str:
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


if __name__ == "__main__":
    main(sys.argv[1:])
