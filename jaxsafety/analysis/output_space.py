"""What an update writes: its output directions beside the null space of the weights before (Figure 4).

The maths is :mod:`jaxsafety.linalg.update_spaces`; beside every norm stands that of random directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, static
from jaxsafety.linalg import subspace, svd, update_spaces
from jaxsafety.types import Analysis, Coordinate, Key, Measured, Section, View

MATRICES = ("up", "down")
# Random directions that the sampled baseline is the mean of.
_SAMPLES = 256
# Layers that have a row of panels each, evenly spaced, the first and the last among them.
_MOST_LAYERS = 6
_QUANTILES = np.linspace(0, 1, 33)


@dataclass(frozen=True)
class Config:
    """Of which directions.

    Attributes:
        energy: share of a squared spectrum that counts as a matrix's range.
        directions: leading directions of the update that norms are written for.
    """

    energy: float = static(0.9, above=0, at_most=1)
    directions: int = static(16, at_least=1)
    __post_init__ = check


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns the share of the update's output directions in the null space of the base, beside its baselines."""
    sides = [(view.params["blocks"]["mlp"][name], view.base["blocks"]["mlp"][name]) for name in MATRICES]
    stacked = tree.stack([_of_matrix(*side, config, key=key) for side in sides])
    return {(metric, f"matrix {axes}"): values for (metric, axes), values in stacked.items()}


def _of_matrix(after: Float[Array, "l m n"], before: Float[Array, "l m n"], config: Config, *, key: Key) -> Measured:
    delta = after - before
    space = update_spaces.output_space(before, delta, energy=config.energy)
    values = svd.decompose(delta).values
    base = svd.decompose(before)
    mask = subspace.leading(space.rank_base, base.values.shape[-1])
    drawn = subspace.sample_random_energy(base.outputs, key=key, samples=_SAMPLES, mask=mask)
    mean = jnp.nanmean(space.null_norm, axis=-1)
    per_layer = {
        "null_norm_mean": mean,
        "null_energy": space.null_energy,
        "total_null_energy": space.total_null_energy,
        "baseline_norm": space.baseline_norm,
        "baseline_energy": space.baseline_energy,
        "baseline_sampled": jnp.mean(jnp.sqrt(jnp.maximum(1 - drawn, 0.0)), axis=-1),
        "excess": mean - space.baseline_norm,
        "excess_energy": space.null_energy - space.baseline_energy,
        "rank_base": space.rank_base.astype(jnp.float32),
        "rank_delta": space.rank_delta.astype(jnp.float32),
        "stable_rank": subspace.stable_rank(values),
        "effective_rank": subspace.effective_rank(values),
        "changed_norm": update_spaces.changed_norm(before, delta),
        "error": space.errors,
    }
    count = min(config.directions, *before.shape[1:])
    named = {(metric, "layer"): quantity for metric, quantity in per_layer.items()}
    return named | {("null_norm", "layer direction"): space.null_norm[:, :count]}


def draw(table: Any, plot: Any) -> Any:
    """What of an update's leading output directions lies in the base's null space, beside a random one (Figure 4).

    The top row is the excess over a random direction against layer. Below it, a row per layer: the norms of the null
    parts of all leading directions in ascending order, each seed's against its share of directions, so that updates of
    any rank compare.
    """
    name = "output directions of the update in the null space"
    return draw_null_spaces(table, plot, analysis="output_space", name=name)


def draw_null_spaces(table: Any, plot: Any, *, analysis: str, name: str) -> Any:
    """The MLP's matrices, and below them the attention's where there are any; none of an update of nothing."""
    rows = plot.pick(table, analysis=analysis)
    if plot.alive(plot.pick(rows, metric="null_norm")).is_empty():
        rows = rows.clear()
    blocks = [
        (partial(_null_space, plot=plot, parts=group, name=f"{name}: {what}"), plot.pick(rows, part=group))
        for what, group in (("MLP", plot.MLP), ("attention", plot.ATTENTION))
    ]
    return plot.stacked(blocks, what=analysis, name=name)


def _null_space(rows: Any, *, plot: Any, parts: Sequence[str], name: str) -> Any:
    models, parts = plot.models_of(rows), [part for part in parts if part in rows["part"]]
    layers = plot.spaced(sorted(plot.pick(rows, metric="null_norm")["layer"].unique()), most=_MOST_LAYERS)
    styles = plot.model_styles(models)
    keys = plot.model_keys(styles) | {"random direction": plot.RANDOM}

    def draw(figure: Any) -> None:
        top, below = figure.subfigures(2, 1, height_ratios=[150, max(1, plot.ROW * len(layers) + 30)])
        _excess(top, rows, plot, parts=parts, styles=styles)
        grid = below.subplots(max(1, len(layers)), len(parts), sharex=True, sharey="col", squeeze=False)
        for r, layer in enumerate(layers):
            for axes, part in zip(grid[r], parts, strict=True):
                shown = plot.pick(rows, part=part, layer=layer)
                _null_profiles(axes, shown, plot, styles)
                axes.set_title(f"{part}, {layer}" if len(parts) > plot.WIDE else f"layer {layer}: {part}")
                axes.grid(visible=True, axis="y")
        plot.axis_titles(below, x="share of the update's leading directions", y="norm in the null space")
        plot.legend(figure, keys, columns=2)

    height = 190 + plot.ROW * len(layers) + plot.legend_height(keys, columns=2)
    return plot.Picture(draw, height, name)


def _excess(figure: Any, rows: Any, plot: Any, *, parts: Sequence[str], styles: Mapping[Any, Any]) -> None:
    narrow = len(parts) > plot.WIDE
    columns = {part if narrow else f"excess: {part}": {"part": part, "metric": "excess"} for part in parts}
    y = "excess" if narrow else "over random"
    plot.layer_strip(figure, rows, columns, y=y, across=[0.0] * len(parts), model=styles)


def _null_profiles(axes: Any, shown: Any, plot: Any, styles: Mapping[Any, Any]) -> None:
    for model, style in styles.items():
        values = plot.seed_values(plot.pick(plot.of_model(shown, model), metric="null_norm"))
        curves = [ascending(seed) for seed in values if np.isfinite(seed).any()]
        if curves:
            plot.draw_band(axes, _QUANTILES, plot.share_intervals(curves), seeds=np.array(curves), style=style)
    baselines = plot.pick(shown, metric="baseline_norm")["mean"].drop_nulls()
    if not baselines.is_empty():
        axes.axhline(float(np.mean(np.sort(baselines.to_numpy()))), zorder=4, linewidth=1.2, **plot.RANDOM)


def ascending(values: np.ndarray) -> np.ndarray:
    """One seed's values in ascending order, at fixed shares of their number."""
    values = np.sort(values[np.isfinite(values)])
    return np.interp(_QUANTILES, np.linspace(0, 1, len(values)) if len(values) > 1 else [0.0], values)


SECTION = Section(
    "The update and the null space of the weights",
    "Figure 4",
    "Each leading output direction of the update is split into what the pretrained weights can write and the rest; "
    "a large rest alone says little, because a random direction has one too: only what exceeds the dotted line, "
    "drawn on top as the excess, is specific to safety fine-tuning.",
    draw,
    claims=("null_space_up", "null_space_down"),
)
ANALYSIS = Analysis(
    Config, measure, about="update", section=SECTION,
    axes=lambda config: {"matrix": Coordinate("part", MATRICES), "direction": Coordinate("strength")},
)  # fmt: skip
