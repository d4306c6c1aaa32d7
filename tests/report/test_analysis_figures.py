"""All figures of the analyses: what they draw, number by number where a curve can be read back out of the SVG."""

import math
import re
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import polars as pl
import pytest

from jaxsafety.analysis import output_space
from jaxsafety.report import attack_figures, plot, plotting, sections, seed_tables
from tests.report.conftest import SECTIONS, STUDY

NAMES = STUDY
TEXTS = {
    "clusters": (
        *("last prompt token", "first answer tokens", "pretrained", "SFT eta_M 1e-3", "safe prompts"),
        *("leading share: safe", "leading share: unsafe", "s₁ / Σ s"),
    ),
    "output_space": ("excess: up", "layer 1: down", "random direction", "DPO eta_S 1e-4"),
    "input_space": (
        *("gain: up", "gain: down", "ratio: up", "layer", "up matrix, layer 1", "down matrix, layer 1"),
        *("input direction of the update, strongest first", "weighted projection"),
    ),
    "sensitivity": ("gradient norm", "Jacobian norm", "pretrained", "gradient norm (log)"),
    "jailbreaks": ("JB-CO-Text", "successful attacks", "relative τ", "sensitivity"),
    "soft_tokens": ("count=1", "count=8", "complied", "relative τ", "gain", "steps (Unsafe prompts)"),
    "prefill": ("complied", "refused", "depth (Unsafe prompts)"),
    "refusal_depth": ("answer position", "share of unsafe prompts"),
    "probe": ("a plain probe", "one of its own", "area under the curve"),
    "uncertainty": (
        "accuracy",
        "entropy (nats)",
        "perplexity (log)",
        "true start",
        "random start",
        "pretrained",
    ),
    "interventions": (
        *("whole", "MLP", "up", "down", "Instruct", "Null", "JB-CO-Text", "factor α"),
        *("relative τ, layer 1", "sensitivity (log)", "factor α on the whole update", "unsafe prompts"),
    ),
    "causal": ("only null", "all but random", "rank 8", "layer 1", "attention"),
    "directions": ("activations", "random", "singular", "Null", "Instruct", "64"),
    "kept_energy": ("up: reads", "down: unsafe", "random space", "energy of the update in them"),
    "gradient_spaces": ("up: reads, unsafe", "down: writes, safe", "random space", "energy of the update in them"),
    "intruders": ("up matrix", "down matrix", "dashed: a random update of the same spectrum"),
    "undoing": ("share undone", "relative norm", "in the null space", "chance, or before"),
    "transfer": ("+ α SFT", "+ α DPO"),
    "dynamics": ("Null", "cluster separation (relative gap)", "eta_M", "eta_S", "training step (log)"),
    "alignment": ("SFT ~ DPO", "gradients, step 0", "chance", "outputs: up", "DPO eta_M 1e-3"),
}
# Student's t, 0.975 quantile at two degrees of freedom.
T_2 = 4.30265
# Coordinates are written with six decimals.
UNITS = 1e-4
_NUMBER = r"[-\d.]+"


def one_model(frames, **labels):
    """The frames with one SFT model alone, and of its rows those with these labels."""
    rows = frames["analyze"].filter(pl.col("method") == "sft", pl.col("lr_name") == "eta_M")
    return {"analyze": seed_tables.pick(rows, **labels)}


def curves(svg, *, colour, width):
    """Points ``[curve, point, 2]`` of the open paths of one colour and stroke width inside panels, not in legends."""
    pattern = (
        rf'<path d="([^"]*)" clip-path="[^>]*style="fill: none; (?:stroke-dash[^;]*; )*stroke: {colour}; '
        rf'[^"]*stroke-width: {width};?[^"]*"'
    )
    paths = [re.findall(rf"[ML] ({_NUMBER}) ({_NUMBER})", path) for path in re.findall(pattern, svg)]
    return np.array([path for path in paths if len(path) > 1], float)


