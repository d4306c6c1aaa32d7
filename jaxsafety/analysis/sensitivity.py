"""How much a model's first answer token hangs on the prompt: gradient norms and Jacobian norms (Figure 6).

The maths is :mod:`jaxsafety.linalg.sensitivity`, over the embeddings before the last prompt token, as released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsafety.config.fields import check, static
from jaxsafety.linalg import sensitivity
from jaxsafety.linalg.masked import averaged
from jaxsafety.types import Analysis, Coordinate, Key, Measured, Section, Trial, View

# Histograms: decades a bin.
_BIN = 0.2


@dataclass(frozen=True)
class Config:
    """Of how many prompts.

    Attributes:
        prompts: prompts per condition whose gradient norms are taken.
        jacobian_prompts: of these, safe and unsafe ones whose Jacobian norms are, at most ``prompts``.
    """

    prompts: int = static(64, at_least=1)
    jacobian_prompts: int = static(8, at_least=1)

    def __post_init__(self):
        check(self)
        if self.jacobian_prompts > self.prompts:
            raise ValueError(f"jacobian_prompts must be at most prompts ({self.prompts}), got {self.jacobian_prompts}")


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns gradient norms and Jacobian norms per condition."""
    some = jax.tree.map(lambda leaf: leaf[:, : config.prompts], view.trials)
    subsets = view.verdicts.subsets[..., : config.prompts]

    def jacobian(trial: Trial) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
        forward, embeddings, places = _prompts(view, trial)
        found = sensitivity.jacobian_norm(forward, embeddings, **places, key=key)
        return found.value, found.converged

    gradient = jax.lax.map(partial(gradient_norms, view), some)
    classes = jax.tree.map(lambda leaf: leaf[:2, : config.jacobian_prompts], some)
    spectral, converged = jax.lax.map(jacobian, classes)
    kept = jnp.where(subsets, gradient[:, None], jnp.nan)
    return {
        ("gradient_norm", "condition subset"): averaged(gradient[:, None], subsets),
        ("gradient_norm_median", "condition subset"): jnp.nanmedian(kept, axis=-1),
        ("gradient_norm_log", "condition subset"): averaged(jnp.log10(gradient)[:, None], subsets),
        ("jacobian_norm", "class"): averaged(spectral, subsets[:2, 0, : config.jacobian_prompts]),
        ("jacobian_converged", "class"): jnp.mean(converged, axis=1),
        ("histogram", "condition prompt"): jnp.where(subsets[:, 0], gradient, jnp.nan),
    }


def gradient_norms(view: View, trial: Trial) -> Float[Array, " b"]:
    """Returns the gradient norms on prompts of one condition."""
    forward, embeddings, places = _prompts(view, trial)
    return sensitivity.gradient_norm(forward, embeddings, **places)


def _prompts(view: View, trial: Trial) -> tuple[Any, Float[Array, "b t d"], dict[str, Array]]:
    """What a sensitivity is taken of: embeddings without the answer, the place that predicts it, what is varied.

    What comes after the prompt cannot matter to a causal model, and would be half of the work.
    """
    tokens = trial.complied.tokens[:, : view.longest]
    varied = jnp.arange(tokens.shape[1])[None, :] < trial.last[:, None]
    embeddings = view.model.embed(view.params, tokens)
    return lambda e: view.model.apply(view.params, e).logits, embeddings, {"position": trial.last, "prompt": varied}


def finish(found: Measured) -> tuple[Measured, dict[str, Coordinate]]:
    """Puts the norms of single prompts into bins of their decimal logarithm: shares, and the bins' centres."""
    norms = found.pop(("histogram", "condition prompt"))
    shares, bins = _histogram(norms)
    return found | {("histogram", "condition bin"): shares}, {"bin": Coordinate("strength", bins)}


