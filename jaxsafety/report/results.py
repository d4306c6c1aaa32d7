"""Tidy result rows: one value per row, checked, and kept as Parquet.

``SCHEMA`` is the whole format; null stands for a value that was not finite. Rates are in [0, 1].
"""

import io
import math
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from jaxsafety import runlog
from jaxsafety.suggest import check_name

SCHEMA: dict[str, Any] = {
    "run": pl.String,
    "revision": pl.String,
    "device": pl.String,
    "stage": pl.String,
    "method": pl.String,
    "lr_name": pl.String,
    "lr": pl.Float64,
    "seed": pl.Int64,
    "step": pl.Int64,
    "condition": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
}
STAGES = ("pretrain", "tune", "evaluate")
METHODS = {"pretrained": "pretrained", "sft": "SFT", "dpo": "DPO", "unlearn": "unlearn"}


def rows_to_frame(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """Returns the tidy frame of result rows, non-finite values as null.

    Args:
        rows: mappings with exactly the keys of ``SCHEMA``; NumPy and JAX scalars are accepted as numbers.

    Raises:
        ValueError: a missing or unknown column, a value of the wrong type, an unknown stage.
    """
    return pl.DataFrame([_checked(row) for row in rows], schema=SCHEMA, orient="row")


def write_results(path: str | Path, frame: pl.DataFrame) -> None:
    """Writes a tidy frame as Parquet, atomically; parent directories are created.

    Raises:
        ValueError: the frame does not have the columns and types of ``SCHEMA``.
    """
    check_schema(frame, "frame")
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    runlog.atomic_write(Path(path), buffer.getvalue())


def read_results(paths: Iterable[str | Path]) -> pl.DataFrame:
    """Reads result files into one tidy frame, rows in the order given.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is not Parquet, is damaged, or has other columns.
    """
    frames = [pl.DataFrame(schema=SCHEMA)]
    for path in paths:
        data = Path(path).read_bytes()
        try:
            frame = pl.read_parquet(io.BytesIO(data))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: write it again with write_results") from error
        check_schema(frame, str(path))
        frames.append(frame)
    return pl.concat(frames)


def check_schema(frame: pl.DataFrame, what: str) -> None:
    """Refuses a frame whose columns or types are not those of ``SCHEMA``; ``what`` names it in the ValueError."""
    _check_names(frame.schema, what)
    for name, dtype in SCHEMA.items():
        if frame.schema[name] != dtype:
            raise ValueError(f"{what}: column {name!r} has type {frame.schema[name]}, expected {dtype}")


def _checked(row: Mapping[str, Any]) -> tuple[Any, ...]:
    _check_names(row, "result row")
    check_name("stage", row["stage"], STAGES)
    return tuple(_converted(name, row[name], dtype) for name, dtype in SCHEMA.items())


def _converted(name: str, value: Any, dtype: Any) -> str | int | float | None:
    if name == "value" and value is None:
        return None
    if (dtype == pl.String) != isinstance(value, str):
        raise ValueError(f"column {name!r} got {value!r}: expected {dtype}")
    if dtype == pl.String:
        return value
    try:
        number = operator.index(value) if dtype == pl.Int64 else float(value)
    except TypeError as error:
        raise ValueError(f"column {name!r} got {value!r}: expected {dtype}") from error
    if math.isfinite(number):
        return number
    if name == "value":
        return None
    raise ValueError(f"column {name!r} got {value!r}: expected a finite number")


def _check_names(names: Iterable[str], what: str) -> None:
    names = list(names)
    for name in names:
        check_name(f"column in {what}", name, SCHEMA)
    if missing := [name for name in SCHEMA if name not in names]:
        raise ValueError(f"{what}: missing column {missing[0]!r}: expected {', '.join(SCHEMA)}")
