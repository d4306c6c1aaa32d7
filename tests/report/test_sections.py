"""Which figures there are, the tables beside them, and the files of one figure alone."""

import xml.etree.ElementTree as ET

import polars as pl
import pytest

from jaxsafety.claims import gradients, kumar2024, updates
from jaxsafety.claims import jain2024 as statements
from jaxsafety.report import sections, seed_tables
from jaxsafety.rundir import results
from tests.report.conftest import SECTIONS, STUDY

# Files start with these bytes.
MAGIC = {".png": b"\x89PNG\r\n", ".pdf": b"%PDF-", ".svg": b"<svg "}


def test_every_section_says_what_it_is_and_how_to_read_it():
    assert set(SECTIONS) == {
        *("clusters", "output_space", "input_space", "sensitivity", "jailbreaks", "soft_tokens", "prefill"),
        *("interventions", "causal", "directions", "transfer", "dynamics", "alignment", "refusal_depth"),
        *("kept_energy", "intruders", "gradient_spaces", "uncertainty", "probe", "undoing"),
        *("input_alignment", "spectrum", "separation"),
    }
    figures = " ".join(section.paper for section in SECTIONS.values())
    assert all(f"Figure {number}" in figures for number in range(3, 8))
    for section in SECTIONS.values():
        assert section.title and section.paper
        assert section.reading.endswith(".") and ". " not in section.reading


def test_claims_of_sections_exist_and_stand_in_one_section():
    named = [claim for section in SECTIONS.values() for claim in section.claims]
    known = {claim.name: claim for claim in (*statements.CLAIMS, *updates.CLAIMS, *gradients.CLAIMS, *kumar2024.CLAIMS)}
    assert len(named) == len(set(named))
    assert set(named) <= set(known)
    # What is in none is about the accuracy table, which has a place of its own.
    assert {known[name].where for name in set(known) - set(named)} <= {"App., accuracy table", "attack success rates"}


@pytest.mark.parametrize("name", STUDY)
def test_tables_hold_rows_of_finished_models(analysis_frames, name):
    table = sections.table(name, analysis_frames)
    assert table.columns[-3:] == ["seed_0", "seed_1", "seed_2"]
    steps = set(table.filter(pl.col("analysis") != "curves")["step"])
    # 0 is the pretrained model and the start of tuning.
    assert steps == ({0, 20, 100} if name == "dynamics" else steps & {0, 100})
    assert not table.select(seed_tables.LABELS).is_duplicated().any()


def test_a_table_holds_what_was_measured(analysis_frames):
    rows = analysis_frames["analyze"].filter(
        pl.col("analysis") == "clusters", pl.col("step") == 100, pl.col("method") == "dpo", pl.col("metric") == "tau"
    )
    table = seed_tables.pick(sections.table("clusters", analysis_frames), method="dpo", metric="tau")
    assert table.height * 3 == rows.height
    assert table["mean"].mean() == pytest.approx(rows["value"].mean())


@pytest.mark.parametrize(
    ("name", "labels", "count"),
    [
        ("clusters", {"metric": "leading_share", "part": "response", "condition": "unsafe"}, 2),
        ("input_space", {"metric": "projection", "part": "down", "condition": "safe"}, 2 * 8),
        ("input_space", {"metric": "gain", "part": "down", "condition": "safe"}, 2),
        ("interventions", {"metric": "relative_tau", "part": "whole", "condition": "unsafe"}, 3 * 2),
        ("interventions", {"metric": "gradient_norm", "part": "whole", "condition": "safe"}, 3),
    ],
)
def test_tables_hold_what_stands_below_the_first_panels(analysis_frames, name, labels, count):
    rows = seed_tables.pick(sections.table(name, analysis_frames), method="sft", lr_name="eta_M", **labels)
    assert rows.height == count and (rows["n"] == 3).all()


