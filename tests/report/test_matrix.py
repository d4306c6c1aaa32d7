"""Defences against attacks: which rows make a cell, which strength of an attack, and the worst case of every seed."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import polars as pl
import pytest

from jaxsafety.recipe.schema import EvaluateConfig, Recipe
from jaxsafety.report import matrix, sections
from jaxsafety.report.matrix import Cell
from jaxsafety.rundir import results

SEEDS = (0, 1, 2)
TUNED = {"from": "pretrained", "method": "sft", "steps": 2}
ATTACK = {"from": ["sft", "dpo"], "method": "sft", "steps": 1, "data": {"pool": "explicit"}}


@pytest.fixture(scope="module")
def recipe():
    models = {
        "pretrained": {"method": "pretrain", "data": {"pool": "text"}, "steps": 2},
        "sft": TUNED | {"role": "defence"},
        "dpo": TUNED | {"method": "dpo", "role": "defence"},
        "tried": ATTACK | {"lr": [1e-3, 1e-4], "role": "attack"},
        "explicit": {"select": "tried", "role": "attack"},
        "half": {"from": ["sft", "dpo"], "edit": "scaled", "alpha": 0.5, "base": "pretrained", "role": "attack"},
    }
    edits = {
        "whole": {"edit": "scaled", "alpha": [0.0, 2.0]},
        "back": {"edit": "scaled", "alpha": [-2.0, -1.0], "role": "attack"},
    }
    return Recipe(
        subject={"world": "tiny"}, seeds=SEEDS, models=models, edits=edits, attacks={"prefill": {"depth": [0, 2]}},
        analyses={}, evaluate=EvaluateConfig(conditions=("safe", "unsafe", "near_miss", "jb_co_text")),
    )  # fmt: skip


def judged(method, lr_name, condition, metric, values):
    same = {"stage": "evaluate", "method": method, "lr_name": lr_name, "lr": 0.0, "step": 2, "run": "r"}
    same |= {"revision": "", "device": "", "condition": condition, "metric": metric}
    return [same | {"seed": seed, "value": value} for seed, value in zip(SEEDS, values, strict=True)]


def analysed(analysis, method, condition, metric, values, *, part="", strength=None):
    same = {"analysis": analysis, "method": method, "lr_name": "", "lr": 0.0, "step": 2, "run": "r", "revision": ""}
    same |= {"device": "", "condition": condition, "subset": "all", "layer": None, "part": part, "strength": strength}
    return [same | {"metric": metric, "seed": seed, "value": v} for seed, v in zip(SEEDS, values, strict=True)]


@pytest.fixture(scope="module")
def frames():
    evaluated, found = [], []
    for method, base in (("sft", 0.1), ("dpo", 0.0)):
        evaluated += judged(method, "", "safe", "exact_match", [1.0, 0.9, 0.8])
        for condition, more in (("unsafe", 0.0), ("jb_co_text", 0.3), ("near_miss", 0.6)):
            evaluated += judged(method, "", condition, "complied", [base + more] * 3)
        for label, value, able in (("explicit", 0.6, 0.9), ("half", 0.9, 0.1)):
            evaluated += judged(label, f"from={method}", "unsafe", "complied", [value] * 3)
            evaluated += judged(label, f"from={method}", "safe", "exact_match", [able] * 3)
        for rate in ("lr=0.001", "lr=0.0001"):
            evaluated += judged("tried", f"from={method}.{rate}", "unsafe", "complied", [1.0] * 3)
        # More at depth 0 with one, much more at depth 2 with the other.
        for depth, value in ((0.0, {"sft": 0.5, "dpo": 0.1}), (2.0, {"sft": 0.4, "dpo": 0.6})):
            found += analysed("prefill", method, "unsafe", "complied", [value[method]] * 3, strength=depth)
        for alpha, value in ((-1.0, 0.2), (-2.0, 0.7)):
            found += analysed("interventions", method, "unsafe", "complied", [value] * 3, part="back", strength=alpha)
            found += analysed("interventions", method, "safe", "exact_match", [0.2] * 3, part="back", strength=alpha)
        found += analysed("interventions", method, "unsafe", "complied", [1.0] * 3, part="whole", strength=0.0)
    return {
        "analyze": pl.DataFrame(found, schema=results.ANALYSIS_SCHEMA),
        "evaluate": pl.DataFrame(evaluated, schema=results.SCHEMA),
    }


@pytest.fixture(scope="module")
def table(frames, recipe):
    return sections.table("matrix", frames, sections.listed(recipe))


def cell(table, method, condition, metric="complied"):
    return table.row(by_predicate=(pl.col("method") == method) & (pl.col("condition") == condition)
                     & (pl.col("metric") == metric), named=True)  # fmt: skip


def test_every_attack_has_one_column_by_its_kind(table):
    columns = table.filter(method="sft", metric="complied").select("part", "condition").rows()
    # Prompts to be answered are no attack, nor are a model of several lanes or an edit that is none.
    assert set(columns) == {
        ("prompts", "unsafe"), ("prompts", "jb_co_text"), ("answering", "prefill"), ("weights", "back"),
        ("weights", "half"), ("fine-tuning", "explicit"), ("worst case", "worst"),
    }  # fmt: skip


@pytest.mark.parametrize(("method", "mean"), [("sft", 0.4), ("dpo", 0.6)])
def test_an_attack_is_shown_at_the_strength_that_does_most_over_all_defences(table, method, mean):
    assert cell(table, method, "prefill")["mean"] == pytest.approx(mean)
    assert cell(table, method, "back")["mean"] == pytest.approx(0.7)


def test_a_cell_is_of_the_model_under_attack_with_its_safe_prompts(table):
    row = cell(table, "dpo", "explicit")
    assert (row["mean"], row["n"], row["seed_1"]) == (pytest.approx(0.6), 3, 0.6)
    assert cell(table, "dpo", "explicit", "exact_match")["mean"] == pytest.approx(0.9)
    # An attack by prompts leaves the model as it is.
    assert cell(table, "dpo", "jb_co_text", "exact_match")["seed_2"] == 0.8
    assert table.filter(condition="prefill", metric="exact_match").is_empty()


def test_the_worst_case_costs_little(table):
    # `half` and `back` do more, and leave next to nothing of what the model can do.
    assert cell(table, "sft", "worst")["mean"] == pytest.approx(0.6)


def seeds(*values):
    return dict(enumerate(values))


def test_the_worst_case_of_a_seed_is_chosen_on_the_others():
    """The largest of many numbers would be that of an attack that happened to do well there."""
    able = seeds(1.0, 1.0, 1.0)
    none, lucky = Cell(seeds(0.0, 0.0, 0.0), able), Cell(seeds(1.0, 0.0, 0.0), able)
    steady, broken = Cell(seeds(0.3, 0.3, 0.2), able), Cell(seeds(0.9, 0.9, 0.9), seeds(0.5, 0.5, 0.5))
    found = matrix.worst(none, [lucky, steady, broken])
    # Without seed 0 the steady one does most; with it, the lucky one.
    assert found.complied == {0: 0.3, 1: 0.0, 2: 0.0} and found.able == able
    within = broken._replace(able=seeds(0.96, 0.96, 0.96))
    assert matrix.worst(none, [lucky, steady, within]).complied == {0: 0.9, 1: 0.9, 2: 0.9}


def test_one_seed_has_no_worst_case():
    assert not matrix.worst(Cell({0: 0.1}, {0: 1.0}), []).complied


def test_a_defence_without_a_living_seed_or_without_safe_prompts_breaks_nothing(frames, recipe):
    gone = pl.when(pl.col("method") == "dpo").then(None).otherwise("value").alias("value")
    dead = {name: frame.with_columns(gone) for name, frame in frames.items()}
    found = sections.table("matrix", dead, sections.listed(recipe))
    # What was made from it may live, and is shown; there is no worst case of what is dead.
    assert cell(found, "sft", "worst")["mean"] == pytest.approx(0.6)
    assert found.filter(method="dpo", condition="worst").is_empty()
    unasked = frames | {"evaluate": frames["evaluate"].filter(pl.col("condition") != "safe")}
    found = sections.table("matrix", unasked, sections.listed(recipe))
    assert cell(found, "sft", "worst")["mean"] == pytest.approx(0.9)


def test_a_weaker_strength_that_costs_little_counts_in_the_worst_case(frames, recipe):
    """Though the column shows the one that does most."""

    def back(method, condition, metric, values, alpha):
        return analysed("interventions", method, condition, metric, values, part="back", strength=alpha)

    more = [
        *back("sft", "unsafe", "complied", [0.75] * 3, -1.5),
        *back("sft", "safe", "exact_match", [1.0, 0.9, 0.8], -1.5),
        *(row for method in ("sft", "dpo") for row in back(method, "unsafe", "complied", [0.95] * 3, -3.0)),
        *back("sft", "safe", "exact_match", [0.0] * 3, -3.0),
    ]  # fmt: skip
    more = pl.DataFrame(more, schema=results.ANALYSIS_SCHEMA)
    both = frames | {"analyze": pl.concat([frames["analyze"], more])}
    found = sections.table("matrix", both, sections.listed(recipe))
    assert cell(found, "sft", "back")["mean"] == pytest.approx(0.95)
    assert cell(found, "sft", "worst")["mean"] == pytest.approx(0.75)


def test_a_selection_is_judged_by_what_it_goes_by(frames, recipe):
    by_other = recipe.models | {"explicit": recipe.models["explicit"] | {"by": "jb_co_text/complied"}}
    rows = judged("explicit", "from=sft", "jb_co_text", "complied", [0.2] * 3)
    both = frames | {"evaluate": pl.concat([frames["evaluate"], pl.DataFrame(rows, schema=results.SCHEMA)])}
    found = sections.table("matrix", both, sections.listed(replace(recipe, models=by_other)))
    assert cell(found, "sft", "explicit")["mean"] == pytest.approx(0.2)


def test_the_picture_has_a_number_a_cell_with_all_that_it_is_made_of(frames, recipe):
    drawn = sections.draw("matrix", frames, sections.listed(recipe))
    root = ET.fromstring(drawn)
    titles = [one.text for one in root.iter("{http://www.w3.org/2000/svg}title")]
    told = next(text for text in titles if text.startswith("DPO, explicit: "))
    assert told == "DPO, explicit: 60.0 [60.0, 60.0] % of unsafe prompts complied with; seeds 60.0, 60.0, 60.0; " \
                   "safe prompts answered: 90.0 [90.0, 90.0] %"  # fmt: skip
    assert len(titles) == 1 + 2 * 7
    # An attack that breaks the model is hatched.
    assert "<pattern" in drawn


def test_the_more_robust_defence_stands_above(frames, recipe):
    for weak, first in (("sft", "DPO"), ("dpo", "SFT")):
        worse = (
            pl.when((pl.col("method") == weak) & (pl.col("condition") == "jb_co_text")).then(0.99).otherwise("value")
        )
        other = frames | {"evaluate": frames["evaluate"].with_columns(worse.alias("value"))}
        names = re.findall(r">(SFT|DPO)<", sections.draw("matrix", other, sections.listed(recipe)))
        assert names[:2] == [first, {"DPO": "SFT", "SFT": "DPO"}[first]]


def test_beside_the_matrix_there_are_defences_and_of_candidates_those_that_were_chosen(recipe):
    names = [(lane.label, lane.point) for lane in recipe.lanes]
    rows = pl.DataFrame({"method": [one[0] for one in names], "lr_name": [one[1] for one in names]})
    found = matrix.defended(rows, recipe=recipe, selected={})
    assert found.rows() == [("pretrained", ""), ("sft", ""), ("dpo", "")]
    rates = {name: one | {"role": "model"} if name == "tried" else one for name, one in recipe.models.items()}
    chosen = replace(recipe, models=rates | {"best": {"select": "tried", "per": [], "role": "defence"}})
    told = {"best": {"model": "tried.from=sft.lr=0.001"}}
    found = matrix.defended(rows, recipe=chosen, selected=told)
    assert [row for row in found.rows() if row[0] == "tried"] == [("tried", "from=sft.lr=0.001")]


def test_a_study_without_attacks_has_no_matrix(recipe, mini_recipe):
    assert matrix.has_matrix(recipe) and not matrix.has_matrix(mini_recipe)
