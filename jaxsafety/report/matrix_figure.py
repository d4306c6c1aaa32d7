"""The robustness matrix as heat maps: rows are defences, the most robust one on top, columns are attacks by kind."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

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


def picture(table: pl.DataFrame) -> Picture:
    """Draws the seed table of the rows of :func:`jaxsafety.report.matrix.rows`; raises ``NothingToDraw``.

    A number is what is complied with, in per cent, mean over seeds; hatched is what costs the defence more than
    :data:`jaxsafety.report.matrix.UTILITY_DROP` of its safe prompts. Under the pointer stand interval, seeds and safe
    prompts.
    """
    plot.needed(plot.pick(table, metric="complied"), "defences against attacks")
    cells, able = (_cells(plot.pick(table, metric=metric)) for metric in ("complied", "exact_match"))
    defences = _most_robust_first(cells)
    columns = sorted(dict.fromkeys(column for _, column in cells), key=lambda column: KINDS.index(column[0]))
    blocks = [columns[first : first + _ACROSS] for first in range(0, len(columns), _ACROSS)]

    def draw(figure: FigureBase) -> None:
        grid = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
        for axes, block in zip(grid, blocks, strict=True):
            for (y, defence), (x, column) in itertools.product(enumerate(defences), enumerate(block)):
                if row := cells.get((defence, column)):
                    _draw_cell(axes, x, y, row, able.get((defence, column)), able.get((defence, _BARE)))
            _name(axes, defences, block)

    return Picture(draw, len(blocks) * (_AROUND + _ROW * len(defences)), "defences against attacks")


def _cells(table: pl.DataFrame) -> dict[tuple[Model, Column], Row]:
    rows = plot.alive(table).iter_rows(named=True)
    return {(Model(row["method"], row["lr_name"], row["lr"]), (row["part"], row["condition"])): row for row in rows}


def _most_robust_first(cells: Mapping[tuple[Model, Column], Row]) -> list[Model]:
    """The defences by their worst case, or where there is none by the mean over attacks."""
    order = {}
    for defence in dict.fromkeys(model for model, _ in cells):
        own = {column: row["mean"] for (model, column), row in cells.items() if model == defence}
        last = [value for (kind, _), value in own.items() if kind == KINDS[-1]]
        order[defence] = last[0] if last else sum(own.values()) / len(own)
    return sorted(order, key=order.get)


def _draw_cell(axes: Axes, x: int, y: int, row: Row, able: Row | None, bare: Row | None) -> None:
    """One number on its colour; ``able`` is the row of safe prompts under attack, ``bare`` without one."""
    box = {"xy": (x, y), "width": 1, "height": 1}
    told = f"{model_label(Model(row['method'], row['lr_name'], row['lr']))}, {condition_label(row['condition'])}: "
    told += f"{_with_interval(row)} of unsafe prompts complied with; seeds "
    told += ", ".join(percent(value) for name, value in row.items() if name.startswith("seed_") and value is not None)
    told += f"; safe prompts answered: {_with_interval(able)}" if able else ""
    shade = {"facecolor": ORANGE, "alpha": max(0.0, min(row["mean"], 1.0)) * 0.85, "linewidth": 0}
    axes.add_patch(Rectangle(**box, **shade))
    if able and bare and bare["mean"] - able["mean"] > UTILITY_DROP:
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
