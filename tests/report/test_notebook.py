"""A run opened in a notebook: frames, figures, and how it shows itself."""

import json
import re
from pathlib import Path

import polars as pl
import pytest
from matplotlib.figure import Figure

import jaxsafety
from jaxsafety.report import plotting, sections, tables

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.ipynb"))


def test_the_table_is_the_one_that_is_printed(analysed_run):
    run = jaxsafety.open_run(str(analysed_run))
    table = run.table()
    assert table["method"].to_list() == ["pretrained", "sft", "sft", "dpo", "unlearn"]
    sft = table.row(1, named=True)
    assert (sft["Instruct"], sft["Instruct n"], sft["Null"]) == (pytest.approx(0.99), 2, 0.5)
    assert table["JB-MisGen"].is_null().all()
    dead = table.row(3, named=True)
    assert dead["Instruct n"] == 1


def test_rows_are_those_of_the_files(analysed_run):
    run = jaxsafety.open_run(analysed_run)
    assert run.verdicts().filter(method="sft", seed=1, condition="safe", metric="complied")["value"][0] == 0.98
    assert "train" in run.curves()["condition"]
    assert {"clusters", "prefill"} <= set(run.analyses()["analysis"])


def test_claims_have_a_verdict_each(analysed_run):
    claims = jaxsafety.open_run(analysed_run).claims()
    assert claims["number"].to_list() == list(range(1, len(claims) + 1))
    assert set(claims["verdict"]) <= {"supported", "contradicted", "no effect", "undecided"}


def test_a_figure_is_matplotlibs_and_shows_as_in_the_report(analysed_run):
    run = jaxsafety.open_run(analysed_run)
    assert "prefill" in run.figures
    figure = run.figure("prefill")
    assert isinstance(figure, Figure) and figure.axes
    assert figure._repr_svg_() == sections.draw("prefill", sections.read(analysed_run), sections.of_run(analysed_run))


def test_a_note_below_a_figure_is_saved_with_it(tmp_path):
    picture = plotting.Picture(lambda figure: figure.subplots(), 200, "one")
    dead = {tables.Model("sft", "eta_M", 1e-3): tables.Dead(1, 4)}
    heights = []
    for one in (picture, plotting.with_dead(picture, dead)):
        plotting.Drawn(one).savefig(tmp_path / "one.svg")
        source = (tmp_path / "one.svg").read_text()
        heights.append(float(re.search(r'viewBox="0 0 \S+ (\S+)"', source)[1]))
        assert ("SFT eta_M 1e-3: 1 of 4 seeds dead" in source) == (one is not picture)
    assert heights[1] > heights[0] + 10


def test_a_run_shows_itself(analysed_run):
    run = jaxsafety.open_run(analysed_run)
    page = run._repr_html_()
    assert page.count("<tr>") == 6 and "DPO eta_M 1e-3" in page and f"<b>{analysed_run.name}</b>" in page
    assert tables.table_notes([])[0][:20] in page and "Figures: clusters" in page


def test_without_analyses_there_is_a_table_alone(analysed_run):
    (analysed_run / "results/analyze.parquet").unlink()
    run = jaxsafety.open_run(analysed_run)
    assert run.figures == [] and "Figures" not in run._repr_html_() and len(run.table()) == 5
    for ask in (run.analyses, run.claims, lambda: run.figure("clusters")):
        with pytest.raises(ValueError, match=r"no analyses in .*: run `jaxsafety analyze` on it first"):
            ask()


def test_what_is_no_run_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"no run in .*: expected a directory that `jaxsafety run` made"):
        jaxsafety.open_run(tmp_path)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, monkeypatch):
    """Cell by cell, as one program, in their folder; what a cell ends with shows itself."""
    monkeypatch.chdir(notebook.parent)
    names = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            *lines, last = "".join(cell["source"]).strip().split("\n")
            exec("\n".join(lines), names)
            try:
                shown = eval(last, names)
            except SyntaxError:
                exec(last, names)
                continue
            assert any(hasattr(shown, form) for form in ("_repr_html_", "_repr_svg_")) or isinstance(shown, list)
            assert not isinstance(shown, pl.DataFrame) or len(shown)