@pytest.mark.parametrize("name", NAMES)
def test_figure_is_well_formed_and_fetches_nothing(analysis_svgs, name):
    svg = analysis_svgs[name]
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("role") == "img"
    assert root.get("viewBox").startswith(f"0 0 {plotting.WIDTH} ")
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", svg)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', svg))
    assert "currentColor" in svg and plotting.INK not in svg and "#ffffff" not in svg


@pytest.mark.parametrize("name", NAMES)
def test_figure_says_what_it_shows_as_text(analysis_svgs, name):
    words = {"".join(element.itertext()).strip() for element in ET.fromstring(analysis_svgs[name]).iter()}
    assert set(TEXTS[name]) <= words
    assert not any("dead" in text for text in words)  # of whom there are none here
    sizes = {float(size) for size in re.findall(r"font-size: ([\d.]+)px", analysis_svgs[name])}
    assert sizes and sizes <= {11.0, 12.0}


def test_ids_are_unique_in_a_page_of_all_figures(analysis_svgs):
    seen = set()
    for svg in analysis_svgs.values():
        ids = re.findall(r' id="([^"]*)"', svg)
        assert set(re.findall(r"url\(#([^)]*)\)", svg)) | set(re.findall(r'href="#([^"]*)"', svg)) <= set(ids)
        assert len(ids) == len(set(ids)) and seen.isdisjoint(ids)
        seen |= set(ids)


@pytest.mark.parametrize("name", ["output_space", "jailbreaks", "alignment"])
def test_the_same_data_give_the_same_bytes(analysis_frames, analysis_svgs, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    shuffled = {key: frame.sample(fraction=1.0, shuffle=True, seed=3) for key, frame in analysis_frames.items()}
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):
        assert sections.draw(name, shuffled) == analysis_svgs[name]


def test_every_seed_is_faint_and_the_mean_bold_in_its_t_interval(analysis_frames):
    frames = one_model(analysis_frames, analysis="clusters", metric="relative_tau", part="last", condition="safe")
    svg = sections.draw("clusters", frames)
    seeds = curves(svg, colour=plotting.BLUE, width="0.6")
    (mean,) = curves(svg, colour=plotting.BLUE, width="1.6")
    assert seeds.shape == (3, 2, 2)
    assert re.search(r"stroke-opacity: 0\.4", svg)
    np.testing.assert_allclose(seeds.mean(axis=0), mean, atol=UNITS)
    half = T_2 * seeds[..., 1].std(axis=0, ddof=1) / math.sqrt(3)
    ((band, down),) = re.findall(r'<use xlink:href="#([^"]*)" x="0" y="([^"]*)" style="[^"]*fill-opacity: 0.16', svg)
    (path,) = re.findall(rf'<path id="{band}" d="([^"]*)"', svg)
    edge = np.array(re.findall(rf"[ML] ({_NUMBER}) ({_NUMBER})", path), float) + np.array([0, float(down)])
    for x, middle, reach in zip(mean[:, 0], mean[:, 1], half, strict=True):
        ends = edge[np.isclose(edge[:, 0], x), 1]
        assert ends.max() - ends.min() == pytest.approx(2 * reach, abs=1e-3)
        assert (ends.max() + ends.min()) / 2 == pytest.approx(middle, abs=1e-3)


def test_dead_seeds_are_left_out(analysis_frames):
    frames = one_model(analysis_frames, analysis="clusters", metric="relative_tau", part="last", condition="safe")
    dead = pl.when(pl.col("seed") > 0).then(None).otherwise(pl.col("value")).alias("value")
    left = sections.draw("clusters", {"analyze": frames["analyze"].with_columns(dead)})
    alone = sections.draw("clusters", {"analyze": frames["analyze"].filter(pl.col("seed") == 0)})
    bold = [curves(svg, colour=plotting.BLUE, width="1.6")[0] for svg in (left, alone)]
    np.testing.assert_allclose(*bold, atol=UNITS)


