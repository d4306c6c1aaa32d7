"""What safety fine-tuning does to activations, weights and sensitivity: Figures 3 to 6 of the paper.

Each takes a seed table (``jaxsafety.report.seed_tables``) and returns a picture. What a table lacks, a panel, a curve
or a point, is not drawn; a table with nothing to draw raises ``NothingToDraw``.

References:
    Jain et al. (2024), arXiv 2407.10264, Figures 3 to 6.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from jaxsafety.claims.intervals import student_interval
from jaxsafety.report import analysis_panels as panels
from jaxsafety.report.analysis_panels import SIDES
from jaxsafety.report.plotting import INK, Picture, model_styles
from jaxsafety.report.seed_tables import features_of, models_of, of_model, pick
from jaxsafety.report.tables import Model, model_label

POSITIONS = {"last": "last prompt token", "response": "first answer tokens"}
MATRICES = {"gate": "gate matrix", "up": "up matrix", "down": "down matrix"}
ATTENTION = {"q": "queries", "k": "keys", "v": "values", "o": "output"}
_ACTIONS = {("gain", "up"): "gain: up", ("gain", "down"): "gain: down", ("ratio", "up"): "ratio: up"}
_GATED_ACTIONS = {("gain", name): f"gain: {name}" for name in MATRICES}
# Layers that have a row of panels each, evenly spaced, the first and the last among them.
_MOST_LAYERS = 6
# Columns of panels beside which there is place for a few words in a title.
_WIDE = 2
_ROW = 84
_QUANTILES = np.linspace(0, 1, 33)
_RANDOM = {"color": INK, "linestyle": (0, (1, 1.5))}


def clusters(table: pl.DataFrame) -> Picture:
    """Relative tau of safe and unsafe prompts, and how nearly each cluster is one direction, by layer (Figure 3)."""
    rows = pick(table, analysis="clusters", subset="all", condition=tuple(SIDES))
    shares = pick(rows, metric="leading_share")
    return panels.stacked(
        [
            (_taus, pick(rows, metric="relative_tau", part=tuple(POSITIONS))),
            (_leading_shares, pick(shares, part=features_of(shares))),
        ],
        what="clusters",
        name="clusters of safe and unsafe activations, by layer",
    )


def _taus(rows: pl.DataFrame) -> Picture:
    """A row per model, a column per position."""
    models, parts = models_of(rows), [part for part in POSITIONS if part in rows["part"]]

    def draw(figure: FigureBase) -> None:
        heads = [POSITIONS[part] for part in parts]
        grid = panels.model_grid(figure, models, heads, sharex=True, sharey=True)
        for (model, head), axes in grid.items():
            shown = of_model(rows, model).filter(pl.col("part") == parts[heads.index(head)])
            panels.reference(axes, 0.0)
            for condition, style in SIDES.items():
                panels.draw_curve(axes, pick(shown, condition=condition), over="layer", style=style)
        panels.axis_titles(figure, x="layer", y="relative τ (nearer to safe: up)")
        panels.layer_ticks(grid.values())
        panels.side_legend(figure)

    return Picture(draw, 82 + _ROW * len(models), "relative tau of safe and unsafe activations")


def _leading_shares(rows: pl.DataFrame) -> Picture:
    """A panel per side, with a curve per method at its largest learning rate beside the pretrained model's."""
    styles = model_styles(_fastest(models_of(rows)))
    conditions = [condition for condition in SIDES if condition in rows["condition"]]

    def draw(figure: FigureBase) -> None:
        grid = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
        for axes, condition in zip(grid, conditions, strict=True):
            for model, style in styles.items():
                panels.draw_curve(axes, pick(of_model(rows, model), condition=condition), over="layer", style=style)
            axes.set_title(f"leading share: {condition}")
            axes.grid(visible=True, axis="y")
        grid[0].set_ylim(bottom=0)
        grid[0].set_ylabel("s₁ / Σ s")
        figure.supxlabel("layer", fontsize=12)
        panels.layer_ticks(grid)
        panels.legend(figure, _model_keys(styles), columns=2)

    height = 150 + panels.legend_height(len(styles), columns=2)
    return Picture(draw, height, "share of the leading singular value of safe and of unsafe activations")


def output_space(table: pl.DataFrame) -> Picture:
    """What of an update's leading output directions lies in the base's null space, beside a random one (Figure 4).

    The top row is the excess over a random direction against layer. Below it, a row per layer: the norms of the null
    parts of all leading directions in ascending order, each seed's against its share of directions, so that updates of
    any rank compare.
    """
    return _null_spaces(table, analysis="output_space", name="output directions of the update in the null space")


def input_alignment(table: pl.DataFrame) -> Picture:
    """The same of an update's leading input directions: what of them the base hardly reads."""
    return _null_spaces(table, analysis="input_alignment", name="input directions of the update in the null space")


def _null_spaces(table: pl.DataFrame, *, analysis: str, name: str) -> Picture:
    """The MLP's matrices, and below them the attention's where there are any."""
    rows = pick(table, analysis=analysis)
    blocks = [
        (partial(_null_space, parts=tuple(group), name=f"{name}: {what}"), pick(rows, part=tuple(group)))
        for what, group in (("MLP", MATRICES), ("attention", ATTENTION))
    ]
    return panels.stacked(blocks, what=analysis, name=name)


