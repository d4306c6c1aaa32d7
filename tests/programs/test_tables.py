"""What experiments/README.md shows is what its runs print."""

import pytest

from experiments import tables

README = (tables.HERE / "README.md").read_text()


def test_the_tables_are_what_their_runs_print():
    assert len(tables._BLOCK.findall(README)) == README.count("<!-- end -->") == 5
    assert tables.rewritten(README) == README
    changed = README.replace("| pretrained | 100 ", "| pretrained | 101 ", 1)
    assert changed != README and tables.rewritten(changed) == README


@pytest.mark.slow
@pytest.mark.parametrize("name", tables.drawings())
def test_the_figures_are_what_their_runs_draw(name):
    assert tables.drawings()[name]() == (tables.HERE / "figures" / name).read_text()