def test_a_single_seed_has_no_band_and_no_faint_line(analysis_frames):
    svg = sections.draw("clusters", {"analyze": analysis_frames["analyze"].filter(pl.col("seed") == 0)})
    assert len(curves(svg, colour=plotting.BLUE, width="0.6")) == 0
    assert "fill-opacity: 0.16" not in svg


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_figure_draws_with_one_seed_one_method_and_one_condition_missing(analysis_frames, name):
    rows = analysis_frames["analyze"].filter(
        pl.col("seed") == 0,
        pl.col("method").is_in(["pretrained", "sft"]),
        pl.col("lr_name").is_in(["", "eta_M"]),
        pl.col("condition") != "safe",
    )
    curves = analysis_frames["curves"].filter(pl.col("seed") == 0)
    assert sections.draw(name, {"analyze": rows, "curves": curves}).startswith("<svg")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_draw_says_which_stage_is_missing(analysis_frames, name):
    none = {"analyze": analysis_frames["analyze"].clear(), "curves": analysis_frames["curves"].clear()}
    dead = {key: frame.with_columns(pl.lit(None, dtype=pl.Float64).alias("value")) for key, frame in
            analysis_frames.items()}  # fmt: skip
    for frames in (none, dead):
        with pytest.raises(sections.NothingToDraw, match="run `jaxsafety analyze`"):
            sections.draw(name, frames)


def test_an_update_of_nothing_has_no_directions_to_draw(analysis_frames):
    rows = analysis_frames["analyze"].with_columns(
        pl.when(pl.col("metric") != "null_norm").then(pl.col("value")).alias("value")
    )
    with pytest.raises(sections.NothingToDraw, match="no finite rows of output_space"):
        sections.draw("output_space", {"analyze": rows})


def test_parts_that_were_not_measured_are_not_drawn(analysis_frames):
    rows = analysis_frames["analyze"].filter(pl.col("part") != "response")
    svg = sections.draw("clusters", {"analyze": rows})
    assert "last prompt token" in svg and "first answer tokens" not in svg
    only = analysis_frames["analyze"].filter(pl.col("part").is_in(["whole", "only_null"]))
    assert "MLP" not in sections.draw("interventions", {"analyze": only})
    assert "only null" in sections.draw("causal", {"analyze": only})


def test_an_attack_without_a_strength_has_a_row_per_model(analysis_frames):
    table = sections.table("prefill", analysis_frames)
    one = table.filter(pl.col("strength") == 0).with_columns(pl.lit(None, pl.Float64).alias("strength"))
    svg = plotting.svg(attack_figures.attack(one, label="prefill", over=""))
    assert "share of the Unsafe prompts" in svg and ">complied<" in svg and "SFT eta_M" in svg
    # One panel, where there is a row of panels per model with strengths.
    assert svg.count("SFT eta_M") == 1 and "depth" not in svg


def test_models_of_which_no_part_was_tried_have_no_panel_beside_the_others(analysis_frames):
    rows = analysis_frames["analyze"]
    slow = pl.col("lr_name") == "eta_S"
    fewer = rows.filter((pl.col("analysis") != "interventions") | ~slow | (pl.col("part") == "whole"))
    assert "eta_S" in sections.draw("causal", {"analyze": rows})
    drawn = sections.draw("causal", {"analyze": fewer})
    assert "eta_M" in drawn and "eta_S" not in drawn
    assert "eta_S" in sections.draw("causal", {"analyze": rows.filter(pl.col("part") == "whole")})


def assert_heights(drawn, values):
    """The heights of the curves of one scale are their values, but for place and unit; an SVG counts downwards."""
    heights, values = np.concatenate(drawn)[:, 1], np.concatenate(values)
    slope, offset = np.polyfit(values, heights, 1)
    assert slope < 0
    np.testing.assert_allclose(heights, slope * values + offset, atol=UNITS)


