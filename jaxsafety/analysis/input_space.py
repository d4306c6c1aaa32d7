"""What an update reacts to: how far it acts on the inputs that prompts of every condition bring (Figure 5).

The maths is :mod:`jaxsafety.linalg.update_spaces`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from einops import rearrange

from jaxsafety import tree
from jaxsafety.config.fields import check, static
from jaxsafety.linalg import update_spaces
from jaxsafety.linalg.masked import averaged
from jaxsafety.types import Analysis, Coordinate, Key, Measured, Section, View

MATRICES = {"gate": "gate matrix", "up": "up matrix", "down": "down matrix"}
# Where the inputs of a GPT's matrices are read.
_INPUTS = {"up": "mlp.hook_in", "down": "mlp.hook_post"}
_ACTIONS = {("gain", "up"): "gain: up", ("gain", "down"): "gain: down", ("ratio", "up"): "ratio: up"}
_GATED_ACTIONS = {("gain", name): f"gain: {name}" for name in MATRICES}


@dataclass(frozen=True)
class Config:
    """Of which directions.

    Attributes:
        directions: leading input directions of the update that projections are written for.
    """

    directions: int = static(16, at_least=1)
    __post_init__ = check


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns how strongly the update of the MLP matrices acts on the inputs that each condition brings."""
    subsets = view.verdicts.subsets[:, :, None, :]
    per_matrix = []
    for name, site in _INPUTS.items():
        before, after = (side["blocks"]["mlp"][name] for side in (view.base, view.params))
        rows = view.seen[site].last
        rank = min(config.directions, *view.base["blocks"]["mlp"]["up"].shape[1:])
        inputs = rearrange(rows, "l c b d -> l (c b) d")
        space = update_spaces.input_space(before, after - before, inputs=inputs, rank=rank)
        by_condition = partial(rearrange, pattern="l (c b) ... -> c l b ...", c=rows.shape[1])
        projected = rearrange(jnp.abs(by_condition(space.projections)), "c l b r -> c l r b")
        measured = {
            ("gain", ""): averaged(by_condition(space.gain)[:, None], subsets),
            ("ratio", ""): averaged(by_condition(space.ratio)[:, None], subsets),
            ("projection", " direction"): averaged(projected[:, None], subsets[:, :, None]),
        }
        per_matrix.append(measured)
    stacked = tree.stack(per_matrix)
    return {(name, f"matrix condition subset layer{axis}"): values for (name, axis), values in stacked.items()}


def draw(table: Any, plot: Any) -> Any:
    """How far the update acts on safe and unsafe activations: gain, ratio and projections (Figure 5).

    On top gain and ratio against layer; below, the deepest layer's projections on the update's input directions, each
    times its singular value.
    """
    rows = plot.pick(table, analysis="input_space", subset="all", condition=tuple(plot.SIDES))
    actions = plot.together(*(plot.pick(rows, metric=metric, part=part) for metric, part in _actions_in(rows)))
    projections = plot.pick(rows, metric="projection", subset="all", part=tuple(MATRICES))
    return plot.stacked(
        [
            (partial(_actions, plot=plot), actions),
            (partial(_projections, plot=plot), plot.pick(projections, layer=projections["layer"].max())),
        ],
        what="input_space",
        name="action of the update on safe and unsafe activations, by layer and by direction",
    )


def _actions_in(rows: Any) -> dict[tuple[str, str], str]:
    return _GATED_ACTIONS if "gate" in rows["part"] else _ACTIONS


def _actions(rows: Any, plot: Any) -> Any:
    """A row per model, a column per metric and matrix."""
    found = set(rows.select("metric", "part").iter_rows())
    actions = {labels: head for labels, head in _actions_in(rows).items() if labels in found}
    columns = {head: {"metric": metric, "part": part} for (metric, part), head in actions.items()}

    def finish(grid: Any) -> None:
        for (_, head), axes in grid.items():
            plot.log_range(axes, plot.pick(rows, **columns[head]))
        for axes in grid.values():
            plot.log_ticks(axes.yaxis, most=3)
        plot.layer_ticks(grid.values())

    return plot.model_curves(
        rows, columns, finish, over="layer", condition=plot.SIDES, x="layer",
        y="gain (log)" if "ratio" not in rows["metric"] else "gain and ratio (log)", shared={"sharey": "col"},
        name="gain and ratio of the update",
    )  # fmt: skip


def _projections(rows: Any, plot: Any) -> Any:
    """A row per method at its largest learning rate, a column per matrix; the rows are of one layer."""
    models, layer = plot.fastest(plot.models_of(rows)), rows["layer"][0]
    found = {part: name for part, name in MATRICES.items() if part in rows["part"]}
    columns = {
        f"{part}, {layer}" if len(found) > plot.WIDE else f"{name}, layer {layer}": {"part": part}
        for part, name in found.items()
    }

    def finish(grid: Any) -> None:
        # Only once all is drawn: a limit ends the scaling of the axes that are shared.
        for axes in grid.values():
            axes.set_ylim(bottom=0)
        plot.layer_ticks(grid.values())

    return plot.model_curves(
        rows, columns, finish, over="strength", condition=plot.SIDES, models=models, shared={"sharey": "col"},
        x="input direction of the update, strongest first", y="weighted projection",
        name="weighted projections on the update's input directions",
    )  # fmt: skip


SECTION = Section(
    "The update on safe and on unsafe prompts",
    "Figure 5",
    "Gain, |a ΔW| / |a|, is how strongly the update answers to an activation, ratio, |a ΔW| / |a W|, the same "
    "beside the answer of the pretrained weights, and below, the gain in the deepest layer is spread over the "
    "update's input directions, each weighted with its singular value: the further unsafe lies above safe, the "
    "more the update is about unsafe prompts.",
    draw,
    claims=("acts_on_unsafe",),
)
ANALYSIS = Analysis(
    Config, measure, about="update", reads=tuple(_INPUTS.values()), section=SECTION,
    axes=lambda config: {"matrix": Coordinate("part", tuple(_INPUTS)), "direction": Coordinate("strength")},
)  # fmt: skip
