"""The vocabulary of the framework: records, callable contracts and THE axis legend.

Axis legend, the same letters in docstrings, einsum, einops and array annotations:

    s seeds   h hyper-parameter points   l layers   b batch   t tokens   v vocabulary   d model width
    f MLP width   n heads   g key/value heads   k head width   r rank   w window (letters)   m n generic matrix sides
    p q places asked for

Weights are stored ``[in, out]`` (``x @ w``); PyTorch and the paper store ``[out, in]``.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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

# (site, layer, positions [b, t], h [b, t, d]) to what flows on in the place of h; see Model.
Hook = Callable[[str, Int[Array, ""], Int[Array, "b t"], Float[Array, "b t d"]], Float[Array, "b t d"]]


class Output(NamedTuple):
    """What a model says of its inputs.

    Attributes:
        logits: ``[b, t, v]`` float32 in nats, up to a constant per position; ``[b, p, v]`` where places were asked for.
        activations: by site, ``[l, b, t, d]`` float32 (``f`` inside the MLP), ``l`` over the layers asked for, ``q`` in
            the place of ``t`` where positions were asked for.
    """

    logits: Leaf
    activations: dict[str, Leaf]


class Decoder(NamedTuple):
    """How a model reads one token after another; what it keeps in between is its own.

    Attributes:
        begin: ``(params, tokens[b, t], *, mask[b, t], room, edit=None) -> (logits[b, v], state)`` after the last real
            token of every prompt. Padding may stand anywhere. ``room`` is the number of tokens to come.
        extend: ``(params, token[b], *, state, edit=None) -> (logits[b, v], state)`` after one more token of every row;
            NaN for a row that has no place left.
    """

    begin: Callable[..., tuple[Leaf, Any]]
    extend: Callable[..., tuple[Leaf, Any]]


class Model(NamedTuple):
    """All that a method, an attack or an analysis may ask of a causal model; parameters are always an argument.

    ``apply(params, inputs, *, mask=None, at=None, sites=(), layers=None, positions=None, edit=None) -> Output``:

    - ``inputs``: integer tokens ``[b, t]``, or float embeddings ``[b, t, d]`` as ``embed`` returns them.
    - ``mask``: ``[b, t]`` bool, True where a token is real; None is no padding. No real token attends to padding, and
      positions count the real ones.
    - ``at``: ``[b, p]`` indices into ``t``, whose logits alone are computed: the unembedding is most of the cost. NaN
      where out of range. None is every place.
    - ``sites``: names of the activations to return; nothing else is stored. ``layers``: ascending indices, None is all.
      ``positions``: ``[b, q]`` indices into ``t`` (padding counts), None is every one; NaN where out of range.
    - ``edit``: a :data:`Hook`, called once per layer at every site that the model has, in the order of the computation,
      whichever are returned; ``layer`` is a traced int32. What it returns, of the shape and type of ``h``, takes the
      place of ``h`` in the computation and in what is returned. ``positions`` are those of the real tokens, not of
      places. While text is written the hook meets a few positions at a time: it should not mix them.

    ``embed(params, tokens[b, t]) -> [b, t, d]`` float32, before any position is added. ``decoder``: see
    :class:`Decoder`. Non-finite parameters or inputs give non-finite values, never an error.

    Raises:
        Unsupported: the model lacks what is asked for.
        ValueError: inputs of another shape or type, or longer than the model takes; an unknown site, layers that are
            not ascending indices; an edit that changes a shape or type.
    """

    embed: Callable[..., Leaf]
    apply: Callable[..., Output]
    decoder: Decoder


class Unsupported(ValueError):
    """A model was asked for a part of the contract that it does not have."""


# How the lanes of a grid share the devices; see jaxsafety.engine.sweep.
Strategy = Literal["auto", "vmap", "map", "sharded"]