def _null_space(rows: pl.DataFrame, *, parts: Sequence[str], name: str) -> Picture:
    models, parts = models_of(rows), [part for part in parts if part in rows["part"]]
    layers = spaced(sorted(pick(rows, metric="null_norm")["layer"].unique()), most=_MOST_LAYERS)
    styles = model_styles(models)

    def draw(figure: FigureBase) -> None:
        top, below = figure.subfigures(2, 1, height_ratios=[150, max(1, _ROW * len(layers) + 30)])
        _excess(top, rows, parts=parts, styles=styles)
        grid = below.subplots(max(1, len(layers)), len(parts), sharex=True, sharey="col", squeeze=False)
        for r, layer in enumerate(layers):
            for axes, part in zip(grid[r], parts, strict=True):
                shown = pick(rows, part=part, layer=layer)
                _null_profiles(axes, shown, styles)
                axes.set_title(f"{part}, {layer}" if len(parts) > _WIDE else f"layer {layer}: {part}")
                axes.grid(visible=True, axis="y")
        panels.axis_titles(below, x="share of the update's leading directions", y="norm in the null space")
        panels.legend(figure, [*_model_keys(styles), panels.key("random direction", _RANDOM)], columns=2)

    height = 190 + _ROW * len(layers) + panels.legend_height(len(models) + 1, columns=2)
    return Picture(draw, height, name)


def spaced(layers: Sequence[int], *, most: int) -> list[int]:
    """At most so many of the layers, evenly spaced, the first and the last among them."""
    chosen = np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int)
    return [layers[place] for place in chosen]


def _excess(figure: FigureBase, rows: pl.DataFrame, *, parts: Sequence[str], styles: Mapping[Model, Any]) -> None:
    grid, narrow = figure.subplots(1, len(parts), squeeze=False)[0], len(parts) > _WIDE
    for axes, part in zip(grid, parts, strict=True):
        panels.reference(axes, 0.0)
        for model, style in styles.items():
            shown = pick(of_model(rows, model), part=part, metric="excess")
            panels.draw_curve(axes, shown, over="layer", style=style)
        axes.set_title(part if narrow else f"excess: {part}")
        axes.grid(visible=True, axis="y")
    panels.axis_titles(figure, x="layer", y="excess" if narrow else "over random")
    panels.layer_ticks(grid)


def _null_profiles(axes: Axes, shown: pl.DataFrame, styles: Mapping[Model, Any]) -> None:
    for model, style in styles.items():
        values = panels.seed_values(pick(of_model(shown, model), metric="null_norm"))
        curves = [ascending(seed) for seed in values if np.isfinite(seed).any()]
        if curves:
            summary = [student_interval(column)._asdict() for column in np.transpose(curves)]
            frame = pl.DataFrame(summary, schema_overrides={"low": pl.Float64, "high": pl.Float64})
            frame = frame.with_columns(pl.col("low", "high").clip(0, 1))
            panels.draw_band(axes, _QUANTILES, frame, seeds=np.array(curves), style=style)
    baselines = pick(shown, metric="baseline_norm")["mean"].drop_nulls()
    if not baselines.is_empty():
        axes.axhline(float(np.mean(np.sort(baselines.to_numpy()))), zorder=4, linewidth=1.2, **_RANDOM)


def ascending(values: np.ndarray) -> np.ndarray:
    """One seed's values in ascending order, at fixed shares of their number."""
    values = np.sort(values[np.isfinite(values)])
    return np.interp(_QUANTILES, np.linspace(0, 1, len(values)) if len(values) > 1 else [0.0], values)


def input_space(table: pl.DataFrame) -> Picture:
    """How far the update acts on safe and unsafe activations: gain, ratio and projections (Figure 5).

    On top gain and ratio against layer; below, the deepest layer's projections on the update's input directions, each
    times its singular value.
    """
    rows = pick(table, analysis="input_space", subset="all", condition=tuple(SIDES))
    actions = pl.concat([pick(rows, metric=metric, part=part) for metric, part in _actions_in(rows)])
    projections = pick(rows, metric="projection", subset="all", part=tuple(MATRICES))
    return panels.stacked(
        [(_actions, actions), (_projections, pick(projections, layer=projections["layer"].max()))],
        what="input_space",
        name="action of the update on safe and unsafe activations, by layer and by direction",
    )


def _actions_in(rows: pl.DataFrame) -> dict[tuple[str, str], str]:
    return _GATED_ACTIONS if "gate" in rows["part"] else _ACTIONS


