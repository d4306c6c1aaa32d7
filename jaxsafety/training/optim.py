"""Optimisers and schedules whose peak learning rate is traced: a unit schedule times the peak.

Per-layer matrices, an adapter's factors among them, are stacked ``[l, in, out]``; Muon orthogonalises each layer's
matrix on its own, and Adam takes embeddings, norms and biases. Clipping is by the global norm of one seed's gradient,
so it belongs inside the lane.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon

from jaxsafety import tree
from jaxsafety.config.fields import check, static
from jaxsafety.types import Params

Algorithm = Literal["adamw", "muon"]


@dataclass(frozen=True)
class OptimConfig:
    """An optimiser without its peak learning rate.

    Attributes:
        algorithm: ``adamw``, or ``muon`` (matrices by Muon, the rest by Adam).
        warmup: fraction of the run over which the rate rises linearly from 0; where that is less than a step, none.
        decay_end: fraction of the run at which the cosine reaches its floor; constant after it.
        floor: final rate over peak rate, in [0, 1].
        clip_norm: global gradient norm above which a gradient is scaled down; ``inf`` never clips.
        weight_decay: decoupled decay of the blocks' matrices, with AdamW also of the unembedding.
        b1, b2: Adam's moment decays.
        momentum: Muon's momentum.
        adam_scale: rate of Muon's Adam part over Muon's.

    Fidelity: defaults of ``b1``, ``b2``, ``weight_decay`` are the paper's.
    """

    algorithm: Algorithm = "adamw"
    warmup: float = static(0.1, at_least=0)
    decay_end: float = static(1.0, at_most=1)
    floor: float = static(0.01, at_least=0, at_most=1)
    clip_norm: float = static(1.0, above=0, infinite=True)
    weight_decay: float = static(1e-4, at_least=0, infinite=True)
    b1: float = static(0.9, at_least=0, below=1)
    b2: float = static(0.95, at_least=0, below=1)
    momentum: float = static(0.95, at_least=0, below=1)
    adam_scale: float = static(0.25, above=0, infinite=True)

    def __post_init__(self):
        check(self, prefix="optim.")
        if not self.warmup < self.decay_end:
            raise ValueError(
                f"optim needs 0 <= warmup < decay_end <= 1, got warmup {self.warmup}, decay_end {self.decay_end}"
            )


def unit_schedule(config: OptimConfig, *, total_steps: int) -> Callable[[int | Int[Array, ""]], Float[Array, ""]]:
    """Returns the schedule with peak 1: linear warm-up from 0, cosine to ``floor``, then constant."""
    warmup, end = config.warmup * total_steps, config.decay_end * total_steps
    # Of less than a step it would be a rate of 0 alone: a run of one step would change nothing.
    warmup = warmup if warmup >= 1 else 0.0

    def schedule(step: int | Int[Array, ""]) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / (end - warmup), 0.0, 1.0)
        cosine = config.floor + (1 - config.floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, step / max(warmup, 1.0), cosine)

    return schedule


def is_layer_matrix(path: str) -> bool:
    """Whether a parameter is a stack of per-layer weight matrices, ``[l, in, out]``, or of an adapter's factors."""
    return re.fullmatch(f"{tree.MATRICES}(_lora_[ab])?", path) is not None


def make_optimizer(
    config: OptimConfig, *, peak_lr: float | Float[Array, ""], total_steps: int
) -> optax.GradientTransformation:
    """Returns clipping and the optimiser for a run of ``total_steps``; ``peak_lr`` > 0 may be traced."""
    unit = unit_schedule(config, total_steps=total_steps)

    def rate(step: Int[Array, ""]) -> Float[Array, ""]:
        return peak_lr * unit(step)

    def decayed(params: Params) -> Params:
        return tree.label(params, lambda path, _: path == "unembed" or is_layer_matrix(path))

    moments = {"b1": config.b1, "b2": config.b2}
    updates = {
        "adamw": partial(optax.adamw, rate, **moments, mask=decayed),
        "muon": partial(
            muon,
            rate,
            beta=config.momentum,
            **{f"adam_{name}": value for name, value in moments.items()},
            adam_learning_rate=lambda step: config.adam_scale * rate(step),
            muon_weight_dimension_numbers=_layer_matrices,
        ),
    }
    update = updates[config.algorithm](weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _layer_matrices(params: Params) -> Params:
    # By path alone: optax calls this on masked trees too, whose leaves are no arrays.
    layer_stack = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return tree.label(params, lambda path, _: layer_stack if is_layer_matrix(path) else None)