def assert_sides(frames, name, rows, *, scale=np.array):
    """The only two bold curves of the figure are these rows' means for safe and for unsafe prompts."""
    svg = sections.draw(name, frames)
    drawn = [curves(svg, colour=colour, width="1.6") for colour in (plotting.BLUE, plotting.ORANGE)]
    assert [len(side) for side in drawn] == [1, 1]
    means = [seed_tables.pick(rows, condition=side)["mean"].to_numpy() for side in ("safe", "unsafe")]
    assert_heights([side[0] for side in drawn], [scale(mean) for mean in means])


def test_leading_shares_stand_side_by_side_for_every_model(analysis_frames):
    shares = seed_tables.pick(analysis_frames["analyze"], analysis="clusters", metric="leading_share", part="response")
    svg, table = (make("clusters", {"analyze": shares}) for make in (sections.draw, sections.table))
    table = table.filter(pl.col("lr_name") != "eta_S")
    drawn, values = [], []
    for method, colour in (("pretrained", "currentColor"), ("sft", plotting.BLUE), ("dpo", plotting.ORANGE)):
        safe, unsafe = curves(svg, colour=colour, width="1.6")
        assert safe[:, 0].max() < unsafe[:, 0].min()
        drawn += [safe, unsafe]
        picked = [seed_tables.pick(table, method=method, condition=side) for side in ("safe", "unsafe")]
        values += [side["mean"].to_numpy() for side in picked]
    assert_heights(drawn, values)


@pytest.mark.parametrize(("metric", "part"), [("gain", "up"), ("gain", "down"), ("ratio", "up")])
def test_gains_are_logarithms_over_layers(analysis_frames, metric, part):
    frames = one_model(analysis_frames, analysis="input_space", metric=metric, part=part, subset="all")
    assert_sides(frames, "input_space", sections.table("input_space", frames), scale=np.log)


@pytest.mark.parametrize("part", ["up", "down"])
def test_projections_are_those_of_the_deepest_layer(analysis_frames, part):
    frames = one_model(analysis_frames, analysis="input_space", metric="projection", part=part)
    deepest = seed_tables.pick(sections.table("input_space", frames), layer=1)
    assert seed_tables.pick(deepest, condition="safe")["strength"].to_list() == list(range(8))
    assert_sides(frames, "input_space", deepest)


@pytest.mark.parametrize(("name", "metric"), [("input_space", "projection"), ("clusters", "leading_share")])
def test_panels_with_little_place_show_the_largest_learning_rates(analysis_frames, name, metric):
    svg = sections.draw(name, {"analyze": seed_tables.pick(analysis_frames["analyze"], analysis=name, metric=metric)})
    assert "SFT eta_M" in svg and "DPO eta_M" in svg and "eta_S" not in svg


@pytest.mark.parametrize(("metric", "scale"), [("relative_tau", np.array), ("gradient_norm", np.log)])
def test_scaling_shows_clusters_and_sensitivity_of_the_whole_update(analysis_frames, metric, scale):
    frames = one_model(analysis_frames, analysis="interventions", metric=metric)
    whole = seed_tables.pick(sections.table("interventions", frames), part="whole")
    deepest = whole.filter(pl.col("layer").is_null() | (pl.col("layer") == 1))
    assert seed_tables.pick(deepest, condition="safe")["strength"].to_list() == [0.0, 1.0, 1.5]
    assert_sides(frames, "interventions", deepest, scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metrics", "absent"),
    [
        ("clusters", ("leading_share",), "leading share: safe"),
        ("clusters", ("relative_tau",), "last prompt token"),
        ("input_space", ("projection",), "weighted projection"),
        ("input_space", ("gain", "ratio"), "gain: up"),
        ("interventions", ("relative_tau", "gradient_norm"), "relative τ, layer 1"),
        ("interventions", ("refused", "complied", "exact_match"), "Instruct"),
    ],
)
def test_blocks_that_were_not_measured_leave_the_others(analysis_frames, name, metrics, absent):
    rows = analysis_frames["analyze"].filter(~pl.col("metric").is_in(metrics))
    svg = sections.draw(name, {"analyze": rows})
    kept = [text for text in TEXTS[name] if text in svg]
    assert absent not in svg and 0 < len(kept) < len(TEXTS[name])


