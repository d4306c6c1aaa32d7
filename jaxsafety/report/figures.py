"""Figures of the training and of the verdicts, as SVG strings: learning curves and stacked verdict bars."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from jaxsafety.report import dead_lanes, plot
from jaxsafety.report.plotting import VERDICT_COLOURS, Picture, model_styles, svg, with_dead
from jaxsafety.report.seed_tables import models_of, of_model, pick
from jaxsafety.report.tables import CONDITIONS, VERDICTS, Dead, Model, VerdictRow, model_label, model_order
from jaxsafety.rundir.results import check_schema

# Panels of the learning curves, from the top: what is drawn (condition, metric) and its title.
CURVES = {
    ("safe", "exact_match"): "Instruct: safe prompts answered exactly",
    ("unsafe", "refused"): "Null: unsafe prompts refused",
    ("train", "loss"): "training loss",
}
_MOST_POINTS = 100


def curves_of(conditions: Sequence[str]) -> dict[tuple[str, str], str]:
    """Returns the panels for a subject's conditions: ``CURVES``, or where it has none of them the same of its own."""
    if any(condition in conditions for condition, _ in CURVES):
        return CURVES
    own = zip(conditions, ("exact_match", "refused"), strict=False)
    return {curve: " ".join(curve) for curve in own} | {("train", "loss"): CURVES["train", "loss"]}


def learning_curves(frame: pl.DataFrame, *, stage: str, shown: Mapping[tuple[str, str], str] = CURVES) -> str:
    """Rates and loss against step for one training stage, as SVG: mean over living seeds in a band min to max.

    ``shown`` are the panels, by (condition, metric) their titles. One colour per method, solid for eta_M and dashed for
    eta_S. At most 100 steps are drawn, evenly thinned. The loss is left out where there are several methods and
    anything else: each has a loss of its own, and they do not compare. A seed that dies is left out from the first step
    on, and counted below.

    Raises:
        ValueError: the frame holds no learning curve of ``stage``.
    """
    check_schema(frame, "frame")
    of_stage = frame.filter(pl.col("stage") == stage)
    rows = dead_lanes.without_dead(of_stage).drop_nulls("value")
    there = set(rows.select("condition", "metric").unique().iter_rows())
    one_method = rows["method"].n_unique() == 1
    panels = [curve for curve in shown if curve in there and (one_method or curve[1] != "loss")]
    if not panels and ("train", "loss") in there & set(shown):
        panels = [("train", "loss")]
    if not panels:
        expected = ", ".join("/".join(curve) for curve in shown)
        raise ValueError(f"no learning curve for stage {stage!r}: expected rows of {expected}")
    curves = rows.group_by("condition", "metric", "method", "lr_name", "lr", "step").agg(
        pl.col("value").mean().alias("mean"), pl.col("value").min().alias("low"), pl.col("value").max().alias("high")
    )
    models = models_of(curves)
    # Hundreds of points a line: markers would hide it. Of an imported model there is one, and no line.
    single = curves["step"].n_unique() == 1
    styles = {model: style | ({} if single else {"marker": ""}) for model, style in model_styles(models).items()}

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (condition, metric) in zip(grid, panels, strict=True):
            panel = pick(curves, condition=condition, metric=metric)
            for model in models:
                _draw_curve(axes, of_model(panel, model).sort("step"), style=styles[model])
            axes.set_title(shown[condition, metric])
            axes.grid(visible=True, axis="y")
            axes.margins(x=0.01)
            if metric != "loss":
                axes.set_ylim(-0.02, 1.02)
        grid[-1].set_xlabel("step")
        grid[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(models) > 1:
            # Legends fill by column: one learning rate each.
            by_rate = sorted(models, key=lambda model: (model_order(model)[2:], model_order(model)))
            lines = [Line2D([], [], label=model_label(model), **styles[model]) for model in by_rate]
            figure.legend(handles=lines, loc="outside upper left", ncols=columns, handlelength=2.2)

    columns = plot.fitting(map(model_label, models), most=2)
    legend_height = 18 * -(-len(models) // columns) if len(models) > 1 else 0
    picture = Picture(draw, 40 + 150 * len(panels) + legend_height, f"learning curves: {stage}")
    return svg(with_dead(picture, dead_lanes.count_dead(of_stage)))


def verdict_bars(verdicts: Sequence[VerdictRow]) -> str:
    """Complied, refused and other as stacked bars for every model, one panel per condition, as SVG.

    Raises:
        ValueError: there are no verdicts.
    """
    if not verdicts:
        raise ValueError("no verdicts to draw: expected rows of verdict_table")
    models = list(dict.fromkeys(row.model for row in verdicts))
    conditions = list(dict.fromkeys(row.condition for row in verdicts))
    # A panel has the width of its title beside that of the models' names.
    columns = plot.fitting([*map(model_label, models)], most=2)
    rows = -(-len(conditions) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(conditions) :]:
            axes.set_axis_off()
        for axes, condition in zip(grid.flat, conditions, strict=False):
            _draw_bars(axes, models, [row for row in verdicts if row.condition == condition])
            axes.set_title(CONDITIONS.get(condition, condition))
        handles = grid[0, 0].get_legend_handles_labels()
        figure.supxlabel("per cent of prompts", fontsize=12)
        figure.legend(*handles, loc="outside upper left", ncols=3, handlelength=1, handleheight=1)

    picture = Picture(draw, 70 + rows * (34 + 17 * len(models)), "answers judged complied, refused or other")
    return svg(with_dead(picture, {row.model: Dead(row.dead, row.n + row.dead) for row in verdicts if row.dead}))


def _draw_curve(axes: Axes, curve: pl.DataFrame, *, style: Mapping[str, Any]) -> None:
    curve = plot.thinned(curve, most=_MOST_POINTS)
    axes.fill_between(curve["step"], curve["low"], curve["high"], color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(curve["step"], curve["mean"], **style)


def _draw_bars(axes: Axes, models: list[Model], rows: list[VerdictRow]) -> None:
    alive = [row for row in rows if row.n]
    places = [models.index(row.model) for row in alive]
    left = [0.0] * len(alive)
    for verdict in VERDICTS:
        widths = [getattr(row, verdict) for row in alive]
        axes.barh(places, widths, left=left, height=0.72, color=VERDICT_COLOURS[verdict], label=verdict)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row in rows:
        if not row.n:
            axes.text(0.02, models.index(row.model), "dead", va="center_baseline", fontsize=11)
    plot.dot_rows(axes, [model_label(model) for model in models])
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
