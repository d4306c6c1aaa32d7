"""The pages of the documentation that follow from the sources: the reference, and one page a paper.

Written into folders that git ignores, before Sphinx reads them.
"""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from jaxsafety.cli import listing
from jaxsafety.report import claims_table

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "jaxsafety"
SITE = "https://arxiv.org/abs/"
# Folders of the reference, lowest layer first, and what stands in each.
FOLDERS = {
    "": "Records and contracts",
    "losses": "Losses",
    "linalg": "Linear algebra",
    "world": "The synthetic world",
    "pools": "Pools of training examples",
    "models": "Models",
    "parametrisations": "What is trained",
    "training": "Training",
    "methods": "Methods",
    "edits": "Edits of weights",
    "attacks": "Attacks",
    "analysis": "Analyses",
    "claims": "Claims",
    "subjects": "Subjects",
    "recipe": "Recipes",
    "formats": "Files of others",
    "report": "Tables, figures, reports",
}
_TOP = ("jaxsafety", "jaxsafety.types", "jaxsafety.tree", "jaxsafety.keys")
_NUMBER = re.compile(r"\d{4}\.\d{5}")


def write() -> None:
    """Writes all generated pages anew."""
    for folder in ("reference", "papers"):
        shutil.rmtree(DOCS / folder, ignore_errors=True)
        (DOCS / folder).mkdir()
    for name, text in (*_reference(), *_papers()):
        (DOCS / name).write_text(text)


def _reference() -> Iterator[tuple[str, str]]:
    pages = []
    for folder, title in FOLDERS.items():
        name = folder or "jaxsafety"
        pages.append(name)
        yield f"reference/{name}.md", f"# {title}\n\n" + "\n".join(map(_module, _modules(folder)))
    listed = "\n".join(pages)
    index = (
        "# Reference\n\nFolders are layers, lowest first: each imports what stands above it. Shapes are in the "
        "annotations; the letters of the axes are explained in [Records and contracts](jaxsafety.md).\n\n"
        f"```{{toctree}}\n{listed}\n```\n"
    )
    yield "reference/index.md", index


def _modules(folder: str) -> list[str]:
    if not folder:
        return list(_TOP)
    if (PACKAGE / f"{folder}.py").exists():
        return [f"jaxsafety.{folder}"]
    files = sorted((PACKAGE / folder).rglob("*.py"))
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files)
    return [name for name in names if _documented(name)]


def _documented(name: str) -> bool:
    """Whether somebody finds a function or a record in a module."""
    return any(
        isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        for node in ast.parse(_source(name)).body
    )


def _source(name: str) -> str:
    place = ROOT.joinpath(*name.split("."))
    return (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()


def _module(name: str) -> str:
    return f"## {name.removeprefix('jaxsafety.')}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"


def _papers() -> Iterator[tuple[str, str]]:
    named = yaml.safe_load((DOCS / "papers.yaml").read_text())
    there = {paper["id"]: _parts(paper["id"]) for paper in named}
    for paper in named:
        yield f"papers/{paper['id']}.md", _page(paper, there[paper["id"]])
    rows = [f"[{paper['who']}]({paper['id']}.md) | {paper['title']} | `{paper['run']}.yaml`" for paper in named]
    others = sorted({one for _, name, module in _every() for one in _NUMBER.findall(_source(module))} - set(there))
    more = [f"[{one}]({SITE}{one}) | {', '.join(f'`{name}`' for _, name, _ in _parts(one))}" for one in others]
    pages = "\n".join(there)
    index = (
        "# Papers\n\n| paper | title | recipe |\n|---|---|---|\n"
        + "".join(f"| {row} |\n" for row in rows)
        + "\nOf these single parts are here; what each takes from its paper and what it leaves out, its `Fidelity:` "
        + "line says (`jaxsafety explain NAME`, or the reference):\n\n| paper | parts |\n|---|---|\n"
        + "".join(f"| {row} |\n" for row in more)
        + f"\n```{{toctree}}\n:hidden:\n{pages}\n```\n"
    )
    yield "papers/index.md", index


def _every() -> list[tuple[str, str, str]]:
    """What has a file of its own: kind, name, module."""
    return [(kind, name, module) for _, kind, table in listing.KINDS for name, module in table.items()]


def _parts(number: str) -> list[tuple[str, str, str]]:
    return [part for part in _every() if number in _source(part[2])]


def _page(paper: dict[str, str], parts: list[tuple[str, str, str]]) -> str:
    kept = ROOT / "experiments" / "results" / paper["run"]
    implemented = "\n".join(_part(*part) for part in parts)
    return (
        f"# {paper['title']}\n\n{paper['who']}, [arXiv {paper['id']}]({SITE}{paper['id']})\n\n## What is here\n\n"
        f"{implemented}\n## What came out\n\nRecipe: `experiments/{paper['run']}.yaml`, whose results are kept; the "
        f"text to it is in `{paper['told']}`.\n\n{claims_table.text(kept, form='markdown')}"
    )


def _part(kind: str, name: str, module: str) -> str:
    tree = ast.parse(_source(module))
    said = (ast.get_docstring(tree) or "").partition("\n")[0]
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    fidelity = re.search(r"Fidelity: (.+?)(?=\n\n|\Z)", ast.get_docstring(config) or "", re.DOTALL)
    more = f"\n  Fidelity: {' '.join(fidelity[1].split())}" if fidelity else ""
    return f"- **`{name}`** ({kind}): {said}{more}\n"
