"""What only two checkpoints have: spectra and ranks of large updates, and the separation of prompts in English.

Each takes a seed table (``jaxsafety.report.seed_tables``) and returns a picture. What a table lacks is not drawn; a
table with nothing to draw raises ``NothingToDraw``.
"""

import itertools
from functools import partial

import numpy as np
import polars as pl
from matplotlib.figure import FigureBase

from jaxsafety.report import plot as panels
from jaxsafety.report.plot import ATTENTION, MLP, spaced
from jaxsafety.report.plotting import BLUE, GREEN, INK, ORANGE, PINK, Picture, condition_styles, model_styles
from jaxsafety.report.seed_tables import conditions_of, features_of, models_of, of_model, pick
from jaxsafety.report.tables import condition_label, model_label

_ROW = 84
_LAYERS = 4
_SPECTRA = {
    "value_base": ("weights before", {"color": INK, "linestyle": (0, (4, 1.6))}),
    "value_delta": ("update", {"color": ORANGE, "linestyle": "solid"}),
}
_MATRIX_STYLES = {
    name: {"color": colour, "linestyle": dash, "marker": marker}
    for name, colour, dash, marker in zip(
        (*MLP, *ATTENTION),
        (BLUE, ORANGE, GREEN, BLUE, ORANGE, GREEN, PINK),
        ("solid", (0, (4, 1.6)), (0, (1.2, 1.2)), "solid", (0, (4, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.4, 1.2, 1.4))),
        ("o", "s", "^", "o", "s", "^", "D"),
        strict=True,
    )
}
_SIZES = {"rank_delta": "rank: 90 %", "stable_rank": "stable rank", "changed_norm": "|ΔW| / |W|"}
_APART = {"accuracy": "nearest mean", "effect_size": "effect size"}
# Places of a spectrum that are drawn, evenly spaced on a logarithmic axis.
PLACES = tuple(map(float, np.unique(np.geomspace(1, 2**16, 160).astype(int)) - 1))


def spectrum(table: pl.DataFrame) -> Picture:
    """Singular values of weights and updates in some layers, and the update's rank and size by layer."""
    blocks = [
        (partial(block, parts=tuple(group), what=what), pick(table, part=tuple(group)))
        for (what, group), block in itertools.product((("MLP", MLP), ("attention", ATTENTION)), (_spectra, _sizes))
    ]
    shown = [
        (block, pick(rows, metric=tuple(_SPECTRA if block.func is _spectra else _SIZES))) for block, rows in blocks
    ]
    return panels.stacked(shown, what="spectrum", name="spectra of weights and updates, and the updates' rank and size")


def _spectra(rows: pl.DataFrame, *, parts: tuple[str, ...], what: str) -> Picture:
    """A row per layer, a column per matrix."""
    parts = tuple(part for part in parts if part in rows["part"])
    layers = spaced(sorted(rows["layer"].unique()), most=_LAYERS)

    def draw(figure: FigureBase) -> None:
        grid = figure.subplots(len(layers), len(parts), sharex=True, sharey=True, squeeze=False)
        for r, layer in enumerate(layers):
            for axes, part in zip(grid[r], parts, strict=True):
                for metric, (_, style) in _SPECTRA.items():
                    shown = pick(rows, part=part, layer=layer, metric=metric)
                    shown = shown.with_columns(pl.col("strength") + 1).filter(pl.col("mean") > 0)
                    panels.draw_curve(axes, shown, over="strength", style=style)
                axes.set_title(f"{part}, layer {layer}" if len(parts) < len(ATTENTION) else f"{part}, {layer}")
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.grid(visible=True, axis="y")
        for axes in grid.flat:
            panels.log_ticks(axes.yaxis, most=4)
            panels.log_ticks(axes.xaxis, most=3)
        panels.axis_titles(figure, x="singular value, the largest first (log)", y="size (log)")
        panels.legend(figure, [panels.key(name, style) for name, style in _SPECTRA.values()], columns=2)

    return Picture(draw, 82 + _ROW * len(layers), f"spectra: {what}")


def _sizes(rows: pl.DataFrame, *, parts: tuple[str, ...], what: str) -> Picture:
    """Rank, stable rank and relative size by layer, a curve per matrix."""
    metrics = [metric for metric in _SIZES if metric in rows["metric"]]
    parts = tuple(part for part in parts if part in rows["part"])

    def draw(figure: FigureBase) -> None:
        grid = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(grid, metrics, strict=True):
            for part in parts:
                shown = pick(rows, metric=metric, part=part)
                panels.draw_curve(axes, shown, over="layer", style=_MATRIX_STYLES[part])
            axes.set_title(_SIZES[metric])
            axes.set_ylim(bottom=0)
            axes.grid(visible=True, axis="y")
        panels.layer_ticks(grid)
        figure.supxlabel("layer", fontsize=12)
        panels.legend(figure, [panels.key(part, _MATRIX_STYLES[part]) for part in parts], columns=4)

    return Picture(draw, 170, f"rank and size: {what}")


def separation(table: pl.DataFrame) -> Picture:
    """How well the nearest mean tells safe from unsafe by layer, and the cosine form of tau of every condition."""
    clusters = pick(table, analysis="clusters", subset="all")
    rows = pick(clusters, part=features_of(clusters))
    blocks = [(_apart, pick(rows, metric=tuple(_APART))), (_cosines, pick(rows, metric="cosine_tau"))]
    return panels.stacked(
        blocks, what="clusters", name="separation of safe and unsafe prompts, and where jailbreaks lie"
    )


def _apart(rows: pl.DataFrame) -> Picture:
    styles = model_styles(models_of(rows))
    metrics = [metric for metric in _APART if metric in rows["metric"]]

    def draw(figure: FigureBase) -> None:
        grid = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(grid, metrics, strict=True):
            panels.reference(axes, 0.5 if metric == "accuracy" else 0.0)
            for model, style in styles.items():
                panels.draw_curve(axes, pick(of_model(rows, model), metric=metric), over="layer", style=style)
            axes.set_title(_APART[metric])
            axes.grid(visible=True, axis="y")
        panels.layer_ticks(grid)
        figure.supxlabel("layer", fontsize=12)
        panels.legend(figure, [panels.key(model_label(model), style) for model, style in styles.items()], columns=2)

    return Picture(draw, 190, "accuracy of the nearest mean, and effect size")


def _cosines(rows: pl.DataFrame) -> Picture:
    models, styles = models_of(rows), condition_styles(conditions_of(rows))

    def draw(figure: FigureBase) -> None:
        grid = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, model in zip(grid, models, strict=True):
            panels.reference(axes, 0.0)
            for condition, style in styles.items():
                panels.draw_curve(axes, pick(of_model(rows, model), condition=condition), over="layer", style=style)
            axes.set_title(model_label(model))
            axes.grid(visible=True, axis="y")
        panels.layer_ticks(grid)
        panels.axis_titles(figure, x="layer", y="cosine τ (safe: up)")
        panels.legend(figure, [panels.key(condition_label(name), style) for name, style in styles.items()], columns=2)

    return Picture(draw, 190 + panels.legend_height(len(styles), columns=2), "cosine tau of every condition")
