"""What an analysis draws with, the argument ``plot`` of its ``draw`` (:class:`jaxsafety.types.Section`).

Curves and dots with every seed, grids of panels, ticks and legends, how to pick rows, and the looks that all share.

Everything is drawn from rows of a seed table: every seed faint, the mean bold, the 95 % interval as a band or a bar.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from jaxsafety.claims.intervals import student_interval
from jaxsafety.report import plotting

# Some for the analyses alone.
from jaxsafety.report.plotting import (  # noqa: F401
    BROWN,
    CONDITION_STYLES,
    GREY,
    INK,
    PINK,
    VERDICT_COLOURS,
    Picture,
    condition_styles,
    model_styles,
)
from jaxsafety.report.seed_tables import conditions_of, features_of, models_of, of_model, pick  # noqa: F401
from jaxsafety.report.tables import Model, model_label
from jaxsafety.rundir.results import METHODS

MLP = ("gate", "up", "down")
ATTENTION = ("q", "k", "v", "o")
# Height of a row of panels; columns beside which there is place for a few words in a title.
ROW, WIDE = 84, 2
RANDOM = {"color": INK, "linestyle": (0, (1, 1.5))}
CHANCE = RANDOM | {"linewidth": 1.2}
PAIR_STYLES = ({"color": PINK, "marker": "o"}, {"color": BROWN, "marker": "s"}, {"color": GREY, "marker": "^"})
RATE_DASHES = ("solid", (0, (4, 2)), (0, (1.2, 1.2)))
SIDES = {name: CONDITION_STYLES[name] for name in ("safe", "unsafe")}
SIDE_KEYS = {f"{name} prompts": style for name, style in SIDES.items()}
# Of curves that are told apart by something else.
CURVES = tuple(CONDITION_STYLES.values())[:4]

_BAND_ALPHA, _SEED_ALPHA = 0.16, 0.4
_SEED_TICKS = {"linestyle": "none", "markersize": 6, "markeredgewidth": 0.7, "alpha": 0.6, "zorder": 2}
# Every point of a curve has a marker, or some of them where there are many.
_MOST_MARKERS, _FEW_MARKERS = 12, 5
_LEGEND_ROW = 18
# Matplotlib's, between a panel and its title, in points.
_TITLE_PAD = 6
# Of a legend's entry: a letter, and what stands before the first one, in units.
_LETTER, _HANDLE = 7, 40
_DODGE = 0.17
_SUMMARY = ("mean", "low", "high")


class NothingToDraw(ValueError):
    """A figure has no rows to show: its analysis has not been run, or every seed is dead."""


def needed(rows: pl.DataFrame, what: str) -> pl.DataFrame:
    """Returns the rows with a finite seed.

    Raises:
        NothingToDraw: there are none.
    """
    if (living := alive(rows)).is_empty():
        raise NothingToDraw(f"no finite rows of {what} to draw: run `jaxsafety analyze` on this run first")
    return living


def stacked(
    blocks: Sequence[tuple[Callable[[pl.DataFrame], Picture], pl.DataFrame]], *, what: str, name: str
) -> Picture:
    """Blocks (what makes a picture of rows, and its rows) one above the other, but for those without a finite row.

    Raises:
        NothingToDraw: no block of the analysis ``what`` has a finite row.
    """
    living = [(block, alive(rows)) for block, rows in blocks]
    needed(pl.concat([rows for _, rows in living], how="diagonal"), what)
    pictures = [block(rows) for block, rows in living if not rows.is_empty()]
    heights = [picture.height for picture in pictures]

    def draw(figure: FigureBase) -> None:
        parts = figure.subfigures(len(pictures), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, picture in zip(parts, pictures, strict=True):
            picture.draw(part)

    return Picture(draw, sum(heights), name)


def seed_values(rows: pl.DataFrame) -> np.ndarray:
    """Returns every seed's values, ``[s, rows]``, NaN where a seed has none."""
    return rows.select(pl.col("^seed_.*$").cast(pl.Float64).fill_null(float("nan"))).to_numpy().T


def draw_curve(axes: Axes, rows: pl.DataFrame, *, over: str, style: Mapping[str, Any], steps: bool = False) -> None:
    """Draws rows against their label ``over``; ``steps`` for a histogram."""
    rows = alive(rows).sort(over)
    if rows.is_empty():
        return
    draw_band(axes, rows[over].to_numpy(), rows, seeds=seed_values(rows), style=style, steps=steps)


def draw_curves(axes: Axes, rows: pl.DataFrame, *, over: str, **styles: Mapping[Any, Mapping[str, Any]]) -> None:
    """Draws a curve for every value of a label (or ``model``), given as ``label={value: style}``."""
    ((label, by_value),) = styles.items()
    for value, style in by_value.items():
        shown = of_model(rows, value) if label == "model" else pick(rows, **{label: value})
        draw_curve(axes, shown, over=over, style=style)


