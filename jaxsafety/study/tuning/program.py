"""The pure programs of tuning a checkpoint: the first state, a chunk of steps, and the log-probs of a reference."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int

from jaxsafety import keys, losses
from jaxsafety.methods import totals
from jaxsafety.models import llama, lora
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.study.tuning import examples
from jaxsafety.study.tuning.options import TuningConfig
from jaxsafety.training import optim, stepping
from jaxsafety.types import Batch, Forward, HParams, Metrics, Params, Totals, TrainState

# (state, frozen parameters, data, steps) to the state after so many steps and their mean metrics.
Chunk = Callable[[TrainState, Params, Any, Int[Array, ""]], tuple[TrainState, Metrics]]


def start(params: Params, config: TuningConfig) -> tuple[TrainState, Params]:
    """Returns the state before the first step, and the parameters that stay as they are.

    Args:
        params: of the model, or their shapes under ``jax.eval_shape``.
        config: what is tuned: an adapter, whose state is its factors alone, or all of ``params``, which are then the
            float32 numbers that updates are added to.
    """
    if config.lora_rank is None:
        return stepping.init_state(params, optimizer(config)), {}
    key = keys.stream(keys.root(config.seed), "init")
    adapter = lora.init(params, rank=config.lora_rank, targets=config.lora_targets, key=key)
    return stepping.init_state(adapter, optimizer(config)), params


def optimizer(config: TuningConfig) -> optax.GradientTransformation:
    """Returns AdamW with the study's clipping and schedule, its state in float32."""
    chosen = optim.OptimConfig(warmup=config.warmup, weight_decay=config.weight_decay)
    return optim.make_optimizer(chosen, peak_lr=config.lr, total_steps=config.steps)


def chunk(model: LlamaConfig, config: TuningConfig, *, batches: Sharding | None = None) -> Chunk:
    """Returns what takes steps, on batches drawn inside.

    Args:
        model: the checkpoint's.
        config: how it is tuned.
        batches: where sequences go that are computed on together; None for wherever the parameters are.
    """
    key = keys.stream(keys.root(config.seed), "tune")

    def run(state: TrainState, frozen: Params, data: Any, steps: Int[Array, ""]) -> tuple[TrainState, Metrics]:
        objective = _objective(forward(model, config, frozen, batches=batches), config)
        step = stepping.make_gradient_step(stepping.accumulated(objective, parts=config.accumulate), optimizer(config))

        def draw(step: Int[Array, ""]) -> Any:
            return examples.draw(data, key=key, step=step, batch_size=config.batch_size)

        return stepping.run_steps(step, draw, state, steps=steps)

    return run


def forward(model: LlamaConfig, config: TuningConfig, frozen: Params, *, batches: Sharding | None = None) -> Forward:
    """Returns the model as a function of what is tuned of it; see :func:`start` and :func:`chunk`."""
    own = replace(model, compute_dtype=config.dtype, recompute=config.recompute)

    def run(trained: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        if batches is not None:
            tokens = jax.lax.with_sharding_constraint(tokens, batches)
        if config.lora_rank is None:
            params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), trained)
        else:
            params = lora.joined(frozen, trained, scale=config.scale)
        return llama.apply(params, tokens, config=own).logits

    return run


def logprobs(
    model: LlamaConfig, config: TuningConfig, *, batches: Sharding | None = None
) -> Callable[[Params, Params, Batch], Float[Array, "b t"]]:
    """Returns what reads the log-probability of every target of a batch, from what is tuned and what is frozen."""

    def run(trained: Params, frozen: Params, batch: Batch) -> Float[Array, "b t"]:
        logits = forward(model, config, frozen, batches=batches)(trained, batch.tokens)
        return losses.token_logprobs(logits, batch.targets)

    return run


def _objective(forward: Forward, config: TuningConfig) -> Totals:
    if config.method == "sft":
        return totals.next_token(forward)
    hparams = HParams(
        peak_lr=config.lr,
        weight_chosen=config.weight_chosen,
        weight_rejected=config.weight_rejected,
        p_unsafe=1.0,
        ascent_bound=jnp.float32(config.ascent_bound),
    )
    make = {"dpo": totals.dpo, "unlearn": totals.unlearn}[config.method]
    return partial(make, hparams=hparams, reduction=config.reduction)(forward)
