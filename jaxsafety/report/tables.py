"""The study table and the verdict table, drawn from tidy result rows and rendered for terminal and README.

Rates stay in [0, 1] in records and become per cent only where a table is rendered. A seed whose value is null (not
finite) is *dead*: it is left out of the mean and counted.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl
from rich.box import Box
from rich.console import Console, RenderableType
from rich.table import Table

from jaxsafety.claims.evidence import Model
from jaxsafety.claims.intervals import RATE_TOLERANCE, Interval, mean_interval
from jaxsafety.rundir import printed
from jaxsafety.rundir.printed import Form
from jaxsafety.rundir.results import METHODS, check_schema

CONDITIONS = {
    "safe": "Safe",
    "unsafe": "Unsafe",
    "jb_co_task": "JB-CO-Task",
    "jb_co_text": "JB-CO-Text",
    "jb_misgen": "JB-MisGen",
    "ood": "OOD-text",
}
VERDICTS = ("complied", "refused", "other")

ASCII_BOX = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_LR_NAMES = ("", "eta_M", "eta_S")


class Column(NamedTuple):
    """Where one column of the study table takes its values from."""

    condition: str
    metric: str


COLUMNS = {
    "Instruct": Column("safe", "exact_match"),
    "Null": Column("unsafe", "refused"),
    "Over-refusal": Column("safe", "refused"),
    "JB-CO-Task": Column("jb_co_task", "complied"),
    "JB-CO-Text": Column("jb_co_text", "complied"),
    "JB-MisGen": Column("jb_misgen", "complied"),
    "OOD-text": Column("ood", "complied"),
}
_COLUMN_NOTE = (
    "Instruct: safe prompts answered exactly. Null: unsafe prompts refused. Over-refusal: safe prompts refused. "
    "JB-CO-Task, JB-CO-Text, JB-MisGen: jailbreaks complied with. OOD-text: unsafe prompts on held-out text complied "
    "with."
)


@dataclass(frozen=True)
class Cell:
    """One quantity of one model: every seed's value (None when dead), their mean and interval, the count of dead.

    The interval is over seeds, or over prompts where rows bring that of a single model along.
    """

    values: dict[int, float | None]
    interval: Interval
    dead: int


class Dead(NamedTuple):
    """How many of a model's seeds are dead: their loss was not finite, and nothing of them is a result."""

    dead: int
    seeds: int


@dataclass(frozen=True)
class StudyRow:
    """One model's cells by column name; None where nothing was measured."""

    model: Model
    cells: dict[str, Cell | None]


@dataclass(frozen=True)
class VerdictRow:
    """How one model answered one condition: mean rates over the finite seeds, None when every seed is dead."""

    model: Model
    condition: str
    complied: float | None
    refused: float | None
    other: float | None
    n: int
    dead: int


def columns_of(conditions: Sequence[str]) -> dict[str, Column]:
    """Returns the columns for a subject's conditions: those of ``COLUMNS``, or where it has none the same of its own.

    That is: the first answered exactly, the second refused, the first refused, and the others complied with.
    """
    if known := {name: column for name, column in COLUMNS.items() if column.condition in conditions}:
        return known
    first, second, others = conditions[:1], conditions[1:2], conditions[2:]
    shown = ((first, "exact_match"), (second, "refused"), (first, "refused"), (others, "complied"))
    columns = [Column(condition, metric) for group, metric in shown for condition in group]
    return {f"{column.condition} {column.metric}": column for column in columns}


def refused_columns(frame: pl.DataFrame) -> dict[str, Column]:
    """Returns the columns where prompts' own labels say the conditions: of each, how often it is refused."""
    conditions = sorted(set(frame.filter(metric="refused")["condition"]), key=_condition_order)
    return {f"{condition} refused": Column(condition, "refused") for condition in conditions}


def study_table(frame: pl.DataFrame, columns: Mapping[str, Column] = COLUMNS) -> list[StudyRow]:
    """The study's main table: one row per model, ``columns`` across, from the last evaluated step of each seed.

    Rows are the pretrained model, then method by learning rate (sft, dpo, unlearn; eta_M, eta_S).

    Raises:
        ValueError: two values for one seed of one cell (results of several runs), or a rate outside [0, 1].
    """
    return [
        StudyRow(model, {name: cells.get((column.condition, column.metric)) for name, column in columns.items()})
        for model, cells in _cells(frame).items()
    ]


def column_names(table: Sequence[StudyRow]) -> list[str]:
    """The columns of a study table, from the left; all of ``COLUMNS`` where it has no rows."""
    return list(table[0].cells if table else COLUMNS)


