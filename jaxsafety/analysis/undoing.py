"""Does what comes after safety fine-tuning undo it, or go round it? A further update beside the one that it follows.

The maths is :mod:`jaxsafety.linalg.update_spaces` and :mod:`jaxsafety.linalg.kept`; beside every share stands that of
random directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, static
from jaxsafety.linalg import alignment, kept, update_spaces
from jaxsafety.types import Analysis, Coordinate, Key, Measured, Params, Section, View

MATRICES = ("up", "down")
_PANELS = {
    "undone": "share undone",
    "relative_norm": "relative norm",
    "kept_outputs": "in its outputs",
    "kept_inputs": "in its inputs",
    "null_energy": "in the null space",
    "relative_gap": "safe and unsafe apart",
}
# What stands beside a metric as a tick: chance, or the same of the models before.
_TICKS = {
    "kept_outputs": "chance_outputs",
    "kept_inputs": "chance_inputs",
    "null_energy": "chance_null",
    "relative_gap": "relative_gap",
}


@dataclass(frozen=True)
class Config:
    """Of which directions.

    Attributes:
        energy: share of a squared spectrum whose leading directions are a matrix's range, or the space of an update.
    """

    energy: float = static(0.9, above=0, at_most=1)
    __post_init__ = check


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns, of the ``further`` update and the ``first`` one that it follows, over all parameters:

    - ``relative_norm``: ``|further| / |first|``; ``cosine`` of the two in [-1, 1];
    - ``undone``: ``-<further, first> / |first|^2``, 1 where all of the first is taken back, below 0 where it grows;

    and by MLP matrix and layer shares of the further update's energy, each beside what random directions hold:

    - ``kept_inputs``, ``kept_outputs``: in the leading directions that the first reads and writes;
    - ``null_energy``: of its outputs in the null space of the weights before both.
    """
    first, further = (tree.difference(*sides) for sides in ((view.parent, view.base), (view.params, view.parent)))
    cosine, ratio = alignment.tree_cosine(further, first), _norm(further) / _norm(first)
    shares = tree.stack([_shares(view.base, first, further, name, energy=config.energy) for name in MATRICES])
    whole = {"relative_norm": ratio, "cosine": cosine, "undone": -cosine * ratio}
    return {(name, ""): value for name, value in whole.items()} | {
        (name, "matrix layer"): values for name, values in shares.items()
    }


def _norm(update: Params) -> Float[Array, ""]:
    """Frobenius norm of a tree."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in tree.flatten(update).values()))


def _shares(base: Params, first: Params, further: Params, name: str, *, energy: float) -> dict[str, Array]:
    """Returns the shares of one matrix by layer."""
    before, done, delta = (side["blocks"]["mlp"][name] for side in (base, first, further))
    null = update_spaces.output_space(before, delta, energy=energy)
    found = {"null_energy": null.total_null_energy, "chance_null": null.baseline_energy}
    for side, update in (("inputs", done.mT), ("outputs", done)):
        basis = update_spaces.range_basis(update, energy=energy)
        used = jnp.sum(jnp.any(basis != 0, axis=1), axis=-1)
        every = jnp.asarray([basis.shape[-1]])
        found[f"kept_{side}"] = kept.energy_kept(delta, basis, side=side, counts=every)[:, 0]
        found[f"chance_{side}"] = used / basis.shape[1]
    return found


def draw(table: Any, plot: Any) -> Any:
    """A dot for every model in the row of its name, shares as means over matrices and layers; a tick is what chance
    gives, or what the tuned models had before, each a mean over models."""
    rows = plot.needed(plot.pick(table, analysis="undoing"), "undoing")
    names = list(dict.fromkeys(model.method for model in plot.models_of(rows)))
    apart = plot.pick(table, analysis="clusters", metric="relative_gap", part="last")
    rows = plot.together(rows, apart)
    before = [model.method for model in plot.models_of(apart) if model.method not in (*names, "pretrained")]
    look = {"color": plot.INK, "marker": "o", "linestyle": "none"}
    tick = {"color": plot.INK, "marker": "|", "linestyle": "none"}
    keys = {"a model, mean over seeds": look, "chance, or before": tick}

    def draw_on(figure: Any) -> None:
        grid = figure.subplots(3, 2, sharey=True, squeeze=False).ravel()
        for axes, (metric, title) in zip(grid, _PANELS.items(), strict=True):
            for place, name in enumerate(names):
                values = _means(rows, plot, [name], metric)
                axes.plot(values, [place] * len(values), markersize=3.6, alpha=0.55, **look)
                others = _means(rows, plot, before if metric == "relative_gap" else [name], _TICKS.get(metric, ""))
                axes.plot([np.mean(others)] if others else [], [place] if others else [], markersize=12, **tick)
            plot.dot_rows(axes, names)
            axes.set_title(title)
            axes.grid(visible=True, axis="x")
        grid[0].axvline(0, color=plot.INK, linewidth=0.7, linestyle=(0, (1, 2)), zorder=0)
        plot.legend(figure, keys, columns=2)

    height = 140 + 3 * 17 * len(names) + plot.legend_height(keys, columns=2)
    return plot.Picture(draw_on, height, "what further updates undo of those that they follow")


def _means(rows: Any, plot: Any, names: list[str], metric: str) -> list[float]:
    """Of every model of some names, the mean over matrices and layers, and over seeds."""
    own = plot.alive(plot.pick(rows, method=tuple(names), metric=metric))
    return [plot.of_model(own, model)["mean"].mean() for model in plot.models_of(own)]


SECTION = Section(
    "Does what comes after undo it, or go round it?",
    "beyond the paper",
    "Of every model that was made from a tuned one: how much of the tuning's update its own takes back, how large it "
    "is beside that, which share of its energy lies in the leading directions of that update and in the null space of "
    "the weights before both, where the tick is what a random update has there, and how far safe and unsafe prompts "
    "are apart at their last token, where the tick is what tuned models had before.",
    draw,
    also=(("clusters", "relative_gap"),),
)
ANALYSIS = Analysis(
    Config, measure, about="further", section=SECTION, axes=lambda config: {"matrix": Coordinate("part", MATRICES)}
)
