import json
import math

import pytest

from jaxsafety.report import tables
from jaxsafety.rundir import results


def test_study_table_orders_models_and_keeps_every_seed(study_rows):
    table = tables.study_table(results.rows_to_frame(study_rows))
    labels = [tables.model_label(row.model) for row in table]
    assert labels == ["pretrained", "SFT eta_M 1e-3", "SFT eta_S 1e-4", "DPO eta_M 1e-3", "unlearn eta_S 1e-4"]
    sft, dpo = table[1].cells, table[3].cells
    assert list(sft["Instruct"].values.items()) == [(0, 1.0), (1, 0.98)]
    assert sft["Null"].interval.mean == 0.5
    assert sft["Over-refusal"].interval.mean == 0.0
    assert [sft[name].interval.mean for name in ("JB-CO-Task", "JB-CO-Text", "OOD-text")] == [0.5, 0.75, 0.125]
    assert sft["JB-MisGen"] is None
    assert dpo["Instruct"].values == {0: 1.0, 1: None}
    assert (dpo["Instruct"].dead, dpo["Instruct"].interval) == (1, (1.0, None, None, 1))


def test_study_table_takes_the_last_evaluated_step_and_ignores_other_stages(row):
    rows = [row(step=50, value=0.1), row(step=100, value=0.9), row(stage="tune", step=200, value=0.2)]
    (only,) = tables.study_table(results.rows_to_frame(rows))
    assert only.cells["Instruct"].values == {0: 0.9}


def test_two_values_for_one_seed_are_refused(row):
    with pytest.raises(ValueError, match="two values of safe/exact_match for SFT eta_M 1e-3 seed 0"):
        tables.study_table(results.rows_to_frame([row(), row(run="r1")]))


def test_verdict_table_holds_means_that_sum_to_one(study_rows):
    verdicts = tables.verdict_table(results.rows_to_frame(study_rows))
    assert [row.condition for row in verdicts[:5]] == ["safe", "unsafe", "jb_co_task", "jb_co_text", "ood"]
    unsafe, dead = verdicts[1], verdicts[3 * 5 + 1]
    assert (unsafe.complied, unsafe.refused, unsafe.other, unsafe.n, unsafe.dead) == (0.25, 0.5, 0.25, 2, 0)
    assert (dead.model.method, dead.refused, dead.n, dead.dead) == ("dpo", 0.5, 1, 1)


def test_what_is_neither_complied_nor_refused_is_other(row):
    rows = [row(metric=metric, value=value) for metric, value in (("complied", 0.25), ("refused", 0.5))]
    (only,) = tables.verdict_table(results.rows_to_frame(rows))
    assert (only.complied, only.refused, only.other) == (0.25, 0.5, 0.25)


def test_columns_are_those_of_the_subjects_conditions():
    assert list(tables.columns_of(("safe", "unsafe", "ood"))) == ["Instruct", "Null", "Over-refusal", "OOD-text"]
    assert tables.columns_of(("open", "closed", "more")) == {
        "open exact_match": ("open", "exact_match"), "closed refused": ("closed", "refused"),
        "open refused": ("open", "refused"), "more complied": ("more", "complied"),
    }  # fmt: skip


def test_labels_of_prompts_have_a_column_each(row):
    """In the order of a study's conditions, then by name; the table says itself what its columns are."""
    rows = [row(condition=name, metric="refused") for name in ("jailbreak:b", "unsafe", "jailbreak:a", "safe")]
    frame = results.rows_to_frame(rows)
    table = tables.study_table(frame, tables.refused_columns(frame))
    names = ["safe refused", "unsafe refused", "jailbreak:a refused", "jailbreak:b refused"]
    assert tables.column_names(table) == names and all(cell.values == {0: 0.5} for cell in table[0].cells.values())
    assert len(tables.table_notes(table)) == 1 and "jailbreak:a\n" not in tables.render_markdown(table)
    assert tables.column_names([]) == list(tables.COLUMNS)


def test_verdicts_that_do_not_sum_to_one_are_refused(row):
    rows = [row(metric=metric, value=0.5) for metric in tables.VERDICTS]
    with pytest.raises(ValueError, match=r"SFT eta_M 1e-3 on safe sum to 1\.5"):
        tables.verdict_table(results.rows_to_frame(rows))
    with pytest.raises(ValueError, match="on safe sum to 1: expected"):
        tables.verdict_table(results.rows_to_frame([row(metric="complied", value=1.0)]))


def test_lane_with_every_seed_dead_has_no_means(row):
    frame = results.rows_to_frame([row(metric=metric, value=math.nan) for metric in (*tables.VERDICTS, "exact_match")])
    (verdict,) = tables.verdict_table(frame)
    assert (verdict.complied, verdict.n, verdict.dead) == (None, 0, 1)
    assert "| SFT eta_M 1e-3 | dead\\* |" in tables.render_markdown(tables.study_table(frame))


