import importlib
import importlib.util
import math
import os

import numpy as np
import polars as pl
import pytest

import jaxsafety.report
from jaxsafety.report import results


def test_rows_take_numpy_scalars_and_turn_non_finite_into_null(row):
    rows = [row(value=value, seed=np.int32(3)) for value in (np.float32(0.25), math.nan, math.inf, None)]
    frame = results.rows_to_frame(rows)
    assert frame.schema == pl.Schema(results.SCHEMA)
    assert frame["value"].to_list() == [0.25, None, None, None]
    assert frame["seed"].to_list() == [3] * 4


def test_no_rows_make_an_empty_frame_of_the_schema():
    assert results.rows_to_frame([]).schema == pl.Schema(results.SCHEMA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": "loss"}, r"unknown column in result row 'metrics': .*did you mean 'metric'"),
        ({"stage": "evaluation"}, r"unknown stage 'evaluation': .*did you mean 'evaluate'"),
        ({"seed": 1.5}, "column 'seed' got 1.5: expected Int64"),
        ({"value": "0.5"}, "column 'value' got '0.5': expected Float64"),
        ({"condition": None}, "column 'condition' got None: expected String"),
        ({"lr": math.nan}, "column 'lr' got nan: expected a finite number"),
    ],
)
def test_bad_rows_are_refused_with_one_sentence(row, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        results.rows_to_frame([row(), row(**change)])
    assert "\n" not in str(caught.value)


def test_missing_column_is_named(row):
    short = row()
    del short["step"]
    with pytest.raises(ValueError, match="missing column 'step'"):
        results.rows_to_frame([short])


def test_parquet_round_trip_concatenates_in_order(tmp_path, row):
    first, second = (results.rows_to_frame([row(seed=seed), row(seed=seed, value=math.nan)]) for seed in (7, 2))
    results.write_results(tmp_path / "new" / "a.parquet", first)
    results.write_results(str(tmp_path / "b.parquet"), second)
    back = results.read_results([tmp_path / "new" / "a.parquet", tmp_path / "b.parquet"])
    assert back.equals(pl.concat([first, second]))
    assert results.read_results([]).height == 0


def test_failed_write_keeps_the_old_file_and_leaves_no_temporary(tmp_path, row, monkeypatch):
    path = tmp_path / "a.parquet"
    results.write_results(path, results.rows_to_frame([row()]))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.write_results(path, results.rows_to_frame([row(), row(seed=1)]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_and_foreign_files_are_named(tmp_path, row):
    path = tmp_path / "a.parquet"
    results.write_results(path, results.rows_to_frame([row()]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable Parquet file"):
        results.read_results([path])
    pl.DataFrame({"x": [1]}).write_parquet(path)
    with pytest.raises(ValueError, match=r"unknown column in .*a\.parquet 'x'"):
        results.read_results([path])


def test_wrong_type_in_a_frame_is_refused_before_writing(tmp_path, row):
    frame = results.rows_to_frame([row()]).with_columns(pl.col("seed").cast(pl.Int32))
    with pytest.raises(ValueError, match="column 'seed' has type Int32, expected Int64"):
        results.write_results(tmp_path / "a.parquet", frame)
    assert not list(tmp_path.iterdir())


def test_missing_extra_names_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "polars" else object())
    with pytest.raises(ImportError, match=r'needs polars: pip install "jaxsafety\[report\]"'):
        importlib.reload(jaxsafety.report)
