"""The claims of a run judged and shown: as text for a terminal, as Markdown, and as records.

A contradicted claim takes the same place as a supported one: rows stand in the order of the paper, whatever came out.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

import polars as pl
from rich.table import Table

from jaxsafety import claims
from jaxsafety.claims import evidence, judging
from jaxsafety.claims.intervals import Interval
from jaxsafety.claims.judging import Family, Judgement
from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.schema import Recipe
from jaxsafety.report import dead_lanes
from jaxsafety.report.tables import ASCII_BOX, dead_notes, plain_text
from jaxsafety.rundir import printed, results
from jaxsafety.rundir.printed import Form

_SMALLEST = 5e-4  # what three decimals show
# Seeds whose values are listed, one by one.
_MOST_SEEDS = 12
_NUMBERS_WIDTH = 34  # an interval with what was expected, or four seeds
_MEASURED = "The number of a seed (eta_M is the highest learning rate of the run, eta_S the lowest):"
# Columns of the Markdown table: heading and key of the record.
_MARKDOWN = {
    "": "number",
    "claim": "statement",
    "where": "where",
    "expected": "expected",
    "mean [interval]": "estimate",
    "adjusted": "adjusted",
    "seeds": "spread",
    "verdict": "marked",
    "why": "why",
}


def read(directory: Path) -> Family:
    """Judges every claim by the results of a run directory: its analyses and, where there is one, its accuracy table.

    Raises:
        ValueError: the run has no analyses; a file is damaged or holds several runs.
    """
    recipe = yaml_file.recorded(directory)
    frames = [_analyses(directory)]
    if (table := Path(directory) / "results" / "evaluate.parquet").exists():
        frames.append(_as_analysis(results.read_results([table])))
    others = {lane.label for lane in recipe.tuned} - set(recipe.defences) if recipe else set()
    if recipe is not None:
        frames = [_told_of(frame, recipe, others) for frame in frames]
    every = [claim for name in (recipe.claims if recipe else claims.DEFAULT) for claim in claims.load(name)]
    rows = (row for frame in frames for row in frame.iter_rows(named=True))
    return judging.judge(evidence.gather(rows, others=others), every)


def text(directory: Path, *, form: Form = "table") -> str:
    """The claims of a run directory as a command prints them; raises what ``read`` does."""
    found = read(directory)
    if form in ("json", "csv"):
        rows = flat(found.judgements) if form == "csv" else _without(found.judgements, "seeds", "spread")
        return printed.records(rows, form)
    render = render_text if form == "table" else render_markdown
    return render(found, dead=dead_notes(dead_lanes.count_dead(_analyses(directory))))


def records(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """One flat record a claim, of numbers and plain text, for a report that lays them out itself.

    ``number`` counts from 1, ``values`` maps seeds to a number or None, ``mean``, ``low`` and ``high`` are None where
    withheld, p and ``margin`` where there is none, ``needed`` where it is decided or more than 1000 seeds would be;
    ``estimate``, ``adjusted``, ``seeds`` and, of many, their ``spread``, ``expected`` and ``marked``, the verdict with
    a star where ``holm`` is, are the same as text.
    """
    return [
        {name: getattr(judgement.claim, name) for name in ("name", "statement", "where", "statistic")}
        | {name: getattr(judgement.interval, name) for name in ("mean", "low", "high")}
        | {f"adjusted_{name}": getattr(judgement.adjusted, name) for name in ("low", "high")}
        | {name: getattr(judgement, name) for name in ("p", "p_equivalence", "p_flip", "holm", "needed")}
        | {
            "margin": None if judgement.claim.margin is None else judgement.claim.margin.value,
            "number": number,
            "expected": judgement.claim.side,
            "values": judgement.values,
            "estimate": _estimate(judgement.interval),
            "adjusted": _bounds(judgement.adjusted),
            "seeds": (each := ", ".join(f"{seed}: {shown(value)}" for seed, value in judgement.values.items())),
            "spread": _spread(judgement) or each,
            "verdict": judgement.verdict,
            "marked": judgement.verdict + "*" * judgement.holm,
            "why": judgement.why,
        }
        for number, judgement in enumerate(judgements, start=1)
    ]


def flat(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The same for a table without levels: seeds stand there as text alone, not also by themselves."""
    return _without(judgements, "values", "spread")


def _without(judgements: Sequence[Judgement], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in records(judgements)]


def _spread(judgement: Judgement) -> str:
    """Of many seeds how many there are, and their range; nothing of as many as can be listed."""
    if len(judgement.values) <= _MOST_SEEDS:
        return ""
    living = [value for value in judgement.values.values() if value is not None]
    return f"{len(living)} from {shown(min(living))} to {shown(max(living))}" if living else ""


def counted(judgements: Sequence[Judgement]) -> str:
    """How many claims came out which way, in a sentence."""
    counts = Counter(judgement.verdict for judgement in judgements)
    found = ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(judging.Verdict))
    return f"{len(judgements)} claims: {found}."


def summary(family: Family, judgements: Sequence[Judgement], *, dead: Sequence[str] = ()) -> list[str]:
    """Sentences that belong under some claims of a family: how many came out which way, how; then ``dead``."""
    sentences = [counted(judgements)]
    if seeds := sorted({seed for judgement in judgements for seed in judgement.values}):
        listed = f"Seeds, in this order: {', '.join(map(str, seeds))}; a dash is one without a finite value."
        many = f"Seeds: {len(seeds)}, of which the range is shown; every value is in `--format json`."
        sentences.append(listed if len(seeds) <= _MOST_SEEDS else many)
    return [*sentences, *(_rules(family, judgements) if family.tests else []), *dead]


