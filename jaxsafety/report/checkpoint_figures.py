"""What only checkpoints have: spectra and ranks of large updates, and the separation of prompts in English.

Each takes a seed table (``jaxsafety.report.seed_tables``) and returns a picture. What a table lacks is not drawn; a
table with nothing to draw raises ``NothingToDraw``.
"""

import itertools
from functools import partial

import numpy as np
import polars as pl
from matplotlib.figure import FigureBase

from jaxsafety.report import plot as panels
from jaxsafety.report.plot import ATTENTION, CURVES, MLP, ROW, spaced
from jaxsafety.report.plotting import INK, ORANGE, Picture, condition_styles, model_styles
from jaxsafety.report.seed_tables import conditions_of, features_of, models_of, pick
from jaxsafety.report.tables import condition_label

_LAYERS = 4
_SPECTRA = {
    "value_base": {"color": INK, "linestyle": (0, (4, 1.6))},
    "value_delta": {"color": ORANGE, "linestyle": "solid"},
}
_MATRIX_STYLES = {name: style for group in (MLP, ATTENTION) for name, style in zip(group, CURVES, strict=False)}
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
                shown = pick(rows, part=part, layer=layer)
                shown = shown.with_columns(pl.col("strength") + 1).filter(pl.col("mean") > 0)
                panels.draw_curves(axes, shown, over="strength", metric=_SPECTRA)
                axes.set_title(f"{part}, layer {layer}" if len(parts) < len(ATTENTION) else f"{part}, {layer}")
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.grid(visible=True, axis="y")
        for axes in grid.flat:
            panels.log_ticks(axes.yaxis, most=4)
            panels.log_ticks(axes.xaxis, most=3)
        panels.axis_titles(figure, x="singular value, the largest first (log)", y="size (log)")
        keys = dict(zip(("weights before", "update"), _SPECTRA.values(), strict=True))
        panels.legend(figure, keys, columns=2)

    return Picture(draw, 82 + ROW * len(layers), f"spectra: {what}")


def _sizes(rows: pl.DataFrame, *, parts: tuple[str, ...], what: str) -> Picture:
    """Rank, stable rank and relative size by layer, a curve per matrix."""
    columns = {title: {"metric": metric} for metric, title in _SIZES.items() if metric in rows["metric"]}
    styles = {part: _MATRIX_STYLES[part] for part in parts if part in rows["part"]}

    def draw(figure: FigureBase) -> None:
        for axes in panels.layer_strip(figure, rows, columns, part=styles):
            axes.set_ylim(bottom=0)
        panels.legend(figure, styles, columns=4)

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
    columns = {title: {"metric": metric} for metric, title in _APART.items() if metric in rows["metric"]}

    def draw(figure: FigureBase) -> None:
        across = [0.5 if title == _APART["accuracy"] else 0.0 for title in columns]
        panels.layer_strip(figure, rows, columns, across=across, model=styles)
        panels.legend(figure, panels.model_keys(styles), columns=2)

    height = 150 + panels.legend_height(panels.model_keys(styles), columns=2)
    return Picture(draw, height, "accuracy of the nearest mean, and effect size")


def _cosines(rows: pl.DataFrame) -> Picture:
    styles = condition_styles(conditions_of(rows))
    return panels.model_curves(
        rows, {"": {}}, lambda grid: panels.layer_ticks(grid.values()), over="layer", across={"": 0.0}, x="layer",
        y="cosine τ (safe: up)", keys={condition_label(name): style for name, style in styles.items()},
        shared={"sharey": True}, condition=styles, name="cosine tau of every condition",
    )  # fmt: skip
