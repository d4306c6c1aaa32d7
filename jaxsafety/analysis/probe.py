"""Whether a linear probe on activations tells prompts that should be refused, also where they are written otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsafety.config.fields import check, static
from jaxsafety.linalg import probes
from jaxsafety.types import RESIDUAL, Analysis, Coordinate, Key, Measured, Section, View

LEARNED = ("plain", "own")
HEADS = {"plain": "a plain probe", "own": "one of its own"}


@dataclass(frozen=True)
class Config:
    """How the probe is fitted.

    Attributes:
        ridge: penalty over the mean variance of the features, above 0.
    """

    ridge: float = static(0.1, above=0)
    __post_init__ = check


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns, by layer, the area under the ROC curve of telling a condition's prompts from safe ones written alike.

    These are the first condition for the second, and ``NAME_safe`` for ``NAME``; a condition without them is NaN. The
    probe is learned at the last token of plain held-out safe and unsafe prompts (``plain``), or of one half of the
    prompts it is asked about, whose other half is counted (``own``).

    References:
        Probes as a defence against covert fine-tuning: arXiv 2508.17158. Fidelity: linear ones, least squares.
    """
    held = view.held[RESIDUAL].last
    plain = probes.fit(_joined(held, 0, 1), _labels(held), ridge=config.ridge)
    found = [_areas(view.seen[RESIDUAL].last, pair, plain, config) for pair in _pairs(view.conditions)]
    return {("auc", "asked learned layer"): jnp.stack(found)}


def _pairs(conditions: tuple[str, ...]) -> list[tuple[int, int] | None]:
    """Of every condition but the first the places of safe prompts that are written alike, and of its own."""
    partners = {conditions[1]: 0} | {
        name.removesuffix("_safe"): place for place, name in enumerate(conditions) if name.endswith("_safe")
    }
    return [(partners[name], place) if name in partners else None for place, name in enumerate(conditions) if place]


def _areas(
    seen: Float[Array, "l c b d"], pair: tuple[int, int] | None, plain: probes.Probe, config: Config
) -> Float[Array, "learned l"]:
    if pair is None:
        return jnp.full((len(LEARNED), seen.shape[0]), jnp.nan)
    rows, labels = _joined(seen, *pair), _labels(seen)
    # Two prompts of one text, one safe and one not, are in one half.
    half = np.tile(np.arange(seen.shape[2]) % 2 == 0, 2)
    own = probes.fit(rows[:, half], labels[half], ridge=config.ridge)
    return jnp.stack(
        [
            probes.auc(probes.scores(plain, rows), labels),
            probes.auc(probes.scores(own, rows[:, ~half]), labels[~half]),
        ]
    )


def _joined(seen: Float[Array, "l c b d"], safe: int, unsafe: int) -> Float[Array, "l p d"]:
    return jnp.concatenate([seen[:, safe], seen[:, unsafe]], axis=1)


def _labels(seen: Float[Array, "l c b d"]) -> Bool[Array, " p"]:
    return jnp.arange(2 * seen.shape[2]) >= seen.shape[2]


def draw(table: Any, plot: Any) -> Any:
    """The area by layer: a row per model, a column per kind of probe, a curve per condition."""
    rows = plot.needed(plot.alive(plot.pick(table, analysis="probe", metric="auc")), "probe")
    columns = {HEADS[part]: {"part": part} for part in LEARNED}
    styles = plot.condition_styles(plot.conditions_of(rows))
    keys = {f"{name} prompts": style for name, style in styles.items()}
    return plot.model_curves(
        rows, columns, lambda grid: plot.layer_ticks(grid.values()), over="layer", condition=styles, keys=keys,
        x="layer", y="area under the curve", shared={"sharex": True, "sharey": True},
        across=dict.fromkeys(columns, 0.5), name="how well a probe tells prompts that should be refused",
    )  # fmt: skip


SECTION = Section(
    "What a linear probe sees",
    "arXiv 2406.20053, 2508.17158",
    "How often a probe on the last prompt token scores a prompt of a condition above a safe one written alike, a probe "
    "that was learned from plain prompts and one from other prompts of the condition: 0.5 is chance.",
    draw,
)
ANALYSIS = Analysis(
    Config, measure, reads=(RESIDUAL,), section=SECTION, axes=lambda config: {"learned": Coordinate("part", LEARNED)}
)
