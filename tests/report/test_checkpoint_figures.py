"""The figures that only checkpoints have: their numbers read back out of the SVG, and what is missing left out."""

import xml.etree.ElementTree as ET

import numpy as np
import polars as pl
import pytest

from jaxsafety.report import plot, plotting, sections, seed_tables
from jaxsafety.report.tables import Model, condition_label, model_label
from jaxsafety.rundir import results
from tests.report import synthetic
from tests.report.conftest import PAIR
from tests.report.test_analysis_figures import curves

TEXTS = {
    "input_alignment": ("excess: q", "gate, 1", "layer 0: q", "random direction", "tuned"),
    "spectrum": ("gate, layer 1", "q, layer 0", "update", "weights before", "rank: 90 %", "stable rank", "|ΔW| / |W|"),
    "separation": ("nearest mean", "effect size", "role_play", "cosine τ (safe: up)", "pretrained", "tuned"),
}


@pytest.fixture(scope="module")
def frames():
    return {"analyze": results.rows_to_frame(synthetic.pair_rows(), schema=results.ANALYSIS_SCHEMA)}


def shown(svg):
    return {"".join(element.itertext()).strip() for element in ET.fromstring(svg).iter()}


@pytest.mark.parametrize("name", PAIR)
def test_figure_says_what_it_shows_as_text(frames, name):
    words = shown(sections.draw(name, frames))
    assert set(TEXTS[name]) <= words, set(TEXTS[name]) - words


def test_long_names_of_models_leave_room_for_panels(frames):
    names = [f"attacked.from=defended.lr=0.001.weight={one}" for one in range(12)]
    rows = frames["analyze"].filter(method="tuned")
    rows = pl.concat([rows.with_columns(pl.lit(name).alias("method")) for name in names])
    # A layout that has no room is a warning, which is an error here.
    assert {f"{name} {rows['lr_name'][0]}".strip() for name in names} <= shown(
        sections.draw("separation", {"analyze": rows})
    )


@pytest.mark.parametrize("name", PAIR)
def test_a_study_has_none_of_them(analysis_frames, name):
    assert sections.table(name, analysis_frames).is_empty()
    with pytest.raises(sections.NothingToDraw, match="run `jaxsafety analyze`"):
        sections.draw(name, analysis_frames)


def test_spectra_are_drawn_on_two_logarithms(frames):
    picked = seed_tables.pick(frames["analyze"], part="up", layer=1, analysis="spectrum", metric="value_delta")
    svg = sections.draw("spectrum", {"analyze": picked})
    (curve,) = curves(svg, colour=plotting.ORANGE, width="1.6")
    table = sections.table("spectrum", {"analyze": picked})
    assert len(curve) == table.height > 20
    for place, values in ((0, np.log(table["strength"] + 1)), (1, np.log(table["mean"]))):
        slope, offset = np.polyfit(values, curve[:, place], 1)
        np.testing.assert_allclose(curve[:, place], slope * values + offset, atol=1e-3)
        assert slope > 0 if place == 0 else slope < 0


def test_long_spectra_are_thinned_and_start_with_the_first():
    lane = {"method": "tuned", "lr_name": "", "lr": 0.0, "seed": 0, "step": 0}
    rows = synthetic._Rows(np.random.default_rng(0), **lane)
    for index in range(4096):
        rows.add("spectrum", "value_delta", 1.0 / (1 + index), layer=0, part="up", strength=float(index))
    frame = results.rows_to_frame(rows.rows, schema=results.ANALYSIS_SCHEMA)
    table = sections.table("spectrum", {"analyze": frame})
    assert table["strength"][:5].to_list() == [0.0, 1.0, 2.0, 3.0, 4.0] and 60 < table.height < 160


def test_bands_are_the_intervals_over_prompts(frames):
    picked = seed_tables.pick(frames["analyze"], analysis="clusters", method="tuned", condition="safe")
    picked = picked.filter(pl.col("metric").str.starts_with("cosine_tau"))
    assert "opacity: 0.16" in sections.draw("separation", {"analyze": picked})
    table = sections.table("separation", {"analyze": picked})
    assert table["metric"].unique().to_list() == ["cosine_tau"] and set(table["n"]) == {40}
    np.testing.assert_allclose(table["high"] - table["low"], 0.1, atol=1e-9)
    bounds = pl.col("metric").is_in(["cosine_tau_low", "cosine_tau_high"])
    bare = sections.draw("separation", {"analyze": picked.filter(~bounds)})
    assert "opacity: 0.16" not in bare


def test_attention_has_panels_of_its_own(frames):
    for name in ("input_alignment", "spectrum"):
        rows = frames["analyze"].filter(pl.col("part") != "q")
        assert "layer 0: q" not in shown(sections.draw(name, {"analyze": rows}))
        assert "q, layer 0" not in shown(sections.draw(name, {"analyze": rows}))


def test_a_deep_model_shows_a_few_layers():
    assert plot.spaced(list(range(32)), most=4) == [0, 10, 21, 31]
    assert plot.spaced([3, 5], most=4) == [3, 5]
    frame = results.rows_to_frame(synthetic.pair_rows(layers=9), schema=results.ANALYSIS_SCHEMA)
    words = shown(sections.draw("spectrum", {"analyze": frame}))
    assert "gate, layer 8" in words and "gate, layer 1" not in words


def test_names_of_models_and_conditions_of_a_pair():
    assert model_label(Model("tuned", "", 0.0)) == "tuned"
    assert condition_label("jailbreak:base64") == "base64" and condition_label("jb_co_text") == "JB-CO-Text"
    styles = plotting.condition_styles(["safe", "jailbreak:a", "jailbreak:b"])
    assert len({str(style) for style in styles.values()}) == 3
