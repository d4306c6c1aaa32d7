"""Claims across runs: what each run decides, and whether all of them put the statistic on the same side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxsafety.claims.judging import Claim, Family, Judgement
from jaxsafety.report import claims_table
from jaxsafety.report.claims_table import shown
from jaxsafety.report.tables import ASCII_BOX, plain_text
from jaxsafety.rundir import printed
from jaxsafety.rundir.printed import Form

_FIELDS = ("verdict", "mean", "low", "high", "seeds")


def text(directories: Sequence[Path], *, form: Form = "table") -> str:
    """Returns claim by run as a command prints it; raises what :func:`claims_table.read` does."""
    if twice := next((one for one in directories if directories.count(one) > 1), None):
        raise ValueError(f"claims of several runs: got {twice} twice, expected each once")
    names = [one.resolve().name for one in directories]
    # Directories of one name are told apart by their paths.
    called = [name if names.count(name) == 1 else str(one) for name, one in zip(names, directories, strict=True)]
    found = {name: claims_table.read(one) for name, one in zip(called, directories, strict=True)}
    rows = records(found)
    if form in ("json", "csv"):
        return printed.records(rows, form)
    head, join = ["", "claim", *found, "side"], "\n" if form == "table" else " "
    cells = [
        [str(row["number"]), row["statement"], *(join.join(_cell(row, run)) for run in found), row["side"]]
        for row in rows
    ]
    if form == "markdown":
        return printed.pipe_table(head, cells, numbers=[0]) + f"\n{summary(rows, list(found))}\n"
    grid = Table(*head, box=ASCII_BOX, show_edge=False, padding=(0, 1, 0, 0), show_lines=True)
    grid.columns[1].ratio = 1
    for row in cells:
        grid.add_row(*row)
    return plain_text(grid, "", summary(rows, list(found)))


def records(found: Mapping[str, Family]) -> list[dict[str, Any]]:
    """Returns a flat record a claim: what every run, by its name, says of it, None where it doesn't.

    ``RUN.verdict`` has a star where Holm's bound decides it, ``RUN.low`` and ``RUN.high`` are of the 95 % interval,
    ``RUN.seeds`` how many have a value. ``side`` is that of the null value on which the means of all runs lie that have
    one: ``above``, ``below``, ``mixed``, or nothing of fewer than two.
    """
    claims: dict[str, Claim] = {}
    for family in found.values():
        claims |= {one.claim.name: one.claim for one in family.judgements if one.claim.name not in claims}
    by_run = {run: {one.claim.name: one for one in family.judgements} for run, family in found.items()}
    return [
        {"number": place, "name": name, "statement": claim.statement, "where": claim.where}
        | {f"{run}.{field}": value for run, own in by_run.items() for field, value in _told(own.get(name)).items()}
        | {"side": _side(claim, [own[name] for own in by_run.values() if name in own])}
        for place, (name, claim) in enumerate(claims.items(), start=1)
    ]


def summary(rows: Sequence[Mapping[str, Any]], runs: Sequence[str]) -> str:
    """Returns the agreement of the runs in a sentence."""
    several = [row for row in rows if row["side"]]
    same = [row for row in several if row["side"] != "mixed"]
    decided = [sum(_is_sided(row[f"{run}.verdict"]) for run in runs) for row in same]
    return (
        f"{len(several)} claims have a number in several runs: {len(same)} lie on one side in all of them, "
        f"{sum(count > 1 for count in decided)} of which two runs or more decide, and {len(several) - len(same)} on "
        "different sides."
    )


def _is_sided(verdict: str | None) -> bool:
    return verdict is not None and verdict.rstrip("*") in ("supported", "contradicted")


def _told(judgement: Judgement | None) -> dict[str, Any]:
    if judgement is None:
        return dict.fromkeys(_FIELDS)
    mean, low, high, n = judgement.interval
    return dict(zip(_FIELDS, (judgement.verdict + "*" * judgement.holm, mean, low, high, n), strict=True))


def _side(claim: Claim, judgements: Sequence[Judgement]) -> str:
    means = [one.interval.mean for one in judgements if one.interval.mean is not None]
    sides = {"above" if mean > claim.null else "below" if mean < claim.null else "at it" for mean in means}
    if len(means) < 2:
        return ""
    return sides.pop() if len(sides) == 1 else "mixed"


def _cell(row: Mapping[str, Any], run: str) -> tuple[str, ...]:
    mean = row[f"{run}.mean"]
    return ("-",) if mean is None else (row[f"{run}.verdict"], shown(mean))
