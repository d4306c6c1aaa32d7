"""The report stage on run directories as the stages before it leave them."""

import re

import markupsafe
import polars as pl
import pytest

from jaxsafety.report import study_report
from jaxsafety.rundir import results
from tests.report.conftest import SECTIONS, STUDY


@pytest.fixture
def page(analysed_run, undrawn):
    """Writes the report and returns the page."""

    def write():
        study_report.write(analysed_run)
        return (analysed_run / "report.html").read_text()

    return write


def test_an_analysed_run_has_claims_figures_and_tables(analysed_run, page, analysis_frames):
    few = analysis_frames["analyze"].filter(pl.col("lr_name") != "eta_S")
    results.write_results(analysed_run / "results/analyze.parquet", few, schema=results.ANALYSIS_SCHEMA)
    source = page()
    for name in STUDY:
        section = SECTIONS[name]
        assert f'<h3 id="analysis-{name}">{markupsafe.escape(section.title)}</h3>' in source
        for suffix in ("csv", "parquet"):
            assert f'href="results/tables/{name}.{suffix}"' in source
    assert source.count('class="jaxsafety"') == len(STUDY) + 4
    assert len(re.findall(r'<span class="chip (supported|contradicted|no-effect|undecided)">', source)) > 28
    for path in re.findall(r'href="([^#"][^"]*)"', source):
        assert (analysed_run / path).is_file(), path


def test_a_run_without_analyses_has_a_report_without_them(analysed_run, page):
    (analysed_run / "results/analyze.parquet").unlink()
    source = page()
    assert "Claims and analyses" not in source and "results/tables" not in source
    assert source.count('class="jaxsafety"') == 4
    assert not (analysed_run / "results/tables").exists()


def test_analyses_that_were_not_made_are_left_out(analysed_run, page, analysis_frames):
    only = analysis_frames["analyze"].filter(pl.col("analysis") == "prefill")
    results.write_results(analysed_run / "results/analyze.parquet", only, schema=results.ANALYSIS_SCHEMA)
    source = page()
    assert 'id="analysis-prefill"' in source and 'id="analysis-clusters"' not in source
    assert "no clusters in this run" in source


def test_analyses_of_dead_seeds_alone_are_left_out(analysed_run, page, analysis_frames):
    dead = pl.when(pl.col("analysis") == "prefill").then(None).otherwise(pl.col("value")).alias("value")
    some = analysis_frames["analyze"].filter(pl.col("analysis").is_in(["prefill", "sensitivity"])).with_columns(dead)
    results.write_results(analysed_run / "results/analyze.parquet", some, schema=results.ANALYSIS_SCHEMA)
    source = page()
    assert 'id="analysis-sensitivity"' in source and 'id="analysis-prefill"' not in source


def test_a_run_that_was_not_evaluated_is_refused(analysed_run):
    (analysed_run / "results/evaluate.parquet").unlink()
    with pytest.raises(ValueError, match="run `jaxsafety evaluate` on it first"):
        study_report.write(analysed_run)


def test_a_study_of_a_world_has_its_own_words(page):
    source = page()
    assert "drawn from keys that no training stream uses" in source and "JB-CO-Task" in source
    assert "each seed is faint" in source and "over the prompts of a label" not in source
