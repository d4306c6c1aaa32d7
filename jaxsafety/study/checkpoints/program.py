"""The pure programs of tuning a checkpoint: the first state, a chunk of steps, and what a reference says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding
from jaxtyping import Array, Int

from jaxsafety import keys
from jaxsafety.models import llama, lora
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.models.through import through
from jaxsafety.study.checkpoints.job import Job
from jaxsafety.training import objective, optim, stepping
from jaxsafety.types import HParams, Key, Metrics, Model, Params, PreferenceBatch, TrainState

# (state, frozen parameters, data, own, steps) to the state after so many steps and their mean metrics.
Chunk = Callable[[TrainState, Params, Any, "Own", Int[Array, ""]], tuple[TrainState, Metrics]]


class Own(NamedTuple):
    """What tells the seeds and points that one program trains: the root key, that of the examples, and the scalars."""

    root: Key
    stream: Key
    point: HParams


def own(job: Job) -> Own:
    """Returns what a job has of its own."""
    scalars = jax.tree.map(jnp.float32, job.how.scalars)
    return Own(job.root, job.stream, HParams(peak_lr=jnp.float32(job.how.lr), **scalars))


def start(params: Params, job: Job) -> tuple[TrainState, Params]:
    """Returns the state before the first step, and the parameters that stay as they are.

    What is tuned is an adapter, whose state is its factors alone, or all of ``params`` (shapes, under
    ``jax.eval_shape``), which are then the float32 numbers that updates are added to.
    """
    trained, frozen = params, {}
    if not job.is_full:
        adapter = keys.stream(job.root, "init")
        trained = lora.init(params, rank=job.adapter.rank, targets=job.adapter.targets, key=adapter)
        frozen = params
    optimizer_ = optimizer(job, own(job).point)
    return objective.init_state(job.method, trained, optimizer_, job.how.options, key=job.root), frozen


def optimizer(job: Job, point: HParams) -> optax.GradientTransformation:
    """Returns the optimiser of the training, its state in float32."""
    return optim.make_optimizer(job.how.optim, peak_lr=point.peak_lr, total_steps=job.how.steps)


def chunk(model: LlamaConfig, job: Job, *, batches: Sharding | None = None) -> Chunk:
    """Returns what takes steps, on batches drawn inside.

    ``batches`` says where sequences go that are computed on together; None for wherever the parameters are.
    """
    how, method = job.how, job.method

    def run(
        state: TrainState, frozen: Params, data: Any, own: Own, steps: Int[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        options = how.at_point(own.point)
        tuned = tuned_model(model, job, frozen, own.point, batches=batches)
        step = objective.make_step(
            method, tuned, optimizer(job, own.point), options, key=own.root, total_steps=how.steps, parts=how.accumulate
        )
        pool = partial(how.data.load().draw, data, how.data.options, key=own.stream, total_steps=how.steps)

        def draw(i: Int[Array, ""]) -> PreferenceBatch:
            own_key = keys.at_step(keys.stream(own.root, "method"), i)
            return objective.transformed(method, pool(step=i, batch_size=how.batch_size), options, key=own_key)

        return stepping.run_steps(step, draw, state, steps=steps)

    return run


def tuned_model(
    model: LlamaConfig, job: Job, frozen: Params, point: HParams, *, batches: Sharding | None = None
) -> Model:
    """Returns the model as a function of what is tuned of it; see :func:`start` and :func:`chunk`."""
    about = job.about
    config = replace(model, compute_dtype=about.dtype, stored_dtype=about.stored_dtype, recompute=about.recompute)

    def join(trained: Params) -> Params:
        if job.is_full:
            return jax.tree.map(lambda leaf: leaf.astype(job.about.dtype), trained)
        return lora.joined(frozen, trained, scale=point.parts["alpha"] / job.adapter.rank)

    def place(tokens: Array) -> Array:
        return tokens if batches is None else jax.lax.with_sharding_constraint(tokens, batches)

    return through(llama.model(config), join, place=place)


def reference(
    model: LlamaConfig, job: Job, *, batches: Sharding | None = None
) -> Callable[[Params, Params, PreferenceBatch], Any]:
    """Returns what reads what the method asks of its reference, from what is tuned and what is frozen."""
    point = own(job).point

    def run(trained: Params, frozen: Params, batch: PreferenceBatch) -> Any:
        read = tuned_model(model, job, frozen, point, batches=batches)
        return job.method.reference(read, trained, batch, job.how.options)

    return run