def draw_band(
    axes: Axes, x: np.ndarray, summary: pl.DataFrame, *, seeds: np.ndarray, style: Mapping[str, Any],
    steps: bool = False,
) -> None:  # fmt: skip
    """Draws mean, low and high of ``summary`` against ``x``, over ``seeds [s, points]``."""
    mean, low, high = (summary[name].cast(pl.Float64).fill_null(float("nan")).to_numpy() for name in _SUMMARY)
    colour, drawn = style["color"], "steps-mid" if steps else "default"
    if len(seeds) > 1:
        axes.fill_between(
            x, low, high, color=colour, alpha=_BAND_ALPHA, linewidth=0, step="mid" if steps else None, zorder=1
        )
        for values in seeds:
            axes.plot(x, values, color=colour, alpha=_SEED_ALPHA, linewidth=0.6, drawstyle=drawn, zorder=2)
    elif np.isfinite(low).any():
        axes.fill_between(x, low, high, color=colour, alpha=_BAND_ALPHA, linewidth=0, zorder=1)
    every = 1 if len(x) <= _MOST_MARKERS else math.ceil(len(x) / _FEW_MARKERS)
    marks = {"markersize": 3.6, "markevery": every} if "marker" in style else {}
    axes.plot(x, mean, drawstyle=drawn, zorder=3, **marks, **style)


def draw_surface(axes: Axes, x: np.ndarray, y: np.ndarray, shares: Float[np.ndarray, "y x"], *, colour: str) -> None:
    """Draws shares over a plane, from nothing to all of a colour, with a line where they are a half."""
    fading = LinearSegmentedColormap.from_list("share", [to_rgba(colour, 0), colour])
    axes.pcolormesh(x, y, shares, cmap=fading, vmin=0, vmax=1, shading="nearest", linewidth=0)
    if shares.min() < 0.5 < shares.max():
        axes.contour(x, y, shares, levels=[0.5], colors=INK, linewidths=0.9)
    axes.grid(visible=False)
    few_ticks(axes)


def draw_dot(axes: Axes, place: int | float, rows: pl.DataFrame, *, style: Mapping[str, Any]) -> None:
    """Draws the one row, if there is one, as a dot at height ``place`` with its interval as a bar."""
    for row in alive(rows).iter_rows(named=True):
        values = [value for name, value in row.items() if name.startswith("seed_") and value is not None]
        if len(values) > 1:
            axes.plot(values, [place] * len(values), marker="|", color=style["color"], **_SEED_TICKS)
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=style["color"], linewidth=1.1, zorder=3)
        axes.plot([row["mean"]], [place], **{"linestyle": "none", "markersize": 4.6, "zorder": 4} | dict(style))


def dodged(place: int, side: int) -> float:
    """The height of the first (0) or second (1) of two dots that share a row."""
    return place + (-_DODGE, _DODGE)[side]


