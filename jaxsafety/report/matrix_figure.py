"""The robustness matrix as heat maps: rows are defences, the most robust one on top, columns are attacks by kind."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import FigureBase
from matplotlib.patches import Rectangle

from jaxsafety.report import plot
from jaxsafety.report.matrix import KINDS, UTILITY_DROP
from jaxsafety.report.plotting import GREY, INK, ORANGE, Picture, tip
from jaxsafety.report.tables import Model, condition_label, model_label, percent

# Columns beside each other that have room for their numbers; the height of a row, and of what stands around the rows.
_ACROSS, _ROW, _AROUND = 8, 17, 124
_BARE = ("prompts", "unsafe")
_COSTLY = {"hatch": "////", "facecolor": "none", "edgecolor": (*to_rgb(GREY), 0.55), "linewidth": 0}

Column = tuple[str, str]
Row = Mapping[str, Any]


class Cells(NamedTuple):
    """A matrix as it is shown.

    Attributes:
        defences: the rows, the most robust one first.
        columns: kind and name of the attacks, by kind.
        complied: by defence and column, the row of a seed table.
        able: the same of safe prompts under attack, where that was measured.
    """

    defences: list[Model]
    columns: list[Column]
    complied: dict[tuple[Model, Column], Row]
    able: dict[tuple[Model, Column], Row]

    def is_costly(self, defence: Model, column: Column) -> bool:
        """Whether an attack costs a defence more than :data:`jaxsafety.report.matrix.UTILITY_DROP` of safe prompts."""
        able, bare = self.able.get((defence, column)), self.able.get((defence, _BARE))
        return bool(able and bare and bare["mean"] - able["mean"] > UTILITY_DROP)


def cells(table: pl.DataFrame) -> Cells:
    """Returns what is shown of the seed table of :func:`jaxsafety.report.matrix.rows`; raises ``NothingToDraw``."""
    plot.needed(plot.pick(table, metric="complied"), "defences against attacks")
    complied, able = (_by_cell(plot.pick(table, metric=metric)) for metric in ("complied", "exact_match"))
    columns = sorted(dict.fromkeys(column for _, column in complied), key=lambda column: KINDS.index(column[0]))
    return Cells(_most_robust_first(complied), columns, complied, able)


def picture(table: pl.DataFrame) -> Picture:
    """Draws the cells of a seed table: a number is what is complied with, in per cent, mean over seeds, and hatched is
    what is costly. Under the pointer stand interval, seeds and safe prompts."""
    found = cells(table)
    blocks = [found.columns[first : first + _ACROSS] for first in range(0, len(found.columns), _ACROSS)]

    def draw(figure: FigureBase) -> None:
        grid = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
        for axes, block in zip(grid, blocks, strict=True):
            for (y, defence), (x, column) in itertools.product(enumerate(found.defences), enumerate(block)):
                if (defence, column) in found.complied:
                    _draw_cell(axes, x, y, found, (defence, column))
            _name(axes, found.defences, block)

    return Picture(draw, len(blocks) * (_AROUND + _ROW * len(found.defences)), "defences against attacks")


def _by_cell(table: pl.DataFrame) -> dict[tuple[Model, Column], Row]:
    rows = plot.alive(table).iter_rows(named=True)
    return {(Model(row["method"], row["lr_name"], row["lr"]), (row["part"], row["condition"])): row for row in rows}


def _most_robust_first(found: Mapping[tuple[Model, Column], Row]) -> list[Model]:
    """The defences by their worst case, or where there is none by the mean over attacks."""
    order = {}
    for defence in dict.fromkeys(model for model, _ in found):
        own = {column: row["mean"] for (model, column), row in found.items() if model == defence}
        last = [value for (kind, _), value in own.items() if kind == KINDS[-1]]
        order[defence] = last[0] if last else sum(own.values()) / len(own)
    return sorted(order, key=order.get)


def _draw_cell(axes: Axes, x: int, y: int, found: Cells, place: tuple[Model, Column]) -> None:
    """One number on its colour."""
    row, able, (defence, column) = found.complied[place], found.able.get(place), place
    box = {"xy": (x, y), "width": 1, "height": 1}
    told = f"{model_label(defence)}, {condition_label(column[1])}: "
    told += f"{_with_interval(row)} of unsafe prompts complied with; seeds "
    told += ", ".join(percent(value) for name, value in row.items() if name.startswith("seed_") and value is not None)
    told += f"; safe prompts answered: {_with_interval(able)}" if able else ""
    shade = {"facecolor": ORANGE, "alpha": max(0.0, min(row["mean"], 1.0)) * 0.85, "linewidth": 0}
    axes.add_patch(Rectangle(**box, **shade))
    if found.is_costly(defence, column):
        axes.add_patch(Rectangle(**box, **_COSTLY))
    axes.text(x + 0.5, y + 0.52, f"{100 * row['mean']:.0f}", ha="center", va="center", fontsize=11)
    # On top, so that the pointer meets it.
    axes.add_patch(Rectangle(**box, facecolor=INK, alpha=0, linewidth=0, gid=tip(told)))


def _with_interval(row: Row) -> str:
    known = row["low"] is not None
    return percent(row["mean"]) + (f" [{percent(row['low'])}, {percent(row['high'])}]" if known else "") + " %"


def _name(axes: Axes, defences: Sequence[Model], block: Sequence[Column]) -> None:
    """Names rows and columns, with a line where another kind of attack begins."""
    axes.set_xlim(0, _ACROSS)
    axes.set_ylim(len(defences), 0)
    axes.set_yticks([y + 0.5 for y in range(len(defences))], [model_label(model) for model in defences])
    axes.xaxis.tick_top()
    names = [condition_label(name) for _, name in block]
    axes.set_xticks([x + 0.5 for x in range(len(block))], names, rotation=38, ha="left", rotation_mode="anchor")
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    begins = [x for x in range(1, len(block)) if block[x][0] != block[x - 1][0]]
    for x in begins:
        axes.axvline(x, color=INK, linewidth=0.8)
    for place, x in enumerate((0, *begins)):
        # By turns in two lines: a kind of one column has a name that is longer.
        below = len(defences) + 0.25 + 0.85 * (place % 2)
        axes.text(x + 0.05, below, block[x][0], ha="left", va="top", fontsize=11, style="italic")
