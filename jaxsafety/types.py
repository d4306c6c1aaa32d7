"""The vocabulary of the framework: records, callable contracts and THE axis legend.

Axis legend, the same letters in docstrings, einsum, einops and array annotations:

    s seeds   h hyper-parameter points   l layers   b batch   t tokens   v vocabulary   d model width
    f MLP width   n heads   g key/value heads   k head width   r rank   w window (letters)   m n generic matrix sides

Weights are stored ``[in, out]`` (``x @ w``); PyTorch and the paper store ``[out, in]``.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
from jaxtyping import Array, Float, Int

Params = dict[str, Any]

# A record's field: an array of the documented shape, or what stands for one (a tracer, jax.eval_shape's struct).
Leaf = Any
Metrics = dict[str, Array]

Forward = Callable[[Params, Int[Array, "b t"]], Float[Array, "b t v"]]
# Embeddings (no positions added) to logits, parameters bound: what soft tokens and sensitivities differentiate.
ForwardEmbeddings = Callable[[Float[Array, "b t d"]], Float[Array, "b t v"]]
Loss = Callable[[Params, Any], tuple[Float[Array, ""], Metrics]]
# (params, part of a batch) to the loss's sum and count, and those of every metric.
Totals = Callable[[Params, Any], tuple[tuple[Array, Array], dict[str, tuple[Array, Array]]]]


@flax.struct.dataclass
class Batch:
    """Sequences prepared for next-token prediction.

    Attributes:
        tokens: ``[b, t]`` int32, model inputs.
        targets: ``[b, t]`` int32, the token that follows each input.
        mask: ``[b, t]`` bool, the positions whose target is scored.
    """

    tokens: Leaf
    targets: Leaf
    mask: Leaf


@flax.struct.dataclass
class PreferenceBatch:
    """Two answers to the same prompts: ``chosen`` is preferred over ``rejected`` (row i answers prompt i)."""

    chosen: Batch
    rejected: Batch


@flax.struct.dataclass
class ReferencedBatch:
    """Pairs of answers with what the reference model says of them, which then need not be in memory.

    Attributes:
        batch: the pairs.
        chosen_logprobs: ``[b, t]`` float32, the reference's log-probability of every target, in nats.
        rejected_logprobs: ``[b, t]`` the same of the other answer.
    """

    batch: PreferenceBatch
    chosen_logprobs: Leaf
    rejected_logprobs: Leaf


@flax.struct.dataclass
class HParams:
    """Traced scalars of one run: a grid point is an array of each, so a grid of them is one compiled program.

    Attributes:
        peak_lr: peak of the learning-rate schedule, > 0.
        weight_chosen: weight on the preferred side (DPO's beta on it; unlearning's w_s; unused by SFT).
        weight_rejected: weight on the dispreferred side (DPO's beta on it; unlearning's w_u).
        p_unsafe: probability in [0, 1] that a prompt (or a whole batch) is an unsafe one.
        ascent_bound: NLL in nats per scored token beyond which gradient ascent stops pushing; ``inf`` for no bound.
    """

    peak_lr: Leaf
    weight_chosen: Leaf
    weight_rejected: Leaf
    p_unsafe: Leaf
    ascent_bound: Leaf


@flax.struct.dataclass
class TrainState:
    """Everything a training run carries: arrays only, no key (the data position *is* ``step``).

    Attributes:
        step: int32, optimiser steps taken.
        params: the parameter tree.
        opt_state: optax state.
        finite: bool, False once a loss or gradient was not finite; the lane is frozen from then on.
    """

    step: Leaf
    params: Params
    opt_state: Any
    finite: Leaf


Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Key = jax.Array

# How the lanes of a grid share the devices; see jaxsafety.sweep.
Strategy = Literal["auto", "vmap", "map", "sharded"]