def _rules(family: Family, judgements: Sequence[Judgement]) -> list[str]:
    """How verdicts and intervals came about, as far as there are such."""
    rate, adjusted = f"{100 * judging.ERROR_RATE:g} %", ""
    if family.level is not None:
        adjusted = f"; of what is decided, adjusted for having been selected, {100 * family.level:.4g} %"
    found = [
        "Verdicts: two-sided t tests over seeds, and pairs of one-sided ones within the margin (no effect), "
        f"{family.tests} tests, of whose decisions at most {rate} are wrong on average (Benjamini-Hochberg); a star: "
        f"by Holm's bound, too, with which any is wrong in at most {rate} of runs.",
        f"Intervals: Student t over seeds at 95 %{adjusted}.",
    ]
    if any(one.verdict == "undecided" and one.p is not None for one in judgements):
        found.append(
            "Seeds that would decide a claim do so with a chance of 90 %, were mean and deviation of these seeds the "
            "truth and the other claims as they are."
        )
    if any(one.p_flip is not None for one in judgements):
        found.append(
            "By signs: the p if every seed's difference from the null value might as well have the other sign."
        )
    margins = _margins(judgements)
    return [*found, f"Margins: {margins}."] if margins else found


def render_text(family: Family, *, dead: Sequence[str] = ()) -> str:
    """The claims for a terminal of 80 columns or more: plain ASCII, one row a claim, then how each is measured."""
    grid = Table(box=ASCII_BOX, show_edge=False, padding=(0, 1, 0, 0), show_lines=True)
    grid.add_column("", justify="right", no_wrap=True)
    grid.add_column("verdict", no_wrap=True)
    grid.add_column("claim", ratio=1)
    grid.add_column("mean [interval] (expected)\neach seed; why", width=_NUMBERS_WIDTH)
    rows, measured = records(family.judgements), Table.grid(padding=(0, 1, 0, 0))
    for row, judgement in zip(rows, family.judgements, strict=True):
        seeds = _spread(judgement) or " ".join(map(shown, judgement.values.values()))
        adjusted = row["adjusted"] and f"adjusted {row['adjusted']}"
        found = "\n".join(filter(None, [f"{row['estimate']} ({row['expected']})", adjusted, seeds, row["why"]]))
        grid.add_row(str(row["number"]), row["marked"], f"{row['statement']}\n{row['where']}", found)
        measured.add_row(str(row["number"]), row["statistic"])
    return plain_text(grid, "", *summary(family, family.judgements, dead=dead), "", _MEASURED, measured)


def render_markdown(family: Family, *, dead: Sequence[str] = ()) -> str:
    """The claims as a Markdown pipe table, followed by the summary and by how each is measured."""
    rows = records(family.judgements)
    cells = [[str(row[name]) for name in _MARKDOWN.values()] for row in rows]
    notes = [f"{row['number']}. {row['statistic']}" for row in rows]
    lines = ["", *summary(family, family.judgements, dead=dead), "", _MEASURED, "", *notes]
    return printed.pipe_table(list(_MARKDOWN), cells, numbers=[0]) + "\n".join(lines) + "\n"


def _analyses(directory: Path) -> pl.DataFrame:
    path = Path(directory) / "results" / "analyze.parquet"
    if not path.exists():
        raise ValueError(f"no analyses in {directory}: run `jaxsafety analyze` on it first")
    return results.read_results([path], schema=results.ANALYSIS_SCHEMA)


def _told_of(frame: pl.DataFrame, recipe: Recipe, others: Collection[str]) -> pl.DataFrame:
    """The rows of a study's defences, of the others, and of the model that they all begin with, under the name that
    claims have."""
    roots = {lane.root.name: lane.root.label for lane in recipe.lanes if lane.label in recipe.defences}
    own = frame.filter(pl.col("method").is_in([*recipe.defences, *others, *roots.values()]))
    # Of several first models none is what a claim compares with.
    name = {label: evidence.PRETRAINED for label in roots.values()} if len(roots) == 1 else {}
    return own.with_columns(pl.col("method").replace(name))


def _as_analysis(table: pl.DataFrame) -> pl.DataFrame:
    """Rows of the accuracy table with the columns of the analyses that are read."""
    absent = {"analysis": evidence.TABLE, "subset": "all", "part": "", "layer": None, "strength": None}
    return table.filter(stage="evaluate").with_columns(pl.lit(value).alias(name) for name, value in absent.items())


def _margins(judgements: Sequence[Judgement]) -> str:
    """Every margin once, with its reason and the numbers of the claims that have it."""
    found: dict[judging.Margin, list[int]] = {}
    for number, judgement in enumerate(judgements, start=1):
        if judgement.claim.margin is not None:
            found.setdefault(judgement.claim.margin, []).append(number)
    return "; ".join(
        f"{margin.value:g} ({margin.reason}) of {', '.join(map(str, numbers))}" for margin, numbers in found.items()
    )


def _estimate(interval: Interval) -> str:
    if interval.mean is None:
        return "-"
    return f"{shown(interval.mean)} {_bounds(interval)}".rstrip()


def _bounds(interval: Interval) -> str:
    _, low, high, _ = interval
    return "" if low is None or high is None else f"[{shown(low)}, {shown(high)}]"


def shown(value: float | None) -> str:
    """A statistic to three decimals, or one digit where these show none of it; a dash for None."""
    if value is None:
        return "-"
    return f"{value:+.3f}" if value == 0 or abs(value) >= _SMALLEST else f"{value:+.0e}"
