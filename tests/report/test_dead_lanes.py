"""Dead seeds: who they are, that no mean holds one, and that every table and figure says how many there are."""

import re
import xml.etree.ElementTree as ET
from functools import cache

import numpy as np
import polars as pl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxsafety.report import claims_table, dead_lanes, figures, plotting, sections, study_report, tables
from jaxsafety.report.tables import Dead, Model
from jaxsafety.rundir import results
from tests.report import conftest, synthetic
from tests.report.conftest import SECTIONS

NAMES = conftest.STUDY
DEAD = {("sft", "eta_M"): (2,), ("dpo", "eta_S"): (0, 1, 2)}
COUNTED = {Model("sft", "eta_M", 1e-3): Dead(1, 3), Model("dpo", "eta_S", 1e-4): Dead(3, 3)}
NOTES = (
    "SFT eta_M 1e-3: 1 of 3 seeds dead (not finite), left out of the mean.",
    "DPO eta_S 1e-4: 3 of 3 seeds dead (not finite): no result.",
)

PLACE = re.compile(r"(?:translate|rotate)\((?:[-\d.]+ )+([-\d.]+)\)")


def words(svg):
    """The text of a figure, lines joined."""
    return " ".join(" ".join("".join(ET.fromstring(svg).itertext()).split()).split())


@pytest.fixture(scope="module")
def frames():
    """The small study, but one seed of SFT eta_M and all of DPO eta_S died after its second snapshot."""
    rows = synthetic.killed(synthetic.analysis_rows(conftest.SMALL), DEAD)
    return {
        "analyze": results.rows_to_frame(rows, schema=results.ANALYSIS_SCHEMA),
        "curves": results.rows_to_frame(synthetic.killed(synthetic.slope_rows(conftest.SMALL), DEAD)),
    }


@pytest.fixture(scope="module")
def svgs(frames):
    return cache(lambda name: sections.draw(name, frames))


def test_the_dead_are_counted_and_the_partners_of_pairs_are_not(frames, analysis_frames):
    assert dead_lanes.count_dead(frames["analyze"]) == COUNTED
    assert list(dead_lanes.count_dead(frames["analyze"].reverse())) == list(COUNTED)
    assert dead_lanes.count_dead(analysis_frames["analyze"]) == {}


def test_a_lane_is_dead_by_its_last_step_and_not_by_what_says_that_it_is(row):
    lane = [row(seed=0, step=1), row(seed=0, step=2, value=None), row(seed=0, step=2, metric="finite", value=0.0)]
    revived = [row(seed=1, step=1, value=None), row(seed=1, step=2)]
    rows = results.rows_to_frame([*lane, *revived])
    assert dead_lanes.count_dead(rows) == {Model("sft", "eta_M", 1e-3): Dead(1, 2)}
    # Nothing before its death is a result either.
    assert dead_lanes.without_dead(rows)["value"].to_list() == [None, None, None, None, 0.5]


def test_rows_without_dead_lanes_are_not_touched(analysis_frames):
    rows = analysis_frames["analyze"]
    assert dead_lanes.without_dead(rows) is rows


def test_models_with_as_many_dead_seeds_share_a_sentence():
    models = [Model("sft", "eta_M", 1e-3), Model("dpo", "eta_M", 1e-3), Model("dpo", "eta_S", 1e-4)]
    notes = tables.dead_notes(dict(zip(models, (Dead(1, 4), Dead(4, 4), Dead(1, 4)), strict=True)))
    assert notes == [
        "SFT eta_M 1e-3, DPO eta_S 1e-4: 1 of 4 seeds dead (not finite), left out of the mean.",
        "DPO eta_M 1e-3: 4 of 4 seeds dead (not finite): no result.",
    ]


# Curves, bars, points and panels that share their axes each time, the others with the slow tests.
EACH = [
    pytest.param(name, marks=() if name in ("clusters", "causal", "jailbreaks", "transfer") else pytest.mark.slow)
    for name in NAMES
]


@pytest.mark.parametrize("name", EACH)
def test_every_figure_counts_the_dead(svgs, name):
    shown = words(svgs(name))
    assert all(f"* {note}" in shown for note in NOTES)
    # A label of a model that has dead seeds, wherever it stands alone, has a star.
    texts = {"".join(element.itertext()).strip() for element in ET.fromstring(svgs(name)).iter()}
    assert "SFT eta_M 1e-3" not in texts and "DPO eta_S 1e-4" not in texts
    # The living stand there in the same way; of alignment there are pairs, and the slope of DPO alone.
    if "DPO eta_M 1e-3" in texts and name != "alignment":
        assert "SFT eta_M 1e-3*" in texts