def _histogram(norms: np.ndarray) -> tuple[np.ndarray, tuple[float, ...]]:
    """Shares ``[h, s, c, bin]`` of gradient norms in bins of their decimal logarithm, and the bins' centres."""
    logs = np.log10(np.where(norms > 0, norms, np.nan))
    alive = logs[np.isfinite(logs)]
    if not alive.size:
        return np.zeros((*norms.shape[:-1], 0)), ()
    low, high = int(np.floor(alive.min() / _BIN)), int(np.floor(alive.max() / _BIN)) + 1
    edges = np.arange(low, high + 1) * _BIN
    inside = (logs[..., None] >= edges[:-1]) & (logs[..., None] < edges[1:])
    counts = np.isfinite(norms).sum(-1)[..., None]
    shares = np.divide(inside.sum(-2), counts, out=np.full((*norms.shape[:-1], high - low), np.nan), where=counts > 0)
    return shares, tuple(np.round((edges[:-1] + edges[1:]) / 2, 6).tolist())


def draw(table: Any, plot: Any) -> Any:
    """Histograms of the gradient norm before and after tuning, and means of gradient and Jacobian norm (Figure 6)."""
    rows = plot.pick(table, analysis="sensitivity", subset="all", condition=tuple(plot.SIDES))
    heads = {"gradient_norm": "gradient norm", "jacobian_norm": "Jacobian norm"}
    rows = plot.needed(plot.pick(rows, metric=("histogram", *heads)), "sensitivity")
    histogram, models = plot.pick(rows, metric="histogram"), plot.models_of(rows)
    metrics = [metric for metric in heads if metric in rows["metric"]]
    shown_models = plot.models_of(histogram)
    height = (plot.ROW + 4) * math.ceil(len(plot.flow_slots(shown_models)) / 2) + 34
    dots_height = 76 + 19 * len(models)

    def draw(figure: Any) -> None:
        top, below = figure.subfigures(2, 1, height_ratios=[height, dots_height])
        if shown_models:
            _histograms(top, histogram, plot, shown_models)
        grid = below.subplots(1, max(1, len(metrics)), sharey=True, squeeze=False)[0]
        for axes, metric in zip(grid, metrics, strict=False):
            for side, (condition, style) in enumerate(plot.SIDES.items()):
                for place, model in enumerate(models):
                    shown = plot.pick(plot.of_model(rows, model), condition=condition, metric=metric)
                    plot.draw_dot(axes, plot.dodged(place, side), shown, style=plot.dot(style))
            axes.set_title(heads[metric])
            axes.set_xlabel("mean (log)")
            axes.set_xscale("log")
            axes.set_ylim(len(models) - 0.5, -0.5)
            axes.grid(visible=True, axis="y")
            plot.log_ticks(axes.xaxis, most=4)
        grid[0].set_yticks(range(len(models)), [plot.model_label(model) for model in models])
        plot.legend(figure, plot.SIDE_KEYS, columns=2)

    return plot.Picture(draw, height + dots_height + 22, "sensitivity to the prompt, before and after tuning")


def _histograms(figure: Any, histogram: Any, plot: Any, models: Sequence[Any]) -> None:
    grid = plot.flow_grid(figure, models)
    for model, axes in grid.items():
        for condition, style in plot.SIDES.items():
            line = {name: value for name, value in style.items() if name != "marker"}
            shown = plot.pick(plot.of_model(histogram, model), condition=condition)
            plot.draw_curve(axes, shown, over="strength", style=line, steps=True)
        axes.set_ylim(bottom=0)
    plot.axis_titles(figure, x="gradient norm (log)", y="share of prompts")
    # Bins are logarithms to the base 10.
    for axes in grid.values():
        low, high = axes.get_xlim()
        ticks = range(math.ceil(low), math.floor(high) + 1, max(1, math.ceil((high - low) / 4)))
        axes.set_xticks(ticks, [plot.short(10.0**tick) for tick in ticks])


SECTION = Section(
    "Sensitivity to the prompt",
    "Figure 6",
    "The further right, the more the model's first answer token hangs on small changes of the prompt; compare a "
    "tuned model with the pretrained one, and safe with unsafe prompts within it.",
    draw,
    claims=("sensitivity_unsafe", "sensitivity_safe"),
)
ANALYSIS = Analysis(Config, measure, finish=finish, section=SECTION)
