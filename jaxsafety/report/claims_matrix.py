"""Claims across runs: what each run decides, and whether all of them put the statistic where the claim has it."""

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

_FIELDS = ("verdict", "holm", "mean", "low", "high", "seeds")
_NAME_WIDTH, _RUNS_WIDTH = 16, 39


def text(directories: Sequence[Path], *, form: Form = "table") -> str:
    """Returns claim by run as a command prints it.

    Raises:
        ValueError: a run twice; and what :func:`claims_table.read` refuses.
    """
    places = [one.resolve() for one in directories]
    if twice := next((one for one, place in zip(directories, places, strict=True) if places.count(place) > 1), None):
        raise ValueError(f"claims of several runs: got {twice} twice, expected each once")
    names = [place.name for place in places]
    # Directories of one name are told apart by their paths.
    called = [name if names.count(name) == 1 else str(one) for name, one in zip(names, directories, strict=True)]
    found = {name: claims_table.read(one) for name, one in zip(called, directories, strict=True)}
    rows = records(found)
    if form in ("json", "csv"):
        return printed.records(rows, form)
    if form == "markdown":
        cells = [
            [str(row["number"]), row["statement"], row["expected"], *(" ".join(_cell(row, run)) for run in found),
             row["agreement"]]
            for row in rows
        ]  # fmt: skip
        head = ["", "claim", "expected", *found, "agreement"]
        return printed.pipe_table(head, cells, numbers=[0]) + f"\n{summary(rows)}\n"
    look = {"box": ASCII_BOX, "show_edge": False, "padding": (0, 1, 0, 0), "show_lines": True}
    grid = Table("", "claim", "runs", "agreement", **look)
    grid.columns[1].ratio, grid.columns[2].width = 1, _RUNS_WIDTH
    for row in rows:
        lines = [f"{_short(run):{_NAME_WIDTH}} {' '.join(_cell(row, run)):>22}" for run in found]
        grid.add_row(str(row["number"]), f"{row['statement']} ({row['expected']})", "\n".join(lines), row["agreement"])
    return plain_text(grid, "", summary(rows))


def records(found: Mapping[str, Family]) -> list[dict[str, Any]]:
    """Returns a flat record a claim: what every run, by its name, says of it, None where it doesn't.

    ``RUN.low`` and ``RUN.high`` are of the 95 % interval, ``RUN.seeds`` how many have a value. ``agreement`` is of the
    means of all runs that have one and don't say that there is no effect: ``as claimed`` where all lie on the side that
    is expected, ``against it`` where all lie on the other, ``mixed``, or nothing of fewer than two.
    """
    claims: dict[str, Claim] = {}
    for family in found.values():
        claims |= {one.claim.name: one.claim for one in family.judgements if one.claim.name not in claims}
    by_run = {run: {one.claim.name: one for one in family.judgements} for run, family in found.items()}
    return [
        {"number": place, "name": name, "statement": claim.statement, "where": claim.where}
        | {"expected": claim.side}
        | {f"{run}.{field}": value for run, own in by_run.items() for field, value in _told(own.get(name)).items()}
        | {"agreement": _agreement(claim, [own[name] for own in by_run.values() if name in own])}
        for place, (name, claim) in enumerate(claims.items(), start=1)
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns in a sentence how many claims the runs agree on."""
    found = [row["agreement"] for row in rows if row["agreement"]]
    as_claimed, against, mixed = map(found.count, ("as claimed", "against it", "mixed"))
    return (
        f"Of {len(found)} claims with a number in several runs {as_claimed} lie as claimed in all of them, {against} "
        f"against it, {mixed} are mixed; a run that finds no effect is left out."
    )


def _told(judgement: Judgement | None) -> dict[str, Any]:
    if judgement is None:
        return dict.fromkeys(_FIELDS)
    mean, low, high, n = judgement.interval
    return dict(zip(_FIELDS, (judgement.verdict, judgement.holm, mean, low, high, n), strict=True))


def _agreement(claim: Claim, judgements: Sequence[Judgement]) -> str:
    told = [one.interval.mean for one in judgements if one.interval.mean is not None and one.verdict != "no effect"]
    if len(told) < 2:
        return ""
    sides = {mean > claim.null if claim.expected == "above" else mean < claim.null for mean in told}
    if len(sides) > 1 or claim.null in told:
        return "mixed"
    return "as claimed" if sides.pop() else "against it"


def _cell(row: Mapping[str, Any], run: str) -> tuple[str, ...]:
    mean = row[f"{run}.mean"]
    return ("-",) if mean is None else (row[f"{run}.verdict"] + "*" * row[f"{run}.holm"], shown(mean))


def _short(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else f"..{name[2 - _NAME_WIDTH :]}"
