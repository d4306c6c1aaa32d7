"""The tables over seeds that figures and CSVs share."""

import math

import numpy as np
import polars as pl
import pytest

from jaxsafety.report import seed_tables
from jaxsafety.rundir import results

# Student's t, 0.975 quantile, from a printed table (Abramowitz and Stegun, table 26.10).
T_2 = 4.303
TABLE_DIGITS = 5e-4


def rows(values, **labels):
    """Tidy rows of one quantity, a value per seed."""
    blank = {"run": "r", "revision": "a", "device": "cpu", "analysis": "clusters", "method": "sft", "lr_name": "eta_M"}
    blank |= {"lr": 1e-3, "step": 9, "condition": "safe", "subset": "all", "layer": 0, "part": "last", "strength": None}
    return [blank | {"metric": "tau"} | labels | {"seed": seed, "value": value} for seed, value in enumerate(values)]


def frame(*groups):
    return results.rows_to_frame([row for group in groups for row in group], schema=results.ANALYSIS_SCHEMA)


def test_one_row_per_quantity_with_mean_interval_and_every_seed():
    table = seed_tables.seed_table(frame(rows([1.0, 2.0, 6.0]), rows([5.0, 5.0, 5.0], layer=1)))
    assert table.columns == [*seed_tables.LABELS, "mean", "low", "high", "n", "seed_0", "seed_1", "seed_2"]
    first, second = table.to_dicts()
    assert (first["mean"], first["n"], first["seed_0"], first["seed_2"]) == (3.0, 3, 1.0, 6.0)
    half = T_2 * math.sqrt(7) / math.sqrt(3)
    assert first["high"] - 3 == pytest.approx(half, rel=TABLE_DIGITS)
    assert 3 - first["low"] == pytest.approx(half, rel=TABLE_DIGITS)
    assert (second["low"], second["mean"], second["high"]) == (5.0, 5.0, 5.0)


def test_dead_seeds_are_null_and_left_out():
    (row,) = seed_tables.seed_table(frame(rows([1.0, None, float("nan")]))).to_dicts()
    assert (row["mean"], row["low"], row["high"], row["n"]) == (1.0, None, None, 1)
    assert row["seed_1"] is None and row["seed_2"] is None
    (row,) = seed_tables.seed_table(frame(rows([None, None]))).to_dicts()
    assert (row["mean"], row["n"]) == (None, 0)


def test_a_seed_without_the_quantity_is_null():
    table = seed_tables.seed_table(frame(rows([1.0, 2.0]), rows([3.0], layer=1)))
    assert table["seed_1"].to_list() == [2.0, None]


def test_intervals_of_shares_stay_shares_and_others_do_not():
    values = [0.0, 0.0, 1.0]
    share, other = seed_tables.seed_table(frame(rows(values, metric="complied"), rows(values))).to_dicts()
    assert (share["low"], share["high"]) == (0.0, 1.0)
    assert other["low"] < 0 and other["high"] > 1


def test_an_interval_of_a_share_that_rows_bring_stays_one():
    own = (rows([0.9], metric="accuracy"), rows([0.7], metric="accuracy_low"), rows([1.1], metric="accuracy_high"))
    (row,) = seed_tables.seed_table(frame(*own, rows([9.0], metric="accuracy_n"))).to_dicts()
    assert (row["low"], row["mean"], row["high"], row["n"]) == (0.7, 0.9, 1.0, 9)


def test_rows_of_two_runs_are_refused():
    with pytest.raises(ValueError, match="two values of clusters/tau for sft eta_M seed 0: expected one"):
        seed_tables.seed_table(frame(rows([1.0]), rows([2.0])))


def test_order_does_not_hang_on_the_order_of_rows():
    mixed = frame(rows([1.0], method="unlearn"), rows([1.0], method="pretrained", lr_name=""), rows([1.0], lr_name="x"))
    table = seed_tables.seed_table(mixed)
    assert table["method"].to_list() == ["pretrained", "sft", "unlearn"]
    assert table.equals(seed_tables.seed_table(mixed.reverse()))


def test_an_empty_frame_gives_an_empty_table():
    assert seed_tables.seed_table(pl.DataFrame(schema=results.ANALYSIS_SCHEMA)).is_empty()


def test_means_over_layers_are_each_seeds_own():
    layers = np.array([[1.0, 2.0, 4.0], [3.0, 6.0, 8.0]])
    tidy = frame(*(rows(list(values), layer=layer) for layer, values in enumerate(layers)))
    table = seed_tables.seed_table(seed_tables.with_layer_means(tidy))
    means = seed_tables.pick(table, layer=None)
    assert means.select("seed_0", "seed_1", "seed_2").row(0) == tuple(layers.mean(axis=0))
    assert table.height == 3


def test_a_seed_that_lacks_a_layer_has_no_mean():
    tidy = frame(rows([1.0, 1.0, 1.0]), rows([3.0, None], layer=1))
    means = seed_tables.pick(seed_tables.seed_table(seed_tables.with_layer_means(tidy)), layer=None)
    assert means.select("seed_0", "seed_1", "seed_2").row(0) == (2.0, None, None)


def test_rows_without_layers_have_no_second_mean():
    assert seed_tables.with_layer_means(frame(rows([1.0], layer=None))).height == 1