def _actions(rows: pl.DataFrame) -> Picture:
    """A row per model, a column per metric and matrix."""
    found = set(rows.select("metric", "part").iter_rows())
    models, heads = models_of(rows), {labels: head for labels, head in _actions_in(rows).items() if labels in found}

    def draw(figure: FigureBase) -> None:
        grid = panels.model_grid(figure, models, list(heads.values()), sharey="col")
        for model, ((metric, part), head) in itertools.product(models, heads.items()):
            for condition, style in SIDES.items():
                shown = pick(of_model(rows, model), condition=condition, metric=metric, part=part)
                panels.draw_curve(grid[model, head], shown, over="layer", style=style)
            panels.log_range(grid[model, head], pick(rows, metric=metric, part=part))
        panels.axis_titles(
            figure, x="layer", y="gain (log)" if "ratio" not in rows["metric"] else "gain and ratio (log)"
        )
        for axes in grid.values():
            panels.log_ticks(axes.yaxis, most=3)
        panels.layer_ticks(grid.values())
        panels.side_legend(figure)

    return Picture(draw, 82 + _ROW * len(models), "gain and ratio of the update")


def _projections(rows: pl.DataFrame) -> Picture:
    """A row per method at its largest learning rate, a column per matrix; the rows are of one layer."""
    models, layer = _fastest(models_of(rows)), rows["layer"][0]
    found = {part: name for part, name in MATRICES.items() if part in rows["part"]}
    heads = {
        part: f"{part}, {layer}" if len(found) > _WIDE else f"{name}, layer {layer}" for part, name in found.items()
    }

    def draw(figure: FigureBase) -> None:
        grid = panels.model_grid(figure, models, list(heads.values()), sharey="col")
        for model, (part, head) in itertools.product(models, heads.items()):
            for condition, style in SIDES.items():
                shown = pick(of_model(rows, model), condition=condition, part=part)
                panels.draw_curve(grid[model, head], shown, over="strength", style=style)
        # Only once all is drawn: a limit ends the scaling of the axes that are shared.
        for axes in grid.values():
            axes.set_ylim(bottom=0)
        panels.axis_titles(figure, x="input direction of the update, strongest first", y="weighted projection")
        panels.layer_ticks(grid.values())
        panels.side_legend(figure)

    return Picture(draw, 82 + _ROW * len(models), "weighted projections on the update's input directions")


def _fastest(models: Sequence[Model]) -> list[Model]:
    highest = {method: max(model.lr for model in models if model.method == method) for method, *_ in models}
    return [model for model in models if model.lr == highest[model.method]]


def _model_keys(styles: Mapping[Model, Any]) -> list[Line2D]:
    return [panels.key(model_label(model), style) for model, style in styles.items()]


def sensitivity(table: pl.DataFrame) -> Picture:
    """Histograms of the gradient norm before and after tuning, and means of gradient and Jacobian norm (Figure 6)."""
    rows = pick(table, analysis="sensitivity", subset="all", condition=tuple(SIDES))
    heads = {"gradient_norm": "gradient norm", "jacobian_norm": "Jacobian norm"}
    rows = panels.needed(pick(rows, metric=("histogram", *heads)), "sensitivity")
    histogram, models = pick(rows, metric="histogram"), models_of(rows)
    metrics = [metric for metric in heads if metric in rows["metric"]]
    shown_models = models_of(histogram)
    height = (_ROW + 4) * math.ceil(len(panels.flow_slots(shown_models)) / 2) + 34
    dots_height = 76 + 19 * len(models)

    def draw(figure: FigureBase) -> None:
        top, below = figure.subfigures(2, 1, height_ratios=[height, dots_height])
        if shown_models:
            _histograms(top, histogram, shown_models)
        grid = below.subplots(1, max(1, len(metrics)), sharey=True, squeeze=False)[0]
        for axes, metric in zip(grid, metrics, strict=False):
            for side, (condition, style) in enumerate(SIDES.items()):
                for place, model in enumerate(models):
                    shown = pick(of_model(rows, model), condition=condition, metric=metric)
                    panels.draw_dot(axes, panels.dodged(place, side), shown, style=panels.dot(style))
            axes.set_title(heads[metric])
            axes.set_xlabel("mean (log)")
            axes.set_xscale("log")
            axes.set_ylim(len(models) - 0.5, -0.5)
            axes.grid(visible=True, axis="y")
            panels.log_ticks(axes.xaxis, most=4)
        grid[0].set_yticks(range(len(models)), [model_label(model) for model in models])
        panels.side_legend(figure)

    return Picture(draw, height + dots_height + 22, "sensitivity to the prompt, before and after tuning")


def _histograms(figure: FigureBase, histogram: pl.DataFrame, models: Sequence[Model]) -> None:
    grid = panels.flow_grid(figure, models)
    for model, axes in grid.items():
        for condition, style in SIDES.items():
            line = {name: value for name, value in style.items() if name != "marker"}
            shown = pick(of_model(histogram, model), condition=condition)
            panels.draw_curve(axes, shown, over="strength", style=line, steps=True)
        axes.set_ylim(bottom=0)
    panels.axis_titles(figure, x="gradient norm (log)", y="share of prompts")
    # Bins are logarithms to the base 10.
    for axes in grid.values():
        low, high = axes.get_xlim()
        stride = max(1, math.ceil((high - low) / 4))
        axes.xaxis.set_major_locator(FixedLocator(range(math.ceil(low), math.floor(high) + 1, stride)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: panels.short(10.0**value)))
