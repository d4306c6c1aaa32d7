"""The comparison of two runs: a difference that was put in comes out, and runs that cannot be paired are refused."""

import polars as pl
import pytest

from experiments import compare_runs

SEEDS = (0, 1, 2)


def _write(folder, shifts, *, steps=(5, 10)):
    """Results of one model: every rate and loss 0.5, moved by the seed's shift at the last step."""
    (folder / "results").mkdir(parents=True)
    columns = [*compare_runs.COLUMNS.values(), *compare_runs._CURVES]
    for name, at in (("evaluate", steps[-1:]), ("curves", steps)):
        rows = [
            {"method": "sft", "lr_name": "eta_M", "step": step, "seed": seed, "condition": condition}
            | {"metric": metric, "value": 0.5 + shift * (step == steps[-1])}
            for condition, metric in dict.fromkeys(columns)
            for step in at
            for seed, shift in zip(SEEDS, shifts, strict=True)
        ]
        pl.DataFrame(rows).write_parquet(folder / "results" / f"{name}.parquet")
    return str(folder)


def test_a_run_agrees_with_itself_and_a_shift_shows(tmp_path, capsys):
    run = _write(tmp_path / "a", (0.0, 0.1, 0.2))
    compare_runs.main([run, run])
    same = capsys.readouterr().out
    assert "7 differences, 7 of them 0 in every seed. Intervals without 0: 0 at 95 %" in same
    # 0.1, 0.11 and 0.12 more: half width 4.303 * 0.01 / sqrt(3) = 0.0248; a curve of two points is moved by half of it.
    compare_runs.main([run, _write(tmp_path / "b", (0.1, 0.21, 0.32))])
    moved = capsys.readouterr().out
    assert moved.count("+11.0 [+8.5, +13.5] (10.0)") == 7
    assert "7 differences, 0 of them 0 in every seed. Intervals without 0: 7 at 95 %" in moved
    assert "| sft eta_M | loss | 0.550 | +0.0550 [+0.0426, +0.0674] | 0.0500 | 1 of 2 |" in moved


def test_runs_of_other_steps_are_refused(tmp_path):
    runs = [_write(tmp_path / "a", (0.0, 0.1, 0.2)), _write(tmp_path / "b", (0.0, 0.1, 0.2), steps=(5, 10, 15))]
    with pytest.raises(ValueError, match="compare runs of one recipe"):
        compare_runs.main(runs)