def verdict_table(frame: pl.DataFrame) -> list[VerdictRow]:
    """How every model answered every condition: mean rates complied, refused, other, which sum to 1.

    Where results tell the first two alone, other is what is left. Conditions without verdicts are left out; rows run
    over models, then conditions, in the order of the study table.

    Raises:
        ValueError: as ``study_table``, or the three rates of a condition do not sum to 1.
    """
    rows = []
    for model, cells in _cells(frame).items():
        for condition in sorted({name for name, metric in cells if metric in VERDICTS}, key=_condition_order):
            found = [cells.get((condition, verdict)) for verdict in VERDICTS]
            means = [cell.interval.mean if cell else None for cell in found]
            alive = len(found[0].values) - found[0].dead if found[0] else 0
            if found[-1] is None and None not in found[:-1]:
                found[-1] = found[0]
                means[-1] = max(0.0, 1 - means[0] - means[1]) if alive else None
            total = math.fsum(mean or 0.0 for mean in means)
            if None in found or (alive and abs(total - 1) > RATE_TOLERANCE):
                raise ValueError(
                    f"verdicts of {model_label(model)} on {condition} sum to {total:g}: "
                    "expected complied + refused + other = 1"
                )
            rows.append(VerdictRow(model, condition, *means, alive, found[0].dead))
    return rows


def render_text(table: Sequence[StudyRow]) -> str:
    """The study table for a terminal of 80 columns or more: plain ASCII, means above their intervals, per cent."""
    # Two-line cells hold eight columns in 80 characters; ASCII because the output may be piped anywhere.
    grid = Table(box=ASCII_BOX, show_edge=False, padding=0)
    grid.add_column("model", min_width=10, overflow="fold")
    for name in column_names(table):
        grid.add_column(_two_lines(name), justify="right", no_wrap=True)
    for row in table:
        cells = (_cell_text(cell, "\n{}-{}") for cell in row.cells.values())
        grid.add_row(f"{method_label(row.model)}\n{lr_label(row.model)}", *cells, end_section=True)
    return plain_text(grid, "", *table_notes(table))


def plain_text(*parts: RenderableType) -> str:
    """Tables and sentences one below the other, as plain text of 80 columns."""
    output = io.StringIO()
    console = Console(
        file=output, width=80, color_system=None, force_terminal=False, force_jupyter=False, markup=False,
        highlight=False,
    )  # fmt: skip
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def render_markdown(table: Sequence[StudyRow]) -> str:
    """The study table as a Markdown pipe table, followed by its notes as a list; per cent."""
    cells = [[model_label(row.model), *map(cell_text, row.cells.values())] for row in table]
    notes = [f"- {note}".replace("*", "\\*") for note in table_notes(table)]
    names = column_names(table)
    shown = printed.pipe_table(["model", *names], cells, numbers=range(1, len(names) + 1))
    return shown + "\n".join(["", *notes]) + "\n"


def render(table: Sequence[StudyRow], form: Form) -> str:
    """The study table as a command prints it; for programs as :func:`records`."""
    if form in ("table", "markdown"):
        return render_text(table) if form == "table" else render_markdown(table)
    return printed.records(records(table), form)


def records(table: Sequence[StudyRow]) -> list[dict[str, Any]]:
    """One flat record a model: of every column its mean, a share in [0, 1], the interval, and the number of seeds."""
    rows = []
    for row in table:
        found: dict[str, Any] = row.model._asdict()
        for name, cell in row.cells.items():
            numbers = cell.interval if cell else (None, None, None, None)
            found |= {name: numbers[0], f"{name} low": numbers[1], f"{name} high": numbers[2], f"{name} n": numbers[3]}
        rows.append(found)
    return rows


def cell_text(cell: Cell | None) -> str:
    """A cell on one line: per cent, and the interval behind it."""
    return _cell_text(cell, " [{}, {}]")


def table_notes(table: Sequence[StudyRow]) -> list[str]:
    """Sentences that belong under a study table: its unit and interval, its columns, its dead seeds."""
    cells = [cell for row in table for cell in row.cells.values() if cell]
    counts = {len(cell.values) for cell in cells}
    seeds = f"{max(counts)} seed{'s' * (max(counts) > 1)}" if counts else "no seeds"
    of_prompts = [cell.interval.n > len(cell.values) for cell in cells]
    notes = [f"Per cent of prompts: mean over {seeds} and 95 % Student-t interval, clipped to 0-100."]
    if any(of_prompts):
        notes = [] if all(of_prompts) else notes
        notes.append("Per cent of prompts: one model for all seeds, and the exact 95 % interval over its prompts.")
    # Others say themselves what they are.
    notes += [_COLUMN_NOTE] if set(column_names(table)) <= set(COLUMNS) else []
    return notes + [f"* {note}" for note in dead_notes(dead_in_table(table))]


def dead_in_table(table: Sequence[StudyRow]) -> dict[Model, Dead]:
    """The models of a study table that have dead seeds."""
    found = {row.model: [cell for cell in row.cells.values() if cell and cell.dead] for row in table}
    worst = {model: max(cells, key=lambda cell: cell.dead) for model, cells in found.items() if cells}
    return {model: Dead(cell.dead, len(cell.values)) for model, cell in worst.items()}


