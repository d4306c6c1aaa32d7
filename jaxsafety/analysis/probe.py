"""Whether a linear probe on activations tells prompts that should be refused, also where they are written otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety.config.fields import check, static
from jaxsafety.linalg import probes
from jaxsafety.types import Analysis, Coordinate, Key, Measured, Section, View

SITE = "hook_resid_post"
LEARNED = ("plain", "own")
HEADS = {"plain": "learned from plain prompts", "own": "learned from such prompts"}


@dataclass(frozen=True)
class Config:
    """How the probe is fitted.

    Attributes:
        ridge: penalty over the mean variance of the features, above 0.
    """

    ridge: float = static(0.1, above=0)
    __post_init__ = check


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns, by layer, the area under the ROC curve of telling a condition's prompts from safe ones alike.

    These are the prompts of ``NAME_safe`` where there is such a condition, else of the first one. The probe is learned
    at the last token of plain held-out safe and unsafe prompts (``plain``), or of one half of the prompts it is asked
    about, whose other half is counted (``own``).

    References:
        Probes as a defence against covert fine-tuning: arXiv 2508.17158. Fidelity: linear ones, least squares.
    """
    held = view.held[SITE].last
    plain = probes.fit(_joined(held, 0, 1), _labels(held), ridge=config.ridge)
    found = []
    for place in range(1, len(view.conditions)):
        rows, labels = _joined(view.seen[SITE].last, _safe(view.conditions, place), place), _labels(held)
        own = probes.fit(rows[:, ::2], labels[::2], ridge=config.ridge)
        apart = (
            probes.auc(probes.scores(plain, rows), labels),
            probes.auc(probes.scores(own, rows[:, 1::2]), labels[1::2]),
        )
        found.append(jnp.stack(apart))
    return {("auc", "asked learned layer"): jnp.stack(found)}


def _safe(conditions: tuple[str, ...], place: int) -> int:
    """The place of the safe prompts that those of a condition are told from."""
    name = f"{conditions[place]}_safe"
    return conditions.index(name) if name in conditions else 0


def _joined(seen: Float[Array, "l c b d"], safe: int, unsafe: int) -> Float[Array, "l p d"]:
    return jnp.concatenate([seen[:, safe], seen[:, unsafe]], axis=1)


def _labels(seen: Float[Array, "l c b d"]) -> Bool[Array, " p"]:
    return jnp.arange(2 * seen.shape[2]) >= seen.shape[2]


def draw(table: Any, plot: Any) -> Any:
    """The area by layer: a row per model, a column per kind of probe, a curve per condition."""
    rows = plot.needed(plot.pick(table, analysis="probe", metric="auc"), "probe")
    columns = {HEADS[part]: {"part": part} for part in LEARNED}
    styles = plot.condition_styles(plot.conditions_of(rows))
    return plot.model_curves(
        rows, columns, lambda grid: plot.layer_ticks(grid.values()), over="layer", condition=styles,
        x="layer", y="area under the curve", shared={"sharex": True, "sharey": True},
        across=dict.fromkeys(columns, 0.5), name="how well a probe tells prompts that should be refused",
    )  # fmt: skip


SECTION = Section(
    "What a linear probe sees",
    "arXiv 2406.20053, 2508.17158",
    "How often a probe on the last prompt token scores a prompt of a condition above a safe one written alike: 0.5 is "
    "chance, and a probe that was learned from plain prompts sees what is hidden where its curve stays high.",
    draw,
)
ANALYSIS = Analysis(
    Config, measure, reads=(SITE,), section=SECTION, axes=lambda config: {"learned": Coordinate("part", LEARNED)}
)