def test_pick_takes_values_tuples_and_null():
    table = seed_tables.seed_table(frame(rows([1.0]), rows([2.0], layer=1), rows([3.0], layer=None)))
    assert seed_tables.pick(table, layer=(0, 1))["mean"].sort().to_list() == [1.0, 2.0]
    assert seed_tables.pick(table, layer=None)["mean"].to_list() == [3.0]
    assert seed_tables.pick(table, layer=1, metric="tau")["mean"].to_list() == [2.0]


def test_features_prefer_those_of_the_paper():
    last, response = frame(rows([1.0])), frame(rows([1.0], part="response"))
    assert seed_tables.features_of(last) == "last"
    assert seed_tables.features_of(last.vstack(response)) == "response"


def test_intervals_over_prompts_stand_in_the_place_of_those_over_seeds():
    own = [rows([value], metric=f"tau_{name}") for name, value in {"low": 0.5, "high": 2.5, "n": 40.0}.items()]
    table = seed_tables.seed_table(frame(rows([1.5]), rows([1.0, 2.0, 3.0], condition="unsafe"), *own))
    assert table["metric"].to_list() == ["tau", "tau"]
    given, over_seeds = (seed_tables.pick(table, condition=name) for name in ("safe", "unsafe"))
    assert given.select("mean", "low", "high", "n").row(0) == (1.5, 0.5, 2.5, 40)
    assert over_seeds["n"][0] == 3 and over_seeds["low"][0] == pytest.approx(2 - T_2 / math.sqrt(3), abs=1e-3)


def bounded(values, bounds):
    """A mean over prompts of every seed, with its interval and number where there is one."""
    ends = {"low": 0, "high": 1, "n": 2}
    own = [{seed: one[place] for seed, one in enumerate(bounds) if one} for place in ends.values()]
    ends = [row | {"value": found[row["seed"]]} for name, found in zip(ends, own, strict=True)
            for row in rows(values, metric=f"tau_{name}") if row["seed"] in found]  # fmt: skip
    return [*rows(values), *ends]


def summary(*given):
    (row,) = seed_tables.seed_table(frame(*given)).to_dicts()
    return tuple(row[name] for name in ("mean", "low", "high", "n"))


def test_an_interval_that_all_seeds_share_is_theirs():
    """As of a checkpoint that is one for all seeds."""
    assert summary(bounded([1.5] * 3, [(0.5, 2.5, 40.0)] * 3)) == (1.5, 0.5, 2.5, 40)


def test_seeds_with_intervals_of_their_own_have_one_over_seeds():
    mean, low, high, n = summary(bounded([1.0, 2.0, 3.0], [(0.5, 1.5, 40.0), (1.5, 2.5, 40.0), (2.5, 3.5, 40.0)]))
    assert (mean, n) == (2.0, 3) and high - mean == pytest.approx(mean - low)
    assert mean - low == pytest.approx(T_2 / math.sqrt(3), rel=TABLE_DIGITS)
    # One bound or the number that differs is enough.
    for other in ((0.4, 2.5, 40.0), (0.5, 2.6, 40.0), (0.5, 2.5, 39.0)):
        assert summary(bounded([1.5, 1.5], [(0.5, 2.5, 40.0), other])) == (1.5, 1.5, 1.5, 2)


def test_a_seed_without_an_interval_leaves_the_others_none():
    assert summary(bounded([1.5, 1.5], [(0.5, 2.5, 40.0), None])) == (1.5, 1.5, 1.5, 2)
    assert summary(bounded([1.5, None], [(0.5, 2.5, 40.0), None])) == (1.5, None, None, 1)


def test_models_that_agree_in_one_quantity_by_chance_are_not_one():
    """As in a share of few prompts; one that all seeds do share stands beside them."""
    alike = bounded([1.5, 1.5], [(0.5, 2.5, 40.0)] * 2)
    other = [row | {"layer": None} for row in bounded([1.0, 2.0], [(0.5, 1.5, 40.0), (1.5, 2.5, 40.0)])]
    shared = [row | {"method": "pretrained"} for row in alike]
    table = seed_tables.seed_table(frame(alike, other, shared))
    assert set(table.select("method", "layer", "n").rows()) == {("pretrained", 0, 40), ("sft", 0, 2), ("sft", None, 2)}


def test_means_over_layers_have_no_interval_over_prompts():
    tidy = frame(bounded([1.0, 3.0], [(0.5, 1.5, 40.0)] * 2), rows([3.0, 5.0], layer=1))
    table = seed_tables.seed_table(seed_tables.with_layer_means(tidy))
    assert set(table["metric"]) == {"tau"} and set(table["n"]) == {2}


def test_a_metric_that_only_ends_like_an_interval_is_a_metric():
    table = seed_tables.seed_table(frame(rows([1.0], metric="gap_low")))
    assert table["metric"].to_list() == ["gap_low"]


def test_models_of_one_method_and_rate_have_one_order():
    points = [f"from=sft.eta_{name}.prompts={n}" for name in "MS" for n in range(20)]
    made = [rows([1.0], method="attacked", lr_name=point) for point in points]
    tables = [seed_tables.seed_table(frame(*some)) for some in (made, reversed(made))]
    assert tables[0].equals(tables[1])
    assert [model.lr_name for model in seed_tables.models_of(tables[0])] == sorted(points)