@pytest.mark.parametrize("name", NAMES)
def test_no_mean_of_any_figure_holds_a_dead_seed_at_any_step(frames, analysis_frames, name):
    table, healthy = sections.table(name, frames), sections.table(name, analysis_frames)
    seeds = [f"seed_{seed}" for seed in conftest.SMALL.seeds]
    lane = table.filter(method="sft", lr_name="eta_M").filter(pl.col("analysis") != "alignment")
    if name != "alignment":
        assert not lane.is_empty()
    assert lane["seed_2"].is_null().all() and (lane["n"] <= 2).all()
    assert (table.filter(method="dpo", lr_name="eta_S")["n"] == 0).all()
    living = table.filter(pl.col("n") > 0)
    values = living.select(pl.col(seeds).cast(pl.Float64).fill_null(np.nan)).to_numpy()
    np.testing.assert_array_equal(living["n"], np.isfinite(values).sum(axis=1))
    np.testing.assert_allclose(living["mean"], np.nanmean(values, axis=1), atol=1e-12)
    # The others are what they are in the study in which nobody died.
    others = ~pl.struct("method", "lr_name").is_in([dict(zip(("method", "lr_name"), key, strict=True)) for key in DEAD])
    shared = ~pl.col("part").str.contains("transfer|~")
    assert table.filter(others & shared).equals(healthy.filter(others & shared))


@pytest.mark.parametrize("name", EACH)
def test_notes_stand_below_the_figure_which_stays_in_its_place(frames, svgs, name):
    picture = SECTIONS[name].picture(sections.table(name, frames))
    noted, plain = plotting.with_dead(picture, COUNTED), plotting.svg(picture)
    height = float(re.search(r'viewBox="0 0 380 ([\d.]+)"', svgs(name)).group(1))
    assert height > picture.height + 11 * len(noted.notes)
    heights = {"".join(text.itertext()): float(PLACE.search(text.get("transform")).group(1))
               for text in ET.fromstring(svgs(name)).iter("{http://www.w3.org/2000/svg}text")}  # fmt: skip
    below = [heights.pop(line.strip()) for line in noted.notes]
    assert picture.height < below[0] and below == sorted(below) and below[-1] < height
    assert max(heights.values()) <= picture.height
    curves = re.findall(r'<path d="([^"]*)" clip-path', svgs(name))
    assert len(curves) > 5 or name in ("causal", "jailbreaks")
    # A star may widen what names the models, and panels give way to it; they move sideways only.
    ends = [
        [re.findall(r"[-\d.]+", line)[-1] for line in re.findall(r'<path d="(M[^"]*)" clip-path', svg)]
        for svg in (svgs(name), plain)
    ]
    np.testing.assert_allclose(*(np.array(end, float) for end in ends), atol=1e-3)


@pytest.mark.parametrize("count", [Dead(1, 20), Dead(20, 20)])
def test_notes_are_not_cut_off(count):
    models = {
        Model(method, rate, 3.125e-4): count for method in ("sft", "dpo", "unlearn") for rate in ("eta_M", "mmmm")
    }
    notes = plotting.with_dead(plotting.Picture(lambda _: None, 10, "none"), models).notes
    assert len(notes) > 2
    figure = Figure()
    for note in notes:
        text = figure.text(0, 0, note, fontsize=11, family="DejaVu Sans")
        # Figures have 100 points an inch here, the text 72.
        assert text.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width * 72 / 100 < plotting.WIDTH - 6


def test_a_picture_without_dead_seeds_is_the_same_picture(frames):
    picture = SECTIONS["clusters"].picture(sections.table("clusters", frames))
    assert plotting.with_dead(picture, {}) is picture


@pytest.fixture
def died(study_rows, curve_rows):
    """Rows of the accuracy table in which all of unlearn eta_S is dead besides DPO's seed 1, and of the curves."""
    dead = [row | {"value": None} if row["method"] == "unlearn" else row for row in study_rows]
    return results.rows_to_frame(dead), results.rows_to_frame(curve_rows)


