"""Intruder dimensions: leading directions of the tuned weights that no direction of the weights before is like.

The maths is :mod:`jaxsafety.linalg.kept`; beside their number stands that of a random update of the same spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxsafety.config.fields import check, static
from jaxsafety.linalg import kept
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Analysis, Coordinate, Key, Measured, Section, View

MATRICES = ("up", "down")
# Cosines below which a direction counts as an intruder; the paper's own lie between 0.4 and 0.9.
BELOW = (0.5, 0.6, 0.7, 0.8, 0.9)
_DASHED = (0, (4, 2))


@dataclass(frozen=True)
class Config:
    """Of how many directions.

    Attributes:
        directions: leading output directions of the tuned weights that are looked at; at most all of a matrix.
        method: of the decompositions; NaN where ``gram`` does not resolve a direction.
    """

    directions: int = static(10, at_least=1)
    method: Method = "full"
    __post_init__ = check


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns the share of the leading directions that are intruders, by matrix, layer and cosine, and beside that what
    a random update of the same spectrum brings."""
    found = {name: [] for name in ("intruders", "intruders_random", "similarity")}
    for name, own in zip(MATRICES, jax.random.split(key, len(MATRICES)), strict=True):
        before, after = (side["blocks"]["mlp"][name] for side in (view.base, view.params))
        count, delta = min(config.directions, *before.shape[1:]), after - before
        meaningless = before + kept.like(delta, key=own, method=config.method)
        given = {"count": count, "method": config.method}
        cosines, control = (kept.known_directions(before, one, **given) for one in (after, meaningless))
        found["similarity"].append(jnp.mean(cosines, axis=-1))
        for label, values in (("intruders", cosines), ("intruders_random", control)):
            counted = jnp.mean(values[..., None] < jnp.asarray(BELOW)[None, None], axis=1)
            found[label].append(jnp.where(jnp.isnan(values).any(axis=1, keepdims=True), jnp.nan, counted))
    stacked = {label: jnp.stack(values) for label, values in found.items()}
    counted = {
        (label + mean, axes): jnp.mean(stacked[label], axis=1) if mean else stacked[label]
        for label in ("intruders", "intruders_random")
        for mean, axes in (("", "matrix layer below"), ("_mean", "matrix below"))
    }
    return counted | {("similarity", "matrix layer"): stacked["similarity"]}


def draw(table: Any, plot: Any) -> Any:
    """The share of intruders against the cosine below which a direction is one, a panel per matrix."""
    rows = plot.needed(plot.pick(table, analysis="intruders"), "intruders")
    styles = plot.model_styles(plot.models_of(rows))
    control = {"color": plot.INK, "linestyle": _DASHED}
    keys = plot.model_keys(styles) | {"dashed: a random update of the same spectrum": control}

    def draw_on(figure: Any) -> None:
        grid = figure.subplots(1, len(MATRICES), sharey=True, squeeze=False)[0]
        for axes, matrix in zip(grid, MATRICES, strict=True):
            for metric, look in (("intruders_random_mean", {"linestyle": _DASHED}), ("intruders_mean", {})):
                shown = plot.pick(rows, part=matrix, metric=metric)
                own = {model: {**style, **look} for model, style in styles.items()}
                plot.draw_curves(axes, shown, over="strength", model=own)
            axes.set_title(f"{matrix} matrix")
            axes.set_ylim(0, 1)
            axes.grid(visible=True, axis="y")
        plot.axis_titles(
            figure, x="cosine with the nearest direction before, below which it counts", y="share of the directions"
        )
        plot.legend(figure, keys, columns=2)

    height = 60 + 2 * plot.ROW + plot.legend_height(keys, columns=2)
    return plot.Picture(draw_on, height, "intruder dimensions of the tuned weights")


SECTION = Section(
    "Intruder dimensions",
    "beyond the paper",
    "Of the leading output directions of the tuned weights, the share that is like no single direction of the weights "
    "before, mean over layers: above the dashed line of the same colour tuning brings in more new directions than an "
    "update of the same size and rank that means nothing.",
    draw,
    claims=("intruders_beyond_random",),
)
ANALYSIS = Analysis(
    Config, measure, about="update", section=SECTION,
    axes=lambda config: {"matrix": Coordinate("part", MATRICES), "below": Coordinate("strength", BELOW)},
)  # fmt: skip
