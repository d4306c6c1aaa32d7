"""Safe and unsafe prompts as clusters of MLP activations: which mean every condition lies nearer to (Figure 3).

The maths is :mod:`jaxsafety.linalg.clusters`. Of every kind of vector (at the last prompt token, averaged over the
first answer tokens, and of these the first d neurons alone) the means are those of held-out prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import tree
from jaxsafety.linalg import clusters
from jaxsafety.linalg.masked import averaged
from jaxsafety.types import Analysis, Coordinate, Key, Measured, Section, Seen, View

VECTORS = ("last", "response", "response_d")
POSITIONS = {"last": "last prompt token", "response": "first answer tokens"}


@dataclass(frozen=True)
class Config:
    """It has no options."""


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns where every condition lies between the means, and how well safe and unsafe are apart."""
    width = view.seen["mlp.hook_in"].last.shape[-1]
    seen, held = (_vectors(side["mlp.hook_post"], width) for side in (view.seen, view.held))
    first = jnp.any(view.held_out.blocks[..., 0, :] & view.held_out.complied.mask, axis=-1)
    per_vector = []
    for name in VECTORS:
        safe, unsafe = held[name].swapaxes(0, 1)
        means = clusters.centroids(safe, unsafe, safe_weights=first[0], unsafe_weights=first[1])
        per_vector.append(_measured(seen[name].swapaxes(0, 1), view.verdicts.subsets, means))
    return {(metric, f"vector {axes}".strip()): values for (metric, axes), values in tree.stack(per_vector).items()}


def _vectors(seen: Seen, width: int) -> dict[str, Float[Array, "l c b _"]]:
    return {"last": seen.last, "response": seen.response, "response_d": seen.response[..., :width]}


def _measured(
    activations: Float[Array, "c l b f"], subsets: Bool[Array, "c 2 b"], means: clusters.Centroids
) -> Measured:
    def condition(given: tuple[Array, Array]) -> dict[str, Float[Array, "2 l"]]:
        rows, weights = given[0], given[1][:, None, :]
        tau = clusters.tau(rows, means)
        mean = averaged(tau[None], weights)
        return {
            "tau": mean,
            "tau_std": jnp.sqrt(averaged((tau[None] - mean[..., None]) ** 2, weights)),
            "relative_tau": averaged(clusters.relative_tau(rows, means)[None], weights),
            "cosine_tau": averaged(clusters.tau(rows, means, form="cosine")[None], weights),
            "nearest_safe": averaged((tau > 0).astype(jnp.float32)[None], weights),
        }

    metrics = jax.lax.map(condition, (activations, subsets))
    named = {(name, "condition subset layer"): values for name, values in metrics.items()}
    classes, weights = activations[:2], subsets[:2, 0]
    shares = jax.vmap(lambda rows, kept: clusters.leading_share(rows, weights=kept))(classes, weights)
    named |= {
        (name, "class layer"): share for name, share in zip(("leading_share", "leading_energy"), shares, strict=True)
    }
    taus = [clusters.tau(rows, means) for rows in classes]
    apart = clusters.separation(*taus, centroids=means, safe_weights=weights[0], unsafe_weights=weights[1])
    fields = ("gap", "effect_size", "relative_gap", "accuracy", "distance")
    return named | {(name, "layer"): getattr(apart, name) for name in fields}


def draw(table: Any, plot: Any) -> Any:
    """Relative tau of safe and unsafe prompts, and how nearly each cluster is one direction, by layer (Figure 3)."""
    rows = plot.pick(table, analysis="clusters", subset="all", condition=tuple(plot.SIDES))
    shares = plot.pick(rows, metric="leading_share")
    return plot.stacked(
        [
            (partial(_taus, plot=plot), plot.pick(rows, metric="relative_tau", part=tuple(POSITIONS))),
            (partial(_leading_shares, plot=plot), plot.pick(shares, part=plot.features_of(shares))),
        ],
        what="clusters",
        name="clusters of safe and unsafe activations, by layer",
    )


def _taus(rows: Any, plot: Any) -> Any:
    """A row per model, a column per position."""
    columns = {head: {"part": part} for part, head in POSITIONS.items() if part in rows["part"]}

    return plot.model_curves(
        rows, columns, lambda grid: plot.layer_ticks(grid.values()), over="layer", condition=plot.SIDES,
        x="layer", y="relative τ (nearer to safe: up)", shared={"sharex": True, "sharey": True},
        across=dict.fromkeys(columns, 0.0), name="relative tau of safe and unsafe activations",
    )  # fmt: skip


def _leading_shares(rows: Any, plot: Any) -> Any:
    """A panel per side, with a curve per method at its largest learning rate beside the pretrained model's."""
    styles = plot.model_styles(plot.fastest(plot.models_of(rows)))
    columns = {f"leading share: {one}": {"condition": one} for one in plot.SIDES if one in rows["condition"]}

    def draw(figure: Any) -> None:
        grid = plot.layer_strip(figure, rows, columns, sharey=True, model=styles)
        grid[0].set_ylim(bottom=0)
        grid[0].set_ylabel("s₁ / Σ s")
        plot.legend(figure, plot.model_keys(styles), columns=2)

    height = 150 + plot.legend_height(plot.model_keys(styles), columns=2)
    return plot.Picture(draw, height, "share of the leading singular value of safe and of unsafe activations")


SECTION = Section(
    "Clusters of safe and unsafe activations",
    "Figure 3",
    "τ is how much nearer an activation lies to the mean of safe prompts than to that of unsafe ones, here as a "
    "share of the distance between the two means: the further the curves part, the cleaner the two clusters; "
    "below, the leading singular value's share of a cluster's spectrum is 1 where its activations lie on one line.",
    draw,
    claims=tuple(f"clusters_{name}" for name in ("separate", "deepen", "rate", "dpo", "unlearn", "low_rank")),
)
ANALYSIS = Analysis(
    Config, measure, reads=("mlp.hook_in", "mlp.hook_post"), section=SECTION,
    axes=lambda config: {"vector": Coordinate("part", VECTORS)},
)  # fmt: skip