def dot_rows(axes: Axes, labels: Sequence[str], *, edge: float = 0.6) -> None:
    """Names the rows of dots, the first on top; ``edge`` is the room around the outer ones."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 1 + edge, -edge)
    axes.tick_params(axis="y", length=0)


def draw_upright(axes: Axes, place: int | float, row: pl.DataFrame, *, colour: str) -> None:
    """Draws the seeds of one row as dots above ``place`` and its interval as an upright bar."""
    values = seed_values(row).ravel()
    if len(values) > 1:
        axes.plot(np.full(len(values), place), values, marker="_", color=colour, **_SEED_TICKS)
        axes.plot([place, place], [row["low"][0], row["high"][0]], color=colour, linewidth=1.1, zorder=3)


def hollow(style: Mapping[str, Any]) -> dict[str, Any]:
    """The style with a marker that is an outline."""
    return {**style, "markerfacecolor": "none", "markeredgewidth": 1.1}


def dot(style: Mapping[str, Any]) -> dict[str, Any]:
    """The style of a dot: no line."""
    return {**style, "linestyle": "none"}


def model_grid(
    figure: FigureBase, models: Sequence[Model], heads: Sequence[str], **shared: Any
) -> dict[tuple[Model, str], Axes]:
    """A row of panels per model, titled with its name, and a column per head: ``(model, head)`` to panel."""
    grid = figure.subplots(len(models), len(heads), squeeze=False, **{"sharex": "col"} | shared)
    for axes in grid.flat:
        axes.grid(visible=True, axis="y")
    for axes, model in zip(grid[:, 0], models, strict=True):
        _name_row(axes, model_label(model))
    for axes, text in zip(grid[0], heads, strict=True):
        head(axes, text)
    return dict(zip(itertools.product(models, heads), grid.flat, strict=True))


def _name_row(axes: Axes, text: str) -> None:
    """Titles the first panel of a row with what all of its width has room for: a title would make the panel wider."""
    axes.set_title(" ")
    where = {"xytext": (0, _TITLE_PAD), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(text, (0, 1), **where).set_in_layout(False)


def model_curves(
    rows: pl.DataFrame, columns: Mapping[str, Mapping[str, Any]],
    finish: Callable[[dict[tuple[Model, str], Axes]], None], *, over: str, name: str, x: str, y: str = "",
    keys: Mapping[str, Mapping[str, Any]] = SIDE_KEYS, key_columns: int = 2, models: Sequence[Model] = (),
    across: Mapping[str, float] | None = None, margin: int = 60, shared: Mapping[str, Any] | None = None,
    **styles: Mapping[Any, Mapping[str, Any]],
) -> Picture:  # fmt: skip
    """A row of panels per model, of ``rows`` if none is named, and a column per head, which has the labels of its rows.

    Curves are as of :func:`draw_curves`, over a thin line ``across`` for the heads that have one. Once all are drawn,
    ``finish`` sees to limits, scales and ticks of the panels, by (model, head). ``margin`` is the height beside panels
    and legend; ``shared`` is of :func:`model_grid`.
    """
    models = models or models_of(rows)

    def draw(figure: FigureBase) -> None:
        grid = model_grid(figure, models, list(columns), **shared or {})
        for (model, column), axes in grid.items():
            if across and column in across:
                reference(axes, across[column])
            draw_curves(axes, pick(of_model(rows, model), **columns[column]), over=over, **styles)
        finish(grid)
        axis_titles(figure, x=x, y=y)
        if keys:
            legend(figure, keys, columns=key_columns)

    entries = legend_height(keys, columns=key_columns) if keys else 0
    return Picture(draw, margin + ROW * len(models) + entries, name)


def layer_strip(
    figure: FigureBase, rows: pl.DataFrame, columns: Mapping[str, Mapping[str, Any]], *, y: str = "",
    across: Sequence[float] = (), sharey: bool = False, **styles: Mapping[Any, Mapping[str, Any]],
) -> list[Axes]:  # fmt: skip
    """A row of panels by title, which has the labels of its rows, curves over layers; as of :func:`draw_curves`."""
    grid = list(figure.subplots(1, len(columns), squeeze=False, sharey=sharey)[0])
    # Before the curves, so that the line counts for the limits.
    for axes, value in zip(grid, across, strict=False):
        reference(axes, value)
    for axes, (title, labels) in zip(grid, columns.items(), strict=True):
        draw_curves(axes, pick(rows, **labels), over="layer", **styles)
        axes.set_title(title)
        axes.grid(visible=True, axis="y")
    axis_titles(figure, x="layer", y=y)
    layer_ticks(grid)
    return grid


def head(axes: Axes, text: str) -> None:
    """Names a column of panels above the title of its first."""
    axes.annotate(text, (0, 1), xytext=(0, 24), xycoords="axes fraction", textcoords="offset points", weight="bold")


def flow_grid(figure: FigureBase, models: Sequence[Model], **shared: Any) -> dict[Model, Axes]:
    """A panel per model in two columns; the pretrained one has a row of its own: columns are learning rates."""
    slots = flow_slots(models)
    grid = figure.subplots(math.ceil(len(slots) / 2), 2, squeeze=False, **{"sharex": True, "sharey": True} | shared)
    panels = {}
    for axes, model in zip(grid.flat, [*slots, *[None] * (grid.size - len(slots))], strict=True):
        if model is None:
            axes.set_axis_off()
            continue
        axes.set_title(model_label(model))
        axes.grid(visible=True, axis="y")
        panels[model] = axes
    for axes in grid[-1]:
        axes.tick_params(labelbottom=True)
    return panels


def flow_slots(models: Sequence[Model]) -> list[Model | None]:
    """The panels of ``flow_grid``, row by row; None is left blank."""
    return [slot for model in models for slot in ((model, None) if model.method == "pretrained" else (model,))]


def legend(figure: FigureBase, styles: Mapping[str, Mapping[str, Any]], *, columns: int) -> None:
    """A legend above all panels, of styles by label, filled row by row, in fewer columns where labels are long."""
    columns = fitting(styles, most=columns)
    handles = [key(label, style) for label, style in styles.items()]
    by_column = [handle for column in range(columns) for handle in handles[column::columns]]
    figure.legend(handles=by_column, loc="outside upper left", ncols=columns, handlelength=2.4, columnspacing=1.4)


def legend_height(labels: Iterable[str], *, columns: int) -> int:
    """Units that a legend needs."""
    labels = list(labels)
    return _LEGEND_ROW * math.ceil(len(labels) / fitting(labels, most=columns)) + 4


def fitting(labels: Iterable[str], *, most: int) -> int:
    """Returns how many columns of a legend, or panels beside labels, the width has room for, at most so many."""
    longest = max(map(len, labels), default=0)
    return next((count for count in range(most, 1, -1) if count * (_LETTER * longest + _HANDLE) <= plotting.WIDTH), 1)


def key(label: str, style: Mapping[str, Any]) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **{"markersize": 4.6} | dict(style))


def axis_titles(figure: FigureBase, *, x: str, y: str = "") -> None:
    """One title for all horizontal and, where it is given, one for all vertical axes."""
    figure.supxlabel(x, fontsize=12)
    if y:
        figure.supylabel(y, fontsize=12)


def layer_ticks(panels: Iterable[Axes]) -> None:
    """Ticks at whole layers."""
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def blank(axes: Axes) -> None:
    """Makes a panel without data look empty; its title and its labels stay for the panels around it."""
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", left=False)
    if not axes.get_subplotspec().is_last_row():
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", which="both", bottom=False)


def few_ticks(axes: Axes) -> None:
    """Few ticks, for a panel a third of the width."""
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 5, 10], min_n_ticks=2))


def reference(axes: Axes, value: float) -> None:
    """A thin line across at ``value``: zero, or what chance gives."""
    axes.axhline(value, color=INK, linewidth=0.7, linestyle=(0, (1, 2)), zorder=0)


def log_range(axes: Axes, rows: pl.DataFrame) -> None:
    """A logarithmic vertical axis over the seeds' values: what of an interval lies beyond them, zero maybe, is cut."""
    values = seed_values(rows)
    values = values[values > 0]
    axes.set_yscale("log")
    if values.size:
        axes.set_ylim(values.min() / 1.25, values.max() * 1.25)


