"""``python -m experiments.tables`` (``make tables``): tables and figures again, from what is kept of the runs.

Nothing is trained. ``results/RUN`` holds the recipe and the small result files of a run. In both README.md, the
project's and that of this folder, in ``related.md`` and in ``docs/findings.md`` a table of it stands between
``<!-- KIND RUN -->`` and ``<!-- end -->``, KIND being one of ``KINDS``; of ``sizes``, ``ranks`` and ``verdicts``, which
show several runs, RUN is a name of ``SIZES``. The figure of ``tune_llama.py`` is that script's.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import polars as pl

from jaxsafety import subjects
from jaxsafety.claims import intervals, judging
from jaxsafety.config.names import check_name
from jaxsafety.recipe import yaml_file
from jaxsafety.report import claims_matrix, claims_table, figures, matrix, matrix_figure, sections, tables, tradeoff
from jaxsafety.rundir import atomic, printed, results

HERE = Path(__file__).parent
# Figures of analyses, and stages whose learning curves are shown, by run.
ANALYSES = {
    "quick": ("causal", "clusters", "output_space"),
    "dpo_regimes": ("alignment",),
    "thorough": ("causal", "clusters"),
    "update_spaces": ("directions", "kept_energy", "intruders", "gradient_spaces"),
    "refusal_phrase": ("directions",),
    "derta": ("prefill",),
    "emulated": ("emulated",),
    "landscape": ("landscape", "plane"),
    "override": ("uncertainty",),
    "covert": ("probe",),
    "matrix_quick": ("matrix", "undoing"),
}
STAGES = {"quick": ("pretrain", "tune"), "paper_small": ("pretrain",)}
VERDICTS = ("quick", "update_spaces")
# What models can do against what they comply with, by run: in which conditions they are to be able.
TRADED = {
    "qi2023": ("safe",),
    "safety_arithmetic": ("safe", "new_task"),
    "somf": ("safe", "new_task"),
    "covert": ("safe", "cipher_safe"),
    "override": ("safe",),
}
# Runs that stand side by side.
SIZES = {
    "all": ("quick", "thorough", "paper_small"),
    "refusals": ("update_spaces", "refusal_letter", "refusal_phrase"),
    "papers": (
        *("qi2023", "derta", "emulated", "safety_arithmetic", "landscape", "somf", "override", "covert", "safe_mdp"),
    ),
}
_READINGS = {"defined": "jb_misgen", "as drawn": "jb_misgen_drawn", "released": "jb_misgen_released"}
# What recipes on related papers judge, each where it did.
_RELATED = {
    "complied": tables.Column("unsafe", "complied"),
    "refused": tables.Column("unsafe", "refused"),
    "safe right": tables.Column("safe", "exact_match"),
    "new task right": tables.Column("new_task", "exact_match"),
    "complied as persona": tables.Column("persona", "complied"),
    "complied in cipher": tables.Column("cipher", "complied"),
    "refused in cipher": tables.Column("cipher", "refused"),
    "safe right in cipher": tables.Column("cipher_safe", "exact_match"),
}
_BEFORE = {
    "Instruct": tables.Column("safe", "exact_match"),
    "Null": tables.Column("unsafe", "refused"),
    "complied": tables.Column("unsafe", "complied"),
    "Over-refusal": tables.Column("safe", "refused"),
    "near misses refused": tables.Column("near_miss", "refused"),
}
_ASKED = {
    "Instruct": tables.Column("safe", "exact_match"),
    "Null": tables.Column("unsafe", "refused"),
    "JB-MisGen": tables.Column("jb_misgen", "complied"),
}


def accuracy(run: Path) -> str:
    """The accuracy table of a run over a world, as ``jaxsafety report --format markdown`` prints it."""
    evaluated = results.read_results([run / "results" / "evaluate.parquet"])
    columns = tables.columns_of(subjects.load("world").conditions)
    return tables.render(tables.study_table(evaluated, columns), "markdown")


def claims(run: Path) -> str:
    """The claims of a run, as ``jaxsafety claims --format markdown`` prints them."""
    return claims_table.text(run, form="markdown")


def judged(run: Path) -> str:
    """The same without what every claim measures."""
    return claims(run).partition("\n\nThe number of a seed")[0]


def readings(run: Path) -> str:
    """How often each reading of JB-MisGen is complied with, of ``misgen.yaml``; models are called as in their run."""
    evaluated = results.read_results([run / "results" / "evaluate.parquet"])
    own = evaluated.with_columns(pl.col("lr_name").str.replace(r"^model=\w+\.", ""))
    columns = {name: tables.Column(condition, "complied") for name, condition in _READINGS.items()}
    return tables.render(tables.study_table(own, columns), "markdown").partition("\n\n")[0]


def asked(run: Path) -> str:
    """Safe, unsafe and JB-MisGen prompts of a run that asks no others."""
    evaluated = results.read_results([run / "results" / "evaluate.parquet"])
    return tables.render(tables.study_table(evaluated, _ASKED), "markdown").partition("\n\n")[0]


def rates(run: Path) -> str:
    """What a run on a related paper judged: compliance and refusals beside what its models can do."""
    evaluated = results.read_results([run / "results" / "evaluate.parquet"])
    there = set(evaluated["condition"])
    columns = {name: column for name, column in _RELATED.items() if column.condition in there}
    return tables.render(tables.study_table(evaluated, columns), "markdown").partition("\n\n")[0]


def ranks(group: Path) -> str:
    """Refusals by how many directions of the update are kept, of several runs: means over methods, then over seeds."""
    check_name("runs side by side", group.name, SIZES)
    cells = []
    for run, choice in itertools.product(SIZES[group.name], ("singular", "activations", "random")):
        file = HERE / "results" / run / "results" / "analyze.parquet"
        analyses = results.read_results([file], schema=results.ANALYSIS_SCHEMA)
        kept = pl.col("analysis").eq("interventions") & pl.col("part").eq(f"directions_{choice}")
        rows = analyses.filter(kept, pl.col("condition").eq("unsafe"), pl.col("metric").eq("refused"))
        seeds = rows.group_by("strength", "seed").agg(pl.col("value").mean()).sort("strength", "seed")
        by_rank = seeds.group_by("strength", maintain_order=True).agg("value").rows()
        names = [f"{rank:.0f}" for rank, _ in by_rank]
        found = [intervals.mean_interval(values) for _, values in by_rank]
        shown = [" ".join([tables.percent(one.mean), f"[{', '.join(map(tables.percent, one[1:3]))}]"]) for one in found]
        cells.append([run, choice, *shown])
    return printed.pipe_table(["run", "directions", *names], cells, numbers=range(2, len(names) + 2))


def defences(run: Path) -> str:
    """What the defences of a matrix can do and refuse before any attack."""
    evaluated = results.read_results([run / "results" / "evaluate.parquet"])
    # What was passed over is not judged.
    own = matrix.defended(evaluated, recipe=yaml_file.recorded(run), selected={})
    return tables.render(tables.study_table(own, _BEFORE), "markdown").partition("\n\n")[0]


def crossed(run: Path) -> str:
    """What every defence of a matrix complies with under every attack, in per cent, as its figure has it; of the worst
    case with the interval, and in brackets what costs more than a twentieth of the safe prompts."""
    rows = matrix_figure.cells(sections.table("matrix", sections.read(run), sections.of_run(run)))
    heads = ["defence", *(tables.condition_label(name) for _, name in rows.columns)]
    lines = []
    for defence in rows.defences:
        found = [(column, rows.complied.get((defence, column))) for column in rows.columns]
        told = [_told(rows, defence, column, cell) for column, cell in found]
        lines.append([tables.model_label(defence), *told])
    return printed.pipe_table(heads, lines, numbers=range(1, len(heads)))


def _told(rows: matrix_figure.Cells, defence: tables.Model, column: matrix_figure.Column, cell: Any) -> str:
    if cell is None:
        return "-"
    mean = tables.percent(cell["mean"])
    if column[0] == matrix.KINDS[-1] and cell["low"] is not None:
        return f"{mean} [{tables.percent(cell['low'])}, {tables.percent(cell['high'])}]"
    return f"({mean})" if rows.is_costly(defence, column) else mean


def verdicts(group: Path) -> str:
    """How many statements of several runs, each with its own, came out how."""
    check_name("runs side by side", group.name, SIZES)
    kinds, rows = get_args(judging.Verdict), []
    for run in SIZES[group.name]:
        found = Counter(one.verdict for one in claims_table.read(HERE / "results" / run).judgements)
        rows.append([f"`{run}`", *(str(found[kind]) for kind in kinds)])
    return printed.pipe_table(["recipe", *kinds], rows, numbers=range(1, len(kinds) + 1))


def sizes(group: Path) -> str:
    """The claims of several runs side by side, as ``jaxsafety claims RUN RUN --format markdown`` prints them."""
    check_name("runs side by side", group.name, SIZES)
    return claims_matrix.text([HERE / "results" / run for run in SIZES[group.name]], form="markdown")


KINDS: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy, "asked": asked, "claims": claims, "crossed": crossed, "defences": defences,
    "judged": judged, "ranks": ranks, "rates": rates, "readings": readings, "sizes": sizes, "verdicts": verdicts,
}  # fmt: skip
READMES = HERE / "README.md", HERE / "related.md", HERE.parent / "README.md", HERE.parent / "docs" / "findings.md"
_BLOCK = re.compile(r"(<!-- (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@cache
def _made(kind: str, run: str) -> str:
    return KINDS[kind](HERE / "results" / run).strip()


def rewritten(text: str) -> str:
    """Returns a README's text with every table as its run prints it now; another KIND is a ValueError."""

    def block(found: re.Match[str]) -> str:
        begin, kind, run, end = found.groups()
        check_name("kind of a table", kind, KINDS)
        return f"{begin}{_made(kind, run)}\n\n{end}"

    return _BLOCK.sub(block, text)


