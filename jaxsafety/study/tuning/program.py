"""The pure programs of tuning a checkpoint: the first state, a chunk of steps, and what a reference says."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import optax
from jax.sharding import Sharding
from jaxtyping import Array, Int

from jaxsafety import keys
from jaxsafety.models import llama, lora
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.models.through import through
from jaxsafety.study.tuning import examples
from jaxsafety.study.tuning.options import TuningConfig
from jaxsafety.training import objective, optim, stepping
from jaxsafety.types import Metrics, Model, Params, PreferenceBatch, TrainState

# (state, frozen parameters, data, steps) to the state after so many steps and their mean metrics.
Chunk = Callable[[TrainState, Params, Any, Int[Array, ""]], tuple[TrainState, Metrics]]


def start(params: Params, config: TuningConfig) -> tuple[TrainState, Params]:
    """Returns the state before the first step, and the parameters that stay as they are.

    What is tuned is an adapter, whose state is its factors alone, or all of ``params`` (shapes, under
    ``jax.eval_shape``), which are then the float32 numbers that updates are added to.
    """
    key, trained, frozen = keys.root(config.seed), params, {}
    if config.lora_rank is not None:
        adapter = keys.stream(key, "init")
        trained = lora.init(params, rank=config.lora_rank, targets=config.lora_targets, key=adapter)
        frozen = params
    return objective.init_state(config.load(), trained, optimizer(config), config.options, key=key), frozen


def optimizer(config: TuningConfig) -> optax.GradientTransformation:
    """Returns AdamW with the study's clipping and schedule, its state in float32."""
    chosen = optim.OptimConfig(warmup=config.warmup, weight_decay=config.weight_decay)
    return optim.make_optimizer(chosen, peak_lr=config.lr, total_steps=config.steps)


def chunk(model: LlamaConfig, config: TuningConfig, *, batches: Sharding | None = None) -> Chunk:
    """Returns what takes steps, on batches drawn inside.

    ``batches`` says where sequences go that are computed on together; None for wherever the parameters are.
    """
    key, method = keys.root(config.seed), config.load()

    def run(state: TrainState, frozen: Params, data: Any, steps: Int[Array, ""]) -> tuple[TrainState, Metrics]:
        own = tuned_model(model, config, frozen, batches=batches)
        step = objective.make_step(
            method, own, optimizer(config), config.options, key=key, total_steps=config.steps, parts=config.accumulate
        )

        def draw(i: Int[Array, ""]) -> PreferenceBatch:
            batch = examples.draw(data, key=keys.stream(key, "tune"), step=i, batch_size=config.batch_size)
            own_key = keys.at_step(keys.stream(key, "method"), i)
            return objective.transformed(method, batch, config.options, key=own_key)

        return stepping.run_steps(step, draw, state, steps=steps)

    return run


def tuned_model(model: LlamaConfig, config: TuningConfig, frozen: Params, *, batches: Sharding | None = None) -> Model:
    """Returns the model as a function of what is tuned of it; see :func:`start` and :func:`chunk`."""
    own = replace(model, compute_dtype=config.dtype, recompute=config.recompute)

    def join(trained: Params) -> Params:
        if config.lora_rank is None:
            return jax.tree.map(lambda leaf: leaf.astype(config.dtype), trained)
        return lora.joined(frozen, trained, scale=config.scale)

    def place(tokens: Array) -> Array:
        return tokens if batches is None else jax.lax.with_sharding_constraint(tokens, batches)

    return through(llama.model(own), join, place=place)


def reference(
    model: LlamaConfig, config: TuningConfig, *, batches: Sharding | None = None
) -> Callable[[Params, Params, PreferenceBatch], Any]:
    """Returns what reads what the method asks of its reference, from what is tuned and what is frozen."""
    method = config.load()

    def run(trained: Params, frozen: Params, batch: PreferenceBatch) -> Any:
        return method.reference(tuned_model(model, config, frozen, batches=batches), trained, batch, config.options)

    return run