def dead_notes(dead: Mapping[Model, Dead]) -> list[str]:
    """The sentences that every table and figure marks dead seeds with; models with as many of them share one."""
    alike: dict[Dead, list[str]] = {}
    for model, count in dead.items():
        alike.setdefault(count, []).append(model_label(model))
    return [f"{', '.join(models)}: {_dead_text(count)}." for count, models in alike.items()]


def _dead_text(count: Dead) -> str:
    found = f"{count.dead} of {count.seeds} seed{'s' * (count.seeds > 1)} dead (not finite)"
    return f"{found}, left out of the mean" if count.dead < count.seeds else f"{found}: no result"


def model_label(model: Model) -> str:
    """Name of a model for people, such as ``DPO eta_M 1e-3``."""
    return f"{method_label(model)} {lr_label(model)}".rstrip()


def model_order(model: Model) -> tuple[int, str, int, float, str]:
    """Sort key of models: pretrained, sft, dpo, unlearn, others by name; eta_M before eta_S, others by their rate."""
    known = _index(tuple(METHODS), model.method), model.method
    return *known, _index(_LR_NAMES, model.lr_name), -model.lr, model.lr_name


def method_label(model: Model) -> str:
    """Name of a model's method for people."""
    return METHODS.get(model.method, model.method)


def condition_label(condition: str) -> str:
    """Name of a condition for people; of a jailbreak of real models its kind."""
    return CONDITIONS.get(condition, condition.removeprefix("jailbreak:"))


def lr_label(model: Model) -> str:
    """Name and value of a model's learning rate, such as ``eta_M 1e-3``; empty where none is known."""
    # Every other model is compared with the pretrained one, whatever its rate; several have names.
    if model.method == "pretrained" or not model.lr or "lr=" in model.lr_name:
        return model.lr_name
    mantissa, exponent = f"{model.lr:.3e}".split("e")
    return f"{model.lr_name} {float(mantissa):g}e{int(exponent)}".lstrip()


def percent(rate: float | None) -> str:
    """A rate as per cent with one decimal (``100`` without), or a dash."""
    return "-" if rate is None else f"{100 * rate:.1f}".replace("100.0", "100")


def _cell_text(cell: Cell | None, interval: str) -> str:
    if cell is None:
        return "-"
    mean, low, high, n = cell.interval
    text = (percent(mean) if n else "dead") + "*" * (cell.dead > 0)
    return text if low is None else text + interval.format(percent(low), percent(high))


def _two_lines(name: str) -> str:
    if " " in name:
        return "\n".join(name.rsplit(" ", 1))
    head, dash, tail = name.rpartition("-")
    return f"{head}{dash}\n{tail}" if dash else name


def _cells(frame: pl.DataFrame) -> dict[Model, dict[tuple[str, str], Cell]]:
    """Cells by (condition, metric) of every evaluated model, models in table order."""
    check_schema(frame, "frame")
    lane = ["method", "lr_name", "lr", "seed"]
    rows = frame.filter(pl.col("stage") == "evaluate").filter(pl.col("step") == pl.col("step").max().over(lane))
    values: dict[Model, dict[tuple[str, str], dict[int, float | None]]] = {}
    for *model, seed, condition, metric, value in rows.select(*lane, "condition", "metric", "value").iter_rows():
        seeds = values.setdefault(Model(*model), {}).setdefault((condition, metric), {})
        if seed in seeds:
            raise ValueError(
                f"two values of {condition}/{metric} for {model_label(Model(*model))} seed {seed}: "
                "expected one; filter the frame to one run first"
            )
        seeds[seed] = value
    rated = (*VERDICTS, *(column.metric for column in COLUMNS.values()))
    return {
        model: {
            key: _cell(seeds, _given(values[model], *key)) for key, seeds in values[model].items() if key[1] in rated
        }
        for model in sorted(values, key=model_order)
    }


def _cell(seeds: dict[int, float | None], given: Interval | None) -> Cell:
    interval = mean_interval(seeds.values())
    return Cell(dict(sorted(seeds.items())), given or interval, len(seeds) - interval.n)


def _given(values: Mapping[tuple[str, str], dict[int, float | None]], condition: str, metric: str) -> Interval | None:
    """The interval over prompts that rows bring along, of a model that is one for all seeds: its values are alike."""
    bounds = [values.get((condition, metric + end)) for end in ("", "_low", "_high", "_n")]
    if None in bounds or any(len({*seeds.values()}) > 1 for seeds in values.values()):
        return None
    mean, low, high, n = (next(iter(seeds.values())) for seeds in bounds)
    return Interval(mean, low, high, int(n))


def _condition_order(condition: str) -> tuple[int, str]:
    return _index(tuple(CONDITIONS), condition), condition


def _index(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else len(names)