def test_jailbreaks_have_means_over_layers_beside_the_layers(analysis_frames):
    table = seed_tables.pick(sections.table("jailbreaks", analysis_frames), metric="gain", part="up", method="sft")
    table = seed_tables.pick(table, lr_name="eta_M", condition="unsafe", subset="all")
    layers, mean = table.filter(pl.col("layer").is_not_null()), seed_tables.pick(table, layer=None)
    assert layers["layer"].to_list() == [0, 1] and mean.height == 1
    assert mean["seed_1"][0] == pytest.approx(layers["seed_1"].mean())


def test_alignment_takes_the_slope_from_the_curves(analysis_frames):
    slopes = seed_tables.pick(sections.table("alignment", analysis_frames), analysis="curves")
    assert set(slopes["method"]) == {"dpo"} and set(slopes["metric"]) == {"rewards/slope"}
    assert slopes["step"].n_unique() == 2
    without = sections.table("alignment", {"analyze": analysis_frames["analyze"]})
    assert without.height == sections.table("alignment", analysis_frames).height - slopes.height


def test_unknown_figures_are_refused_with_the_nearest_name(analysis_frames, analysed_run, tmp_path):
    message = r"unknown figure 'cluster': expected one of clusters, .*did you mean 'clusters'\?"
    for call in (
        lambda: sections.draw("cluster", analysis_frames),
        lambda: sections.table("cluster", analysis_frames),
        lambda: sections.write_figure("cluster", analysed_run, tmp_path / "a.svg"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("suffix", sections.FORMATS)
def test_one_figure_into_a_file(analysed_run, tmp_path, suffix):
    out = tmp_path / f"clusters{suffix}"
    sections.write_figure("clusters", analysed_run, out)
    assert out.read_bytes().startswith(MAGIC[suffix])


def test_the_file_of_a_figure_is_its_picture_alone(analysed_run, analysis_frames, tmp_path):
    sections.write_figure("prefill", analysed_run, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == sections.draw("prefill", analysis_frames)
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.svg"]


@pytest.mark.parametrize("name", ["a.jpg", "a", "svg"])
def test_other_formats_are_refused(analysed_run, tmp_path, name):
    with pytest.raises(ValueError, match=rf"cannot write a figure as '{name}': expected a name that ends in \.svg"):
        sections.write_figure("clusters", analysed_run, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_runs_without_analyses_are_refused(analysed_run, tmp_path):
    (analysed_run / "results/analyze.parquet").unlink()
    for call in (
        lambda: sections.write_figure("clusters", analysed_run, tmp_path / "a.svg"),
        lambda: sections.write_tables(analysed_run),
        lambda: sections.read(analysed_run),
    ):
        with pytest.raises(ValueError, match=r"no analyses in .*run `jaxsafety analyze` on it first"):
            call()


def test_tables_are_written_as_csv_and_parquet(analysed_run, analysis_frames):
    written = sections.write_tables(analysed_run)
    assert list(written) == list(STUDY)
    for name, path in written.items():
        expected = sections.table(name, analysis_frames)
        parquet = pl.read_parquet(analysed_run / f"{path}.parquet")
        assert parquet.equals(expected)
        csv = pl.read_csv(analysed_run / f"{path}.csv", schema=expected.schema)
        assert csv["mean"].equals(expected["mean"])
        assert csv["layer"].equals(expected["layer"])


def test_only_tables_with_rows_are_written(analysed_run, analysis_frames):
    only = analysis_frames["analyze"].filter(pl.col("analysis") == "prefill")
    results.write_results(analysed_run / "results/analyze.parquet", only, schema=results.ANALYSIS_SCHEMA)
    (analysed_run / "results/curves.parquet").unlink()
    assert sections.write_tables(analysed_run) == {"prefill": "results/tables/prefill"}
    assert {path.name for path in (analysed_run / "results/tables").iterdir()} == {"prefill.csv", "prefill.parquet"}