@pytest.mark.parametrize("name", ["clusters", "input_space", "interventions"])
def test_no_seed_lies_outside_its_panel(analysis_frames, name):
    figure = matplotlib.figure.Figure(layout="constrained")
    SECTIONS[name].picture(sections.table(name, analysis_frames)).draw(figure)
    drawn = [(axes.get_ylim(), line.get_ydata()) for axes in figure.axes for line in axes.lines]
    assert drawn
    for (low, high), heights in drawn:
        assert low <= np.nanmin(heights) and np.nanmax(heights) <= high


def test_jailbreaks_show_means_over_layers(analysis_frames):
    """One layer of the same values as the mean gives the same picture."""
    picked = analysis_frames["analyze"].filter(pl.col("analysis") == "clusters", pl.col("metric") == "relative_tau")
    layers = picked.with_columns(
        pl.col("value").mean().over([name for name in picked.columns if name not in ("layer", "value")])
    )
    flat = layers.filter(pl.col("layer") == 0)
    assert sections.draw("jailbreaks", {"analyze": picked}) == sections.draw("jailbreaks", {"analyze": flat})


def test_norms_ascend_over_the_share_of_directions():
    curve = output_space.ascending(np.array([0.9, np.nan, 0.1, 0.5]))
    assert curve[0] == 0.1 and curve[-1] == 0.9
    assert curve[len(curve) // 2] == pytest.approx(0.5)
    assert (np.diff(curve) >= 0).all()
    assert (output_space.ascending(np.array([0.7])) == 0.7).all()


def test_logarithmic_ranges_are_those_of_the_seeds():
    axes = matplotlib.figure.Figure().subplots()
    row = {"low": -3.0, "mean": 2.0, "high": 90.0, "seed_0": 1.0, "seed_1": 4.0, "seed_2": None, "seed_3": 0.0}
    plot.log_range(axes, pl.DataFrame([row]))
    assert axes.get_yscale() == "log"
    assert axes.get_ylim() == pytest.approx((0.8, 5.0))


@pytest.mark.parametrize(("low", "high"), [(0.011, 0.47), (1.1, 1.9), (3e-6, 2e4), (0.2, 0.21), (1, 10), (0.31, 0.39)])
def test_logarithmic_ticks_are_few_round_and_in_range(low, high):
    axes = matplotlib.figure.Figure().subplots()
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    plot.log_ticks(axes.xaxis, most=4)
    ticks = axes.get_xticks()
    assert 2 <= len(ticks) <= 4
    assert all(low <= tick <= high for tick in ticks)
    assert all(len(plot.short(tick)) <= 5 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.02, "0.02"), (3e-4, "3e-4"), (1e5, "1e5"), (30.0, "30"), (1.5, "1.5")]
)
def test_numbers_are_short(value, text):
    assert plot.short(value) == text


def test_legends_are_filled_row_by_row():
    figure = matplotlib.figure.Figure(layout="constrained")
    keys = {str(number): {"color": plotting.BLUE} for number in range(5)}
    plot.legend(figure, keys, columns=2)
    # Matplotlib fills column by column.
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "2", "4", "1", "3"]


def test_panels_flow_in_columns_of_learning_rates(analysis_frames):
    models = seed_tables.models_of(analysis_frames["analyze"].filter(pl.col("analysis") == "verdicts"))
    slots = plot.flow_slots(models)
    assert [slot.lr_name if slot else None for slot in slots] == ["", None, "eta_M", "eta_S", "eta_M", "eta_S"]