def log_ticks(axis: Axis, *, most: int) -> None:
    """Labelled round numbers over the range that a logarithmic axis shows, at most ``most``; call it after drawing."""
    low, high = sorted(axis.get_view_interval())
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    if len(ticks) < 2:
        # Too narrow a range for these digits: numbers as a linear axis has them.
        ticks = [tick for tick in MaxNLocator(most).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / most) or 1]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A number in few characters, such as 0.02, 3e-4 or 1e5."""
    if value and not 1e-3 <= abs(value) < 1e4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def together(*tables: pl.DataFrame) -> pl.DataFrame:
    """The rows of all tables."""
    return pl.concat(tables)


def alive(table: pl.DataFrame) -> pl.DataFrame:
    """The rows with a finite seed."""
    return table.filter(pl.col("n") > 0)


def rates_of(models: Sequence[Model]) -> list[str]:
    """The names of the models' learning rates, the largest rate first."""
    return list(dict.fromkeys(model.lr_name for model in sorted(models, key=lambda model: -model.lr)))


def fastest(models: Sequence[Model]) -> list[Model]:
    """Every method's model at its largest learning rate."""
    highest = {method: max(model.lr for model in models if model.method == method) for method, *_ in models}
    return [model for model in models if model.lr == highest[model.method]]


def model_keys(styles: Mapping[Model, Any]) -> dict[str, Any]:
    """Entries of a legend, one a model."""
    return {model_label(model): style for model, style in styles.items()}


def share_intervals(curves: Sequence[np.ndarray]) -> pl.DataFrame:
    """Mean, low and high at every point of the seeds' curves, which are shares: intervals end at 0 and 1."""
    summary = [student_interval(column).clipped()._asdict() for column in np.transpose(curves)]
    return pl.DataFrame(summary, schema_overrides={"low": pl.Float64, "high": pl.Float64})


def thinned(rows: pl.DataFrame, *, most: int) -> pl.DataFrame:
    """Evenly spaced rows, about so many, counted back from the last, which stays: it is the finished model."""
    return rows.reverse().gather_every(-(-rows.height // most) or 1).reverse()


def spaced(layers: Sequence[int], *, most: int) -> list[int]:
    """At most so many of the layers, evenly spaced, the first and the last among them."""
    chosen = np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int)
    return [layers[place] for place in chosen]


def pair_label(pair: str) -> str:
    """Two methods' names for people, of ``one~other``."""
    return " ~ ".join(METHODS.get(name, name) for name in pair.split("~"))


def pair_order(pair: str) -> tuple[list[int], str]:
    """What to sort pairs of methods by."""
    names = list(METHODS)
    return [names.index(name) if name in names else len(names) for name in pair.split("~")], pair