def test_curves_are_those_of_the_living_from_the_first_step_on(died):
    svg = figures.learning_curves(died[1], stage="tune")
    both = "* SFT eta_M 1e-3, SFT eta_S 1e-4: 1 of 2 seeds dead (not finite), left out of the mean."
    assert both in words(svg)
    alone = figures.learning_curves(died[1].filter(pl.col("seed") == 0), stage="tune")
    assert "dead" not in alone and "dead" not in figures.learning_curves(died[1], stage="pretrain")
    paths = [re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: #1a82c4', drawn) for drawn in (svg, alone)]
    points = [np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path[0]), float) for path in paths]
    np.testing.assert_allclose(*points, atol=1e-3)


def test_bars_of_the_dead_are_words(died):
    svg = figures.verdict_bars(tables.verdict_table(died[0]))
    shown = words(svg)
    assert svg.count(">dead</text>") == 5
    assert ">unlearn eta_S 1e-4*</text>" in svg and ">DPO eta_M 1e-3*</text>" in svg
    assert ">SFT eta_M 1e-3</text>" in svg
    assert "* DPO eta_M 1e-3: 1 of 2 seeds dead (not finite), left out of the mean." in shown
    assert "* unlearn eta_S 1e-4: 2 of 2 seeds dead (not finite): no result." in shown


@pytest.mark.usefixtures("undrawn")
def test_the_report_marks_its_tables_claims_and_figures(analysed_run, frames, died):
    results.write_results(analysed_run / "results/analyze.parquet", frames["analyze"], schema=results.ANALYSIS_SCHEMA)
    results.write_results(analysed_run / "results/evaluate.parquet", died[0])
    study_report.write(analysed_run)
    page = re.sub(r"\s+", " ", (analysed_run / "report.html").read_text())
    # The accuracy table, the verdicts by condition, and the bars, which say it once more as text.
    unlearn = "* unlearn eta_S 1e-4: 2 of 2 seeds dead (not finite): no result."
    assert page.count(unlearn) >= 2
    assert '<th scope="row">unlearn eta_S 1e-4</th> <td>dead<span class="mark">*</span></td>' in page
    assert '<td>100 / 0.0 / 0.0<span class="mark">*</span></td>' in page
    assert all(f"<p>{note}</p>" in page for note in NOTES)
    assert page.count("* SFT eta_M 1e-3: 1 of 3 seeds") == len(NAMES)


def test_a_figure_in_which_nobody_is_left_says_so(analysed_run, frames, monkeypatch):
    # Of every pair one is dead.
    nobody = pl.when(~pl.col("part").str.starts_with("transfer")).then(pl.col("value")).alias("value")
    rows = frames["analyze"].with_columns(nobody)
    with pytest.raises(sections.NothingToDraw, match=r"transfer to draw: .*; SFT eta_M 1e-3: 1 of 3 seeds dead"):
        sections.draw("transfer", {"analyze": rows})
    results.write_results(analysed_run / "results/analyze.parquet", rows, schema=results.ANALYSIS_SCHEMA)
    drawn = plotting.svg

    def svg(picture):
        """Of a figure that has something to draw, which is known before, its name."""
        empty = picture.name.endswith(": nothing to draw")
        return drawn(picture) if empty else f"<svg><title>{picture.name}</title></svg>"

    monkeypatch.setattr(plotting, "svg", svg)
    study_report.write(analysed_run)
    page = (analysed_run / "report.html").read_text()
    assert 'id="analysis-transfer"' in page
    (svg,) = re.findall(r"<svg[^>]*><title>[^<]*: nothing to draw</title>.*?</svg>", page, flags=re.DOTALL)
    assert all(f"* {note}" in words(svg) for note in NOTES)


def test_claims_name_the_dead_in_text_and_markdown(analysed_run, frames):
    results.write_results(analysed_run / "results/analyze.parquet", frames["analyze"], schema=results.ANALYSIS_SCHEMA)
    text, markdown = (" ".join(claims_table.text(analysed_run, form=form).split()) for form in ("table", "markdown"))
    for note in NOTES:
        assert note in text and note in markdown
    judgements = claims_table.read(analysed_run).judgements
    separate = next(found for found in judgements if found.claim.name == "clusters_separate")
    assert separate.values[2] is None and separate.interval.n == 2
