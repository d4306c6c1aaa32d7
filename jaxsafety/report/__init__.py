"""Result tables, figures and the HTML report: what a study leaves for people to read.

Needs the extra ``report`` (polars, matplotlib, jinja2). Importing this package checks that they are installed without
importing them; each submodule imports only what it uses.
"""

import importlib.util

_missing = [name for name in ("polars", "matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(f'jaxsafety.report needs {", ".join(_missing)}: pip install ".[report]" in a checkout')
