"""What the READMEs and the findings show is what the runs print that are kept."""

import re

import pytest

from experiments import keep, tables
from jaxsafety.config import yaml12
from jaxsafety.report import claims_table

ROOT = tables.HERE.parent
PAPERS = {"halawi2024", "hazra2024", "kumar2024", "low2023", "peng2024", "qi2023", "yi2024", "yuan2024", "zhou2024"}


def _claims_of_its_own(path):
    """Whether a kept run is judged by the statements of a related paper."""
    return bool(set(yaml12.read(path, what="a recipe", such="seeds: [0]").get("claims") or ()) & PAPERS)


def test_every_table_has_its_place():
    assert [readme.read_text().count("<!-- end -->") for readme in tables.READMES] == [16, 17, 1, 1]


# The first page's each time, the others, which take a minute, with the slow tests.
SHOWN = [path if path == ROOT / "README.md" else pytest.param(path, marks=pytest.mark.slow) for path in tables.READMES]


@pytest.mark.parametrize("readme", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tables_are_what_their_runs_print(readme):
    text = readme.read_text()
    assert tables.rewritten(text) == text
    # A digit of the first table.
    place = re.compile(r"\d").search(text, text.index("-->\n|")).start()
    changed = f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"
    assert changed != text and tables.rewritten(changed) == text


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"^unknown kind of a table 'claim': .*did you mean 'claims'"):
        tables.rewritten("<!-- claim quick -->\n<!-- end -->")


@pytest.mark.slow
@pytest.mark.parametrize("name", tables.drawings())
def test_the_figures_are_what_their_runs_draw(name):
    assert tables.drawings()[name]() == (tables.HERE / "figures" / name).read_text()


@pytest.mark.slow
def test_what_is_kept_of_a_run_judges_its_claims_alike(tmp_path):
    """The demo's results, which are whole: claims need finished models alone, and no single directions."""
    whole = tables.HERE / "results" / "quick"
    keep.keep(whole, tmp_path / "quick")
    sizes = [(one / "results" / "analyze.parquet").stat().st_size for one in (tmp_path / "quick", whole)]
    assert sizes[0] < 0.6 * sizes[1]
    assert claims_table.text(tmp_path / "quick", form="csv") == claims_table.text(whole, form="csv")


RELATED = [path.parent.name for path in sorted(tables.HERE.glob("results/*/config.yaml")) if _claims_of_its_own(path)]


@pytest.mark.slow
@pytest.mark.parametrize("run", RELATED)
def test_statements_about_a_related_paper_are_all_measured(run):
    """By the results of their recipe: what a statement asks for by name is there."""
    family = claims_table.read(tables.HERE / "results" / run)
    assert family.judgements
    assert not [(one.claim.name, one.why) for one in family.judgements if not one.values]
