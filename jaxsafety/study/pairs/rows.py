"""Rows of the analyses of two checkpoints: those of the synthetic study, of one pair and one seed.

A pair has no seeds: its rows carry seed 0. Where a value is a mean over prompts, or compares two means of them,
``METRIC_low`` and ``METRIC_high`` are its 95 % Student-t interval over them, and ``METRIC_n`` their number.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from jaxsafety.claims.intervals import Interval, student_interval
from jaxsafety.rundir import machine, results
from jaxsafety.rundir.layout import ANALYSIS_FILE

_PIECES = "analyze"
_ABSENT: dict[str, Any] = {
    "lr_name": "", "lr": 0.0, "seed": 0, "step": 0, "condition": "", "subset": "all", "layer": None, "part": "",
    "strength": None,
}  # fmt: skip


def labels(directory: Path) -> dict[str, Any]:
    """Returns what all rows of a run have in common: its name, the revision and the device."""
    about = machine.environment()
    devices = about["devices"]
    device = devices[0] if isinstance(devices, list) else devices
    return {"run": directory.resolve().name, "revision": str(about["revision"]), "device": device}


def frame(
    method: str, values: Mapping[tuple[str, str], Any], *, labels: Mapping[str, Any], **columns: Any
) -> pl.DataFrame:
    """Returns rows of values by (analysis, metric); what is not finite is undefined and left out.

    ``method`` is ``pretrained`` or ``tuned``; values are numbers, or arrays of one length, along which ``columns``
    ``[rows]`` vary; ``labels`` are columns that are the same for all rows.
    """
    shared, found = _ABSENT | dict(labels) | {"method": method}, {name: [] for name in results.ANALYSIS_SCHEMA}
    for (analysis, metric), given in values.items():
        array = np.atleast_1d(np.asarray(given, np.float64))
        kept = np.isfinite(array)
        varied = {name: np.asarray(column)[kept].tolist() for name, column in columns.items()}
        same = shared | {"analysis": analysis, "metric": metric}
        varied["value"] = array[kept].tolist()
        for name, cells in found.items():
            cells += varied[name] if name in varied else [same[name]] * len(varied["value"])
    return pl.DataFrame(found, schema=results.ANALYSIS_SCHEMA)


def means(method: str, values: Mapping[tuple[str, str], np.ndarray], *, labels: Mapping[str, Any]) -> pl.DataFrame:
    """Returns rows of the means of values ``[prompts]`` by (analysis, metric), each with its interval and number.

    What is not finite is left out of the mean and of the number. For ``method`` and ``labels`` see :func:`frame`.
    """
    intervals = {key: student_interval(np.asarray(given, float).tolist()) for key, given in values.items()}
    return _with_intervals(method, intervals, labels=labels)


def compared(
    method: str, values: Mapping[tuple[str, str], tuple[float, float | None]], n: int, *, labels: Mapping[str, Any]
) -> pl.DataFrame:
    """Returns rows of values by (analysis, metric) that compare two groups of ``n`` prompts, each with its interval.

    Half of its width is given beside each, None if it has none. For ``method`` and ``labels`` see :func:`frame`.
    """
    halves = {key: (value, np.nan if half is None else half) for key, (value, half) in values.items()}
    intervals = {key: Interval(value, value - half, value + half, n) for key, (value, half) in halves.items()}
    return _with_intervals(method, intervals, labels=labels)


def _with_intervals(
    method: str, intervals: Mapping[tuple[str, str], Interval], *, labels: Mapping[str, Any]
) -> pl.DataFrame:
    found = {
        (analysis, metric + end): np.nan if number is None else number
        for (analysis, metric), interval in intervals.items()
        for end, number in zip(("", "_low", "_high", "_n"), interval, strict=True)
    }
    return frame(method, found, labels=labels)


def piece(directory: Path, folder: str, name: str) -> Path:
    """Returns where the rows of one piece of an analysis lie."""
    return directory / "results" / _PIECES / folder / f"{name}.parquet"


def write(path: Path, frame: pl.DataFrame) -> None:
    """Writes the rows of one piece, atomically."""
    results.write_results(path, frame, schema=results.ANALYSIS_SCHEMA)


def collect(directory: Path) -> None:
    """Writes ``results/analyze.parquet``: all pieces of all analyses that the directory holds."""
    folder = directory / "results"
    pieces = sorted((folder / _PIECES).glob("*/*.parquet"))
    everything = results.read_results(pieces, schema=results.ANALYSIS_SCHEMA)
    results.write_results(folder / ANALYSIS_FILE, everything, schema=results.ANALYSIS_SCHEMA)
