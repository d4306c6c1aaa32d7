"""Do the methods make the same change? Cosines and shared subspaces of two methods' updates.

The maths is :mod:`jaxsafety.linalg.alignment`; beside every overlap stands that of unrelated subspaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxsafety import tree
from jaxsafety.config.fields import check, static
from jaxsafety.linalg import alignment
from jaxsafety.types import Analysis, Coordinate, Key, Measured, Section, View

MATRICES = ("up", "down")
_OVERLAPS = {"matrix_cosine": "cosine", "output_overlap": "outputs", "input_overlap": "inputs"}
# Letters of a pair that leave room for a second column of the legend.
_SHORT = 20
_START = "gradients, step 0"
_MOST_POINTS = 100


@dataclass(frozen=True)
class Config:
    """Of which directions.

    Attributes:
        directions: half as many leading directions span the spaces that are compared.
    """

    directions: int = static(16, at_least=1)
    __post_init__ = check


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns how two updates of the same base are aligned: cosines, and angles of their leading spaces."""
    rank = min(config.directions, *view.base["blocks"]["mlp"]["up"].shape[1:]) // 2 or 1
    deltas = (tree.difference(params, view.base) for params in (view.params, view.other))
    found = alignment.align(*deltas, rank=rank)
    per_matrix = {
        "matrix_cosine": found.matrix_cosine,
        "input_overlap": {path: alignment.overlap(angles) for path, angles in found.input_angles.items()},
        "output_overlap": {path: alignment.overlap(angles) for path, angles in found.output_angles.items()},
        "input_chance": found.input_chance,
        "output_chance": found.output_chance,
    }
    return {("cosine", ""): found.cosine} | {
        (metric, "matrix layer"): jnp.stack([by_path[f"blocks/mlp/{name}"] for name in MATRICES])
        for metric, by_path in per_matrix.items()
    }


def draw(table: Any, plot: Any) -> Any:
    """Cosines and overlaps of the methods' updates beside what chance gives, and DPO's slope along training."""
    rows = plot.pick(table, analysis=("alignment", "gradients"))
    slope = plot.alive(plot.pick(table, analysis="curves", metric="rewards/slope"))
    plot.needed(plot.together(rows, slope), "alignment")
    pairs = sorted({part.partition(":")[0] for part in rows["part"]}, key=plot.pair_order)
    styles = {pair: plot.PAIR_STYLES[place % len(plot.PAIR_STYLES)] for place, pair in enumerate(pairs)}
    dashes = dict(zip(filter(None, plot.rates_of(plot.models_of(rows))), plot.RATE_DASHES, strict=False))
    columns = 2 if max(map(len, map(plot.pair_label, pairs)), default=0) <= _SHORT else 1
    overlaps = [metric for metric in _OVERLAPS if metric in rows["metric"]]
    heights = [
        (60 + 34 * len(pairs)) * bool(pairs), (44 + plot.ROW * len(overlaps)) * bool(overlaps), 130 * (slope.height > 0)
    ]  # fmt: skip
    keys = {plot.pair_label(pair): style for pair, style in styles.items()}
    keys |= {rate: {"color": plot.INK, "linestyle": dash} for rate, dash in dashes.items()}
    keys |= {"chance": plot.CHANCE} if overlaps else {}

    def draw(figure: Any) -> None:
        ratios = [height for height in heights if height]
        parts = iter(figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0])
        if pairs:
            _draw_cosines(next(parts), rows, plot, styles, dashes)
        if overlaps:
            _draw_overlaps(next(parts), rows, plot, overlaps, styles, dashes)
        if not slope.is_empty():
            _draw_slope(next(parts), slope, plot)
        if keys:
            plot.legend(figure, keys, columns=columns)

    height = sum(heights) + plot.legend_height(keys, columns=columns)
    return plot.Picture(draw, height, "alignment of the methods' updates")


