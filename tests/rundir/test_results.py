import importlib
import importlib.util
import math
import os
import re

import numpy as np
import polars as pl
import pytest

import jaxsafety.report
from jaxsafety.rundir import results


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


@pytest.fixture
def analysis_row():
    """Builds one valid row of an analysis; keywords replace columns."""
    base = {
        "run": "r0",
        "revision": "abc1234",
        "device": "cpu",
        "analysis": "clusters",
        "method": "sft",
        "lr_name": "eta_M",
        "lr": 1e-3,
        "seed": 0,
        "step": 100,
        "condition": "unsafe",
        "subset": "successful",
        "layer": 1,
        "part": "last",
        "strength": 0.5,
        "metric": "tau",
        "value": -0.25,
    }
    return lambda **changed: base | changed


def test_analysis_rows_keep_their_nulls_in_a_round_trip(tmp_path, analysis_row):
    rows = [analysis_row(), analysis_row(layer=None, strength=None, value=math.inf), analysis_row(layer=np.int64(2))]
    frame = results.rows_to_frame(rows, schema=results.ANALYSIS_SCHEMA)
    results.write_results(tmp_path / "a.parquet", frame, schema=results.ANALYSIS_SCHEMA)
    back = results.read_results([tmp_path / "a.parquet"], schema=results.ANALYSIS_SCHEMA)
    assert back.schema == pl.Schema(results.ANALYSIS_SCHEMA)
    assert back.select("layer", "strength", "value").rows() == [(1, 0.5, -0.25), (None, None, None), (2, 0.5, -0.25)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subset": ""}, "unknown subset '': expected one of all, successful"),
        ({"layer": 0.5}, "column 'layer' got 0.5: expected Int64"),
        ({"strength": math.nan}, "column 'strength' got nan: expected a finite number"),
        ({"part": None}, "column 'part' got None: expected String"),
        ({"stage": "analyze"}, "unknown column in result row 'stage'"),
    ],
)
def test_bad_analysis_rows_are_refused(analysis_row, change, message):
    with pytest.raises(ValueError, match=message):
        results.rows_to_frame([analysis_row(**change)], schema=results.ANALYSIS_SCHEMA)


def test_a_file_of_the_other_schema_is_refused(tmp_path, row, analysis_row):
    frame = results.rows_to_frame([analysis_row()], schema=results.ANALYSIS_SCHEMA)
    with pytest.raises(ValueError, match="unknown column in frame 'analysis'"):
        results.write_results(tmp_path / "a.parquet", frame)
    results.write_results(tmp_path / "e.parquet", results.rows_to_frame([row()]))
    with pytest.raises(ValueError, match=r"unknown column in .*e\.parquet 'stage'"):
        results.read_results([tmp_path / "e.parquet"], schema=results.ANALYSIS_SCHEMA)


def test_columns_in_another_order_are_put_in_order(tmp_path, row):
    frame = results.rows_to_frame([row()])
    results.write_results(tmp_path / "a.parquet", frame.select(frame.columns[::-1]))
    assert results.read_results([tmp_path / "a.parquet"]).equals(frame)


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
    with pytest.raises(ValueError, match=r"a\.parquet is damaged: remove it and run its stage again"):
        results.read_results([path])
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable Parquet file: remove it"):
        results.read_results([path])
    pl.DataFrame({"x": [1]}).write_parquet(path)
    with pytest.raises(ValueError, match=r"unknown column in .*a\.parquet 'x'"):
        results.read_results([path])


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, row):
    """Wherever it is: without the digest, polars gives other values, a traceback or aborts the process."""
    path, frame = tmp_path / "a.parquet", results.rows_to_frame([row(), row(seed=1)])
    results.write_results(path, frame)
    whole = path.read_bytes()
    refused, tried = 0, range(0, len(whole), 3)
    for place in tried:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert results.read_results([path]).equals(frame)
        except ValueError as error:
            assert re.search(r"a\.parquet is (damaged|not a readable Parquet file): remove it and run", str(error))
            refused += 1
    assert refused > 0.9 * len(tried)


def test_files_of_other_writers_are_read(tmp_path, row):
    frame = results.rows_to_frame([row()])
    frame.write_parquet(tmp_path / "a.parquet")
    assert results.read_results([tmp_path / "a.parquet"]).equals(frame)


def test_wrong_type_in_a_frame_is_refused_before_writing(tmp_path, row):
    frame = results.rows_to_frame([row()]).with_columns(pl.col("seed").cast(pl.Int32))
    with pytest.raises(ValueError, match="column 'seed' has type Int32, expected Int64"):
        results.write_results(tmp_path / "a.parquet", frame)
    assert not list(tmp_path.iterdir())


def test_missing_extra_names_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "polars" else object())
    with pytest.raises(ImportError, match=r'needs polars: pip install ".\[report\]" in a checkout'):
        importlib.reload(jaxsafety.report)