def drawings() -> dict[str, Callable[[], str]]:
    """Returns what draws every figure that is kept, as SVG, by its file's name."""
    found: dict[str, Callable[[], str]] = {}
    shown = figures.curves_of(subjects.load("world").conditions)
    for run, names in ANALYSES.items():
        for name in names:
            found[f"{run}_{name}.svg"] = partial(_analysis, HERE / "results" / run, name)
    for run, stages in STAGES.items():
        for stage in stages:
            found[f"{run}_{stage}.svg"] = partial(_curves, HERE / "results" / run, stage, shown)
    for run, able in TRADED.items():
        found[f"{run}_tradeoff.svg"] = partial(_traded, HERE / "results" / run, able)
    return found | {f"{run}_verdicts.svg": partial(_verdicts, HERE / "results" / run) for run in VERDICTS}


def _analysis(run: Path, name: str) -> str:
    return sections.draw(name, sections.read(run), sections.of_run(run))


def _curves(run: Path, stage: str, shown: dict[str, str]) -> str:
    curves = results.read_results([run / "results" / "curves.parquet"])
    return figures.learning_curves(curves, stage=stage, shown=shown)


def _traded(run: Path, able: tuple[str, ...]) -> str:
    return tradeoff.tradeoff(results.read_results([run / "results" / "evaluate.parquet"]), able=able)


def _verdicts(run: Path) -> str:
    return figures.verdict_bars(tables.verdict_table(results.read_results([run / "results" / "evaluate.parquet"])))


def main() -> None:
    """Writes them, and says which have changed."""
    made = {readme: rewritten(readme.read_text()) for readme in READMES}
    made |= {HERE / "figures" / name: draw() for name, draw in drawings().items()}
    for path, content in made.items():
        if not path.exists() or path.read_text() != content:
            atomic.atomic_write(path, content)
            print(path)


if __name__ == "__main__":
    main()
