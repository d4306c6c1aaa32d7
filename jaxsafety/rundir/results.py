"""Tidy rows: one value per row, checked, and kept as Parquet.

A schema is the whole format: ``SCHEMA`` of result rows (``evaluate.parquet``, ``curves.parquet``; the default
everywhere) and ``ANALYSIS_SCHEMA`` of the rows of the analyses (``analyze.parquet``). A null ``value`` was not finite.
Rates are in [0, 1].
"""

import hashlib
import io
import math
import operator
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from jaxsafety.config.names import check_name
from jaxsafety.rundir import atomic

_RUN = dict.fromkeys(("run", "revision", "device"), pl.String)
_LANE = {"method": pl.String, "lr_name": pl.String, "lr": pl.Float64, "seed": pl.Int64, "step": pl.Int64}
_VALUE = {"metric": pl.String, "value": pl.Float64}
SCHEMA: dict[str, Any] = _RUN | {"stage": pl.String} | _LANE | {"condition": pl.String} | _VALUE
# ``step`` is the tuning step; ``part`` and ``strength`` say what was analysed or done, as the analysis defines it.
_WHAT = {"subset": pl.String, "layer": pl.Int64, "part": pl.String, "strength": pl.Float64}
ANALYSIS_SCHEMA: dict[str, Any] = _RUN | {"analysis": pl.String} | _LANE | {"condition": pl.String} | _WHAT | _VALUE
STAGES = ("pretrain", "tune", "evaluate", "analyze")
# All prompts of a condition, or those that the model complied with.
SUBSETS = ("all", "successful")
METHODS = {"pretrained": "pretrained", "sft": "SFT", "dpo": "DPO", "unlearn": "unlearn"}

_VOCABULARY = {"stage": STAGES, "subset": SUBSETS}
_NULLABLE = ("layer", "strength", "value")
_AGAIN = "remove it and run its stage again, which writes it anew"
# A file's digest is that of its bytes with zeros in its own place.
_DIGEST_KEY = "jaxsafety.sha256"
_NO_DIGEST = b"0" * 64
_DIGEST = re.compile(_DIGEST_KEY.encode() + rb"..([0-9a-f]{64})", re.DOTALL)


def rows_to_frame(rows: Iterable[Mapping[str, Any]], *, schema: Mapping[str, Any] = SCHEMA) -> pl.DataFrame:
    """Returns the tidy frame of rows, non-finite values as null.

    Rows have exactly the keys of ``schema``, NumPy and JAX scalars are accepted as numbers, and ``layer`` and
    ``strength`` may be None.

    Raises:
        ValueError: a missing or unknown column, a value of the wrong type, an unknown stage or subset.
    """
    return pl.DataFrame([_checked(row, schema) for row in rows], schema=schema, orient="row")


def write_results(path: str | Path, frame: pl.DataFrame, *, schema: Mapping[str, Any] = SCHEMA) -> None:
    """Writes a tidy frame as Parquet, atomically; parent directories are created.

    The file's metadata hold a digest of its bytes: Parquet's own checksums are optional, and polars has none.

    Raises:
        ValueError: the frame does not have the columns and types of ``schema``.
    """
    check_schema(frame, "frame", schema=schema)
    buffer = io.BytesIO()
    frame.write_parquet(buffer, metadata={_DIGEST_KEY: _NO_DIGEST.decode()})
    data = buffer.getvalue()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic.atomic_write(Path(path), data.replace(_NO_DIGEST, hashlib.sha256(data).hexdigest().encode()))


def read_results(paths: Iterable[str | Path], *, schema: Mapping[str, Any] = SCHEMA) -> pl.DataFrame:
    """Reads files of one schema into one tidy frame, rows in the order given.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is not Parquet, is damaged, or has other columns.
    """
    frames = [pl.DataFrame(schema=schema)]
    for path in paths:
        frame = _read(Path(path))
        check_schema(frame, str(path), schema=schema)
        frames.append(frame.select(list(schema)))
    return pl.concat(frames)


def _read(path: Path) -> pl.DataFrame:
    data = path.read_bytes()
    # Before polars sees it, which may abort the process over a damaged file. Files of other writers have no digest.
    for digest in _DIGEST.findall(data):
        if hashlib.sha256(data.replace(digest, _NO_DIGEST)).hexdigest().encode() != digest:
            raise ValueError(f"{path} is damaged: {_AGAIN}")
    try:
        return pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {_AGAIN}") from error


def check_schema(frame: pl.DataFrame, what: str, *, schema: Mapping[str, Any] = SCHEMA) -> None:
    """Refuses a frame whose columns or types are not those of ``schema``; ``what`` names it in the ValueError."""
    _check_names(frame.schema, what, schema)
    for name, dtype in schema.items():
        if frame.schema[name] != dtype:
            raise ValueError(f"{what}: column {name!r} has type {frame.schema[name]}, expected {dtype}")


def _checked(row: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[Any, ...]:
    _check_names(row, "result row", schema)
    return tuple(_converted(name, row[name], dtype) for name, dtype in schema.items())


def _converted(name: str, value: Any, dtype: Any) -> str | int | float | None:
    if name in _NULLABLE and value is None:
        return None
    if (dtype == pl.String) != isinstance(value, str):
        raise ValueError(f"column {name!r} got {value!r}: expected {dtype}")
    if dtype == pl.String:
        if name in _VOCABULARY:
            check_name(name, value, _VOCABULARY[name])
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


def _check_names(names: Iterable[str], what: str, schema: Mapping[str, Any]) -> None:
    names = list(names)
    if set(names) == set(schema):
        return
    for name in names:
        check_name(f"column in {what}", name, schema)
    if missing := [name for name in schema if name not in names]:
        raise ValueError(f"{what}: missing column {missing[0]!r}: expected {', '.join(schema)}")
