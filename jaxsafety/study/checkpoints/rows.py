"""Rows of the analyses of checkpoints: those of the synthetic study, of one model and one seed.

Where a value is a mean over prompts, or compares two means of them, ``METRIC_low`` and ``METRIC_high`` are its 95 %
Student-t interval over them, of a share of verdicts the exact one, and ``METRIC_n`` their number.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from jaxsafety.claims.intervals import Interval, share_interval, student_interval
from jaxsafety.recipe.lane import Lane
from jaxsafety.rundir import results

_ABSENT: dict[str, Any] = {"condition": "", "subset": "all", "layer": None, "part": "", "strength": None}


def frame(values: Mapping[tuple[str, str], Any], *, labels: Mapping[str, Any], **columns: Any) -> pl.DataFrame:
    """Returns rows of values by (analysis, metric); what is not finite is undefined and left out.

    Values are numbers, or arrays of one length, along which ``columns`` ``[rows]`` vary; ``labels`` are columns that
    are the same for all rows: those of the run and the model, and more.
    """
    shared, found = _ABSENT | dict(labels), {name: [] for name in results.ANALYSIS_SCHEMA}
    for (analysis, metric), given in values.items():
        array = np.atleast_1d(np.asarray(given, np.float64))
        kept = np.isfinite(array)
        varied = {name: np.asarray(column)[kept].tolist() for name, column in columns.items()}
        same = shared | {"analysis": analysis, "metric": metric}
        varied["value"] = array[kept].tolist()
        for name, cells in found.items():
            cells += varied[name] if name in varied else [same[name]] * len(varied["value"])
    return pl.DataFrame(found, schema=results.ANALYSIS_SCHEMA)


def means(values: Mapping[tuple[str, str], np.ndarray], *, labels: Mapping[str, Any]) -> pl.DataFrame:
    """Returns rows of the means of values ``[prompts]`` by (analysis, metric), each with its interval and number.

    What is not finite is left out of the mean and of the number. For ``labels`` see :func:`frame`.
    """
    intervals = {key: student_interval(np.asarray(given, float).tolist()) for key, given in values.items()}
    return _with_intervals(intervals, labels=labels)


def shares(cases: Mapping[tuple[str, str], np.ndarray], *, labels: Mapping[str, Any]) -> pl.DataFrame:
    """Returns rows of the shares of prompts ``[prompts]`` that are true, each with its exact interval and number.

    For ``labels`` see :func:`frame`.
    """
    intervals = {key: share_interval(int(np.sum(own)), len(own)) for key, own in cases.items()}
    return _with_intervals(intervals, labels=labels)


def compared(
    values: Mapping[tuple[str, str], tuple[float, float | None]], n: int, *, labels: Mapping[str, Any]
) -> pl.DataFrame:
    """Returns rows of values by (analysis, metric) that compare two groups of ``n`` prompts, each with its interval.

    Half of its width is given beside each, None if it has none. For ``labels`` see :func:`frame`.
    """
    halves = {key: (value, np.nan if half is None else half) for key, (value, half) in values.items()}
    intervals = {key: Interval(value, value - half, value + half, n) for key, (value, half) in halves.items()}
    return _with_intervals(intervals, labels=labels)


def _with_intervals(intervals: Mapping[tuple[str, str], Interval], *, labels: Mapping[str, Any]) -> pl.DataFrame:
    found = {
        (analysis, metric + end): np.nan if number is None else number
        for (analysis, metric), interval in intervals.items()
        for end, number in zip(("", "_low", "_high", "_n"), interval, strict=True)
    }
    return frame(found, labels=labels)


def write(path: Path, frame: pl.DataFrame) -> None:
    """Writes the rows of one piece, atomically."""
    results.write_results(path, frame, schema=results.ANALYSIS_SCHEMA)


def of_every_seed(frame: pl.DataFrame, lanes: Iterable[Lane], seeds: Sequence[int]) -> pl.DataFrame:
    """Returns rows with those of lanes that are one model for all seeds, which have the first, again for the others."""
    own = [pl.col("method").eq(lane.label) & pl.col("lr_name").eq(lane.point) for lane in lanes]
    shared = frame.filter(pl.any_horizontal(own)) if own else frame.clear()
    return pl.concat([frame, *(shared.with_columns(pl.lit(seed, pl.Int64).alias("seed")) for seed in seeds[1:])])
