"""Sphinx: `make docs` builds the site offline into docs/_build."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import generate  # noqa: E402

import jaxsafety  # noqa: E402

project, author = "jaxsafety", "The jaxsafety developers"
release = jaxsafety.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build", "papers.yaml"]
html_theme, html_title = "furo", "jaxsafety"
html_last_updated_fmt = None
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode, nb_execution_raise_on_error = "force", True
nb_execution_timeout = 300
autodoc_typehints, autodoc_member_order = "signature", "bysource"
napoleon_custom_sections, napoleon_use_ivar = ["Fidelity", "References"], True
# Text of repositories' own pages, which lead to files beside them.
suppress_warnings = ["myst.xref_missing"]
_NOTE = re.compile(r"^(References|Fidelity): (?=\S)")


def setup(app):
    """Writes the pages that follow from the sources before Sphinx looks for pages."""
    generate.write()
    app.connect("autodoc-process-docstring", _sections, priority=100)
    app.connect("autodoc-skip-member", _skipped)


def _sections(app, what, name, obj, options, lines):
    """Makes sections of the notes that our docstrings write in one paragraph, before napoleon sees them."""
    found = []
    for line in "\n".join(lines).replace(". Fidelity: ", ".\n\nFidelity: ").split("\n"):
        if note := _NOTE.match(line):
            found += [f"{note[1]}:", f"    {line[note.end() :]}"]
        else:
            found.append(line)
    lines[:] = found


def _skipped(app, what, name, obj, skip, options):
    """Fields of named tuples are told by the class, and what matplotlib writes into a figure is its own."""
    told = getattr(obj, "__doc__", None) or ""
    return True if told.startswith("Alias for field number") or ":mpltype:" in told else None
