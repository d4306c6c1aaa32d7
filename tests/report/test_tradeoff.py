"""What models can do against what they comply with, drawn from rows of two seeds."""

import xml.etree.ElementTree as ET

import pytest

from jaxsafety.report import plot, tradeoff
from jaxsafety.rundir import results


@pytest.fixture(scope="module")
def frame(study_rows):
    return results.rows_to_frame(study_rows)


def words(svg):
    return {"".join(text.itertext()) for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}


def test_a_panel_for_every_condition_that_was_judged(frame):
    shown = words(tradeoff.tradeoff(frame, able=("safe", "jb_co_task", "nowhere")))
    assert {"Safe", "JB-CO-Task", "answered exactly", "Unsafe complied with"} <= shown
    assert {"SFT", "DPO", "unlearn", "pretrained"} <= shown


def test_a_point_is_the_mean_over_living_seeds_with_its_interval(frame):
    (x, reach) = tradeoff._interval(frame, plot.Model("sft", "eta_M", 1e-3), "safe", "exact_match")
    assert x == pytest.approx(0.99)
    assert reach[0][0] > 0 and reach[1][0] == pytest.approx(0.01)  # clipped at 1
    # One of DPO's two seeds is dead.
    assert tradeoff._interval(frame, plot.Model("dpo", "eta_M", 1e-3), "unsafe", "complied") == (0.25, [[0.0], [0.0]])
    assert tradeoff._interval(frame, plot.Model("sft", "nowhere", 1e-3), "safe", "exact_match") == (0.0, [])


def test_every_living_seed_is_a_faint_point(frame):
    assert len(tradeoff._seeds(frame, plot.Model("sft", "eta_M", 1e-3), "safe", "exact_match")) == 2
    assert list(tradeoff._seeds(frame, plot.Model("dpo", "eta_M", 1e-3), "unsafe", "complied").values()) == [0.25]
    drawn, without = (tradeoff.tradeoff(one) for one in (frame, frame.filter(frame["method"] != "sft")))
    # SFT's mean with its bars, and its two seeds.
    assert drawn.count("<use ") - without.count("<use ") > 2


def test_safe_prompts_of_a_condition_stand_against_that(study_rows):
    names = {"safe": "cipher_safe", "unsafe": "cipher"}
    twins = [row | {"condition": names[row["condition"]]} for row in study_rows if row["condition"] in names]
    frame = results.rows_to_frame([*study_rows, *(row | {"value": 0.0} for row in twins)])
    assert {"Safe", "cipher_safe, cipher"} <= words(tradeoff.tradeoff(frame, able=("safe", "cipher_safe")))


def test_nothing_judged_is_nothing_to_draw(frame):
    with pytest.raises(plot.NothingToDraw, match="no verdicts of unsafe and new_task to draw"):
        tradeoff.tradeoff(frame, able=("new_task",))