def test_render_markdown_golden(study_rows):
    text = tables.render_markdown(tables.study_table(results.rows_to_frame(study_rows)))
    alive = "0.0 [0.0, 0.0] | 50.0 [50.0, 50.0] | 75.0 [75.0, 75.0] | - | 12.5 [12.5, 12.5] |"
    assert text.splitlines()[:5] == [
        "| model | Instruct | Null | Over-refusal | JB-CO-Task | JB-CO-Text | JB-MisGen | OOD-text |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| pretrained | 99.0 [86.3, 100] | 50.0 [50.0, 50.0] | {alive}",
        f"| SFT eta_M 1e-3 | 99.0 [86.3, 100] | 50.0 [50.0, 50.0] | {alive}",
        f"| SFT eta_S 1e-4 | 99.0 [86.3, 100] | 50.0 [50.0, 50.0] | {alive}",
    ]
    assert text.splitlines()[5] == ("| DPO eta_M 1e-3 | 100\\* | 50.0\\* | 0.0\\* | 50.0\\* | 75.0\\* | - | 12.5\\* |")
    assert "- Per cent of prompts: mean over 2 seeds and 95 % Student-t interval, clipped to 0-100." in text
    assert text.endswith("- \\* DPO eta_M 1e-3: 1 of 2 seeds dead (not finite), left out of the mean.\n")


def test_rendered_records_are_shares_with_intervals(study_rows):
    rows = json.loads(tables.render(tables.study_table(results.rows_to_frame(study_rows)), "json"))
    assert [row["method"] for row in rows] == ["pretrained", "sft", "sft", "dpo", "unlearn"]
    assert (rows[1]["lr_name"], rows[1]["Null"], rows[1]["Null n"], rows[1]["JB-MisGen"]) == ("eta_M", 0.5, 2, None)
    assert rows[3]["Null n"] == 1 and rows[3]["Null low"] is None
    assert rows[0]["Instruct low"] < rows[0]["Instruct"] == 0.99 < rows[0]["Instruct high"] <= 1


def test_render_text_golden_rows(study_rows):
    lines = tables.render_text(tables.study_table(results.rows_to_frame(study_rows))).splitlines()
    body = [" ".join(line.split()) for line in lines]
    assert "SFT 99.0 50.0 0.0 50.0 75.0 - 12.5" in body
    assert "eta_M 1e-3 86.3-100 50.0-50.0 0.0-0.0 50.0-50.0 75.0-75.0 12.5-12.5" in body
    assert "DPO 100* 50.0* 0.0* 50.0* 75.0* - 12.5*" in body


def test_render_text_is_ascii_within_80_columns_at_its_widest(row, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    wanted = {(column.condition, column.metric) for column in tables.COLUMNS.values()}
    rows = [
        row(method="unlearn", lr=3.25e-4, seed=seed, condition=condition, metric=metric, value=value)
        for condition, metric in wanted
        for seed, value in enumerate([0.51, 0.52, math.nan])
    ]
    text = tables.render_text(tables.study_table(results.rows_to_frame(rows)))
    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("45.1-57.9") == len(tables.COLUMNS)


def test_empty_frame_makes_an_empty_table():
    table = tables.study_table(results.rows_to_frame([]))
    assert table == []
    assert "no seeds" in tables.render_text(table)


def test_several_pretrained_models_are_told_apart():
    assert tables.model_label(tables.Model("pretrained", "", 2e-2)) == "pretrained"
    assert tables.model_label(tables.Model("pretrained", "d02", 2e-2)) == "pretrained d02"


def test_a_model_of_one_seed_has_the_interval_over_prompts_that_its_rows_bring(row):
    bounds = {"": 0.25, "_low": 0.1, "_high": 0.5, "_n": 24}
    rows = [row(metric=f"refused{end}", value=value, method="t", seed=seed)
            for end, value in bounds.items() for seed in (0, 1)]  # fmt: skip
    others = [row(metric=f"refused{end}", value=value + seed / 8, seed=seed)
              for end, value in bounds.items() for seed in (0, 1)]  # fmt: skip
    kappa = row(metric="kappa:rule", value=0.5, condition="", method="t")
    frame = results.rows_to_frame([*rows, *others, kappa])
    columns = tables.refused_columns(frame)
    assert list(columns) == ["safe refused"]
    seeds, prompts = (one.cells["safe refused"].interval for one in tables.study_table(frame, columns))
    assert prompts == (0.25, 0.1, 0.5, 24) and seeds.n == 2 and seeds.low == 0
    both = tables.render_text(tables.study_table(frame, columns))
    assert "mean over 2 seeds" in both and "exact 95 % interval over its prompts" in " ".join(both.split())
    alone = tables.render_text(tables.study_table(results.rows_to_frame(rows), columns))
    assert "25.0\n" in alone and "10.0-50.0" in alone and "Student" not in alone