def _draw_cosines(figure: Any, rows: Any, plot: Any, styles: dict[str, Any], dashes: dict[str, Any]) -> None:
    axes = figure.subplots()
    axes.axvline(0, zorder=0, **plot.CHANCE)
    kinds = [(rate, plot.pick(rows, metric="cosine", lr_name=rate)) for rate in dashes]
    kinds.append((_START, plot.pick(rows, metric="gradient_cosine", lr_name="")))
    kinds = [(name, shown) for name, shown in kinds if not shown.is_empty()]
    labels = []
    for pair, style in styles.items():
        for name, shown in kinds:
            plot.draw_dot(axes, len(labels), plot.pick(shown, part=pair), style=plot.dot(style))
            labels.append(name)
    plot.dot_rows(axes, labels, edge=0.5)
    axes.set_title("cosine of whole updates, and of gradients")
    axes.grid(visible=True, axis="y")


def _draw_overlaps(
    figure: Any, rows: Any, plot: Any, metrics: Sequence[str], styles: dict[str, Any], dashes: dict[str, Any]
) -> None:
    matrices = sorted({part.partition(":")[2] for part in rows["part"]} - {""}, reverse=True)
    grid = figure.subplots(len(metrics), len(matrices), sharex=True, sharey="row", squeeze=False)
    for row, metric in zip(grid, metrics, strict=True):
        for axes, matrix in zip(row, matrices, strict=True):
            for pair, style in styles.items():
                shown = plot.pick(rows, part=f"{pair}:{matrix}", metric=metric)
                dashed = {rate: style | {"linestyle": dash} for rate, dash in dashes.items()}
                plot.draw_curves(axes, shown, over="layer", lr_name=dashed)
            _draw_chance(axes, plot.pick(rows, part=tuple(f"{pair}:{matrix}" for pair in styles)), plot, metric)
            axes.set_title(f"{_OVERLAPS[metric]}: {matrix}")
            axes.grid(visible=True, axis="y")
    plot.axis_titles(figure, x="layer", y="cosine; mean squared cosine")
    plot.layer_ticks(grid.flat)


def _draw_chance(axes: Any, rows: Any, plot: Any, metric: str) -> None:
    if metric == "matrix_cosine":
        axes.axhline(0, zorder=4, **plot.CHANCE)
        return
    chance = plot.pick(rows, metric=metric.replace("overlap", "chance")).drop_nulls("mean")
    layers = sorted(chance["layer"].unique())
    axes.plot(layers, [plot.pick(chance, layer=layer)["mean"].mean() for layer in layers], zorder=4, **plot.CHANCE)


def _draw_slope(figure: Any, slope: Any, plot: Any) -> None:
    axes = figure.subplots()
    for model, style in plot.model_styles(plot.models_of(slope)).items():
        curve = plot.thinned(plot.of_model(slope, model).sort("step"), most=_MOST_POINTS)
        plot.draw_curve(axes, curve, over="step", style=style | {"label": plot.model_label(model)})
    axes.set_title("slope of DPO's loss: mean σ(−margin)")
    axes.set_xlabel("training step")
    axes.set_ylim(0, 1)
    axes.grid(visible=True, axis="y")
    # It starts at 1/2 and falls: above is room.
    axes.legend(loc="upper right", borderaxespad=0, labelspacing=0.2)


SECTION = Section(
    "Are the methods different?",
    "beyond the paper",
    "Cosines and overlaps compare the updates of two methods: at the dotted line they are as unrelated as chance "
    "makes them, at 1 they are the same; a slope that stays near 0.5 says that DPO still trains as it began, "
    "weighting every pair alike.",
    draw,
    claims=("dpo_like_unlearning",),
    also=(("gradients", "gradient_cosine"), ("curves", "rewards/slope")),
)
ANALYSIS = Analysis(
    Config, measure, about="pair", axes=lambda config: {"matrix": Coordinate("part", MATRICES)}, section=SECTION
)
