import re
import sys
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from jaxsafety.report import figures, plotting, tables
from jaxsafety.rundir import results


@pytest.fixture(scope="module")
def frame(study_rows, curve_rows):
    return results.rows_to_frame(study_rows + curve_rows)


@pytest.fixture(scope="module")
def svgs(frame):
    verdicts = tables.verdict_table(frame)
    return [
        *(figures.learning_curves(frame, stage=stage) for stage in ("pretrain", "tune")),
        figures.verdict_bars(verdicts),
    ]


def test_svgs_are_well_formed_and_fetch_nothing(svgs):
    for svg in svgs:
        root = ET.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("role") == "img"
        assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", svg)
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', svg))


def test_svgs_take_ink_from_the_page_and_keep_text_as_text(svgs):
    for svg in svgs:
        assert "currentColor" in svg
        assert "#000000" not in svg
        assert plotting.INK not in svg
        assert "<text" in svg
        assert "#ffffff" not in svg


def test_references_resolve_and_ids_are_unique_across_figures(svgs):
    seen = set()
    for svg in svgs:
        ids = re.findall(r' id="([^"]*)"', svg)
        assert set(re.findall(r"url\(#([^)]*)\)", svg)) | set(re.findall(r'href="#([^"]*)"', svg)) <= set(ids)
        assert len(ids) == len(set(ids))
        assert seen.isdisjoint(ids)
        seen |= set(ids)


def test_svg_is_deterministic_and_independent_of_user_style_and_row_order(frame, svgs):
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=3)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):
        assert figures.learning_curves(shuffled, stage="tune") == svgs[1]
        assert matplotlib.rcParams["font.size"] == 30
    assert figures.verdict_bars(tables.verdict_table(shuffled)) == svgs[2]


def test_figures_do_not_import_pyplot(frame, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert figures.learning_curves(frame, stage="pretrain").startswith("<svg")


def test_learning_curves_name_models_and_drop_dead_points(svgs, frame):
    assert "SFT eta_M 1e-3" in svgs[1]
    assert "stroke-dasharray" in svgs[1]
    assert "SFT" not in svgs[0]
    alive = frame.filter(frame["seed"] == 0)
    assert figures.learning_curves(alive, stage="tune") != svgs[1]


def test_learning_curves_are_thinned_but_keep_the_last_step(row):
    rows = [
        row(stage="tune", condition="train", metric="loss", step=step, value=float(step % 7)) for step in range(1, 1001)
    ]
    svg = figures.learning_curves(results.rows_to_frame(rows), stage="tune")
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: #1a82c4', svg)
    assert line.count("L") == figures._MOST_POINTS - 1
    last = figures.learning_curves(results.rows_to_frame(rows[9::10]), stage="tune")
    assert line in last


def test_stage_without_curves_is_refused(frame):
    untuned = frame.filter(frame["stage"] != "tune")
    with pytest.raises(ValueError, match="no learning curve for stage 'tune'"):
        figures.learning_curves(untuned, stage="tune")


def test_loss_is_drawn_only_where_one_method_owns_it(frame, svgs, row):
    assert "training loss" in svgs[0] and "training loss" in svgs[1]
    other = results.rows_to_frame([row(stage="tune", method="dpo", condition="train", metric="loss", step=10)])
    both = figures.learning_curves(frame.vstack(other), stage="tune")
    assert "training loss" not in both
    assert "Instruct" in both


def test_the_loss_alone_is_drawn_whatever_the_methods(row):
    """As of checkpoints, which nothing else is known of along training."""
    rows = [
        row(stage="tune", method=method, condition="train", metric="loss", step=step, value=1.0 / step)
        for method in ("sft", "dpo")
        for step in (1, 2)
    ]
    svg = figures.learning_curves(results.rows_to_frame(rows), stage="tune", shown=figures.curves_of(()))
    assert "training loss" in svg and "DPO eta_M 1e-3" in svg


def test_curves_are_those_of_the_subjects_conditions():
    assert figures.curves_of(("safe", "unsafe", "ood")) == figures.CURVES
    own = figures.curves_of(("open", "closed", "other"))
    assert list(own) == [("open", "exact_match"), ("closed", "refused"), ("train", "loss")]
    assert list(figures.curves_of(())) == [("train", "loss")]


def test_verdict_bars_have_a_panel_per_condition_and_a_label_per_model(svgs):
    for text in ("Safe", "Unsafe", "JB-CO-Task", "JB-CO-Text", "OOD-text", "complied", "refused", "other"):
        assert f">{text}</text>" in svgs[2]
    assert ">JB-MisGen</text>" not in svgs[2]
    assert ">unlearn eta_S 1e-4</text>" in svgs[2]
    with pytest.raises(ValueError, match="no verdicts"):
        figures.verdict_bars([])
