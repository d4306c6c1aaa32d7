"""Chunks of pretraining of several seeds under every seed strategy, batches drawn inside the program as in a real run.

Unlike a real run nothing is donated: every round starts from the same state. The accuracy column compares every lane's
loss, the mean over the chunk's steps, with that of ``map``. One seed also trains with products of bfloat16 factors.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import cases, gemm, harness
from benchmarks.cases import TrainCase
from benchmarks.harness import Program
from jaxsafety import keys, losses
from jaxsafety.engine import sweep
from jaxsafety.recipe.schema import Recipe
from jaxsafety.study import lanes
from jaxsafety.training import answers, stepping
from jaxsafety.types import Batch, HParams, Key, Metrics, Model, Opened, Params, Strategy, Terms, TrainState

COLUMNS = {
    "name": "case", "seeds": "seeds", "strategy": "strategy", "items_per_s": "seed-steps/s",
    "sequences_per_s": "sequences/s", "median_ms": "median ms", "p10_ms": "p10", "p90_ms": "p90",
    "lower_ms": "lower ms", "compile_ms": "compile ms", "peak_mb": "peak MB", "gflops_per_s": "GFLOP/s",
    "of_peak": "of peak", "seed_mb": "MB a seed",
    "speedup": "vs map", "speedup_p10": "p10", "speedup_p90": "p90", "loss_error": "loss error",
}  # fmt: skip

_STEPS_OF_THE_RUN = 1000  # the schedule's length; beyond what is run


def run() -> Iterator[dict[str, Any]]:
    """Yields a row for each case, seed count and strategy."""
    peak = max(record.gflops_per_s for _, record in gemm.records())
    for case in cases.TRAIN:
        recipe = recipe_of(case)
        gflop = _step_gflop(recipe, opened(recipe))
        for seeds in case.seed_counts:
            yield from _rows(case, recipe, seeds=seeds, gflop=gflop, peak=peak)


def recipe_of(case: TrainCase) -> Recipe:
    """Returns the case as a recipe of a single model."""
    return Recipe(
        subject={"world": case.world, "model": {"preset": case.preset, "positions": case.positions}},
        models={
            "pretrained": {
                "method": "pretrain",
                "steps": _STEPS_OF_THE_RUN,
                "batch_size": case.batch_size,
                "chunk_steps": case.steps,
                "data": {"pool": "text"},
                "optim": {"algorithm": case.algorithm},
            }
        },
    )


# What training computes in, keeps its activations in, and attends with, by name.
TYPES = {
    "float32": {},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "bfloat16 stored": {"compute_dtype": "bfloat16", "stored_dtype": "bfloat16"},
    "bfloat16 stored, fused": {"compute_dtype": "bfloat16", "stored_dtype": "bfloat16", "attention": "fused"},
}


def opened(recipe: Recipe, **model: Any) -> Opened:
    """Returns the recipe's subject, opened; ``model`` are other values of fields of its models."""
    own = recipe.subject.options
    return recipe.subject.load().open(replace(own, model=replace(own.model, **model)))


def strategies(seeds: int) -> tuple[Strategy, ...]:
    """Returns the strategies that differ for so many seeds here: one share cannot be split over devices."""
    split = sweep.shard_count(seeds, jax.device_count()) > 1
    return tuple(s for s in cases.STRATEGIES if s != "sharded" or split)


def _rows(case: TrainCase, recipe: Recipe, *, seeds: int, gflop: float | None, peak: float) -> Iterator[dict[str, Any]]:
    subject = opened(recipe)
    start = start_state(recipe, subject, seeds=seeds)
    items = seeds * case.steps
    work = None if gflop is None else gflop * items
    programs = [lane_program(recipe, subject, start, strategy=s, items=items, gflop=work) for s in strategies(seeds)]
    if seeds == 1:
        for name in ("bfloat16", "bfloat16 stored"):
            half = opened(recipe, **TYPES[name])
            program = lane_program(recipe, half, start, strategy="map", items=items, gflop=work)
            programs.append(replace(program, name=f"map, {name}"))
    results = harness.race(programs, rounds=case.rounds)
    baseline, (_, expected) = results[0]
    for record, (_, metrics) in results:
        ratio = harness.speedup(record, over=baseline)
        yield asdict(record) | {
            "name": case.name, "strategy": record.name, "seeds": seeds, "batch_size": case.batch_size,
            "sequences_per_s": record.items_per_s * case.batch_size, "speedup": ratio.median,
            "speedup_p10": ratio.p10, "speedup_p90": ratio.p90,
            "of_peak": record.gflops_per_s and record.gflops_per_s / peak,
            "seed_mb": record.peak_mb and record.peak_mb * _devices(record.name, seeds) / seeds,
            "loss_error": harness.max_relative_error(metrics["loss"], expected["loss"]),
        }  # fmt: skip


def _devices(strategy: str, seeds: int) -> int:
    return sweep.shard_count(seeds, jax.device_count()) if strategy == "sharded" else 1


def lane_program(
    recipe: Recipe, subject: Opened, start: TrainState, *, strategy: Strategy, items: int, gflop: float | None
) -> Program:
    """Compiles a chunk of the recipe's pretraining for the seeds of ``start``; ``items`` and ``gflop`` of one call."""
    seeds = start.step.shape[1]
    states = jax.device_put(start, sweep.seed_sharding(strategy, seeds=seeds, axis=1))
    per_seed = jax.device_put(first_seeds(recipe, seeds), sweep.seed_sharding(strategy, seeds=seeds, axis=0))
    (lane,) = recipe.lanes
    fn = sweep.over_lanes(lanes.train_chunk(lambda _: subject, lane), strategy, seeds=seeds, per_lane=2)
    return harness.compile_program(
        fn,
        (states, {}, per_seed, points(recipe), jnp.int32(lane.training.chunk_steps)),
        name=strategy,
        items=items,
        gflop=gflop,
    )


def start_state(recipe: Recipe, subject: Opened, *, seeds: int) -> TrainState:
    """Returns the states ``[1, s]`` before the first step."""

    def init(_: Any, key: jax.Array, point: HParams) -> TrainState:
        params = lanes.init_params(subject, key=key)
        return lanes.init_state(recipe.lanes[0].training, {"parent": params}, key=key, point=point)

    program = jax.jit(sweep.over_lanes(init, "map", seeds=seeds))
    return program(jnp.zeros((1, seeds)), first_seeds(recipe, seeds).root, points(recipe))


def first_seeds(recipe: Recipe, seeds: int) -> lanes.Seed:
    """Returns the first seeds ``[s]``, as the recipe's pretraining takes them."""
    return jax.vmap(lambda seed: lanes.seed(recipe.lanes[0], keys.root(seed), seed))(jnp.arange(seeds))


def points(recipe: Recipe) -> HParams:
    """Returns the traced scalars ``[1]`` of the recipe's pretraining."""
    return HParams(peak_lr=jnp.full((1,), recipe.lanes[0].training.lr, jnp.float32))


def draw_batch(recipe: Recipe, subject: Opened, *, key: Key, step: jax.Array) -> Batch:
    """Draws the examples of one step of the recipe's pretraining; ``key`` is the stream's."""
    training = recipe.lanes[0].training
    return lanes.examples(subject.source, training, HParams(peak_lr=training.lr), key=key, step=step)


def totals_of(model: Model) -> stepping.Totals:
    """Returns what pretraining sums over a batch, as :func:`jaxsafety.training.stepping.make_gradient` takes it."""

    def totals(params: Params, batch: Batch, aux: Any, **_: Any) -> tuple[Terms, Terms]:
        return answers.next_token(model, params, batch)

    return totals


def mean_loss(totals: stepping.Totals) -> Callable[[Params, Batch], tuple[jax.Array, Metrics]]:
    """Returns the loss of a whole batch and the means of its metrics: what a step differentiates."""

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        terms, metrics = totals(params, batch, {})
        return losses.quotient(*terms["nll"]), {name: losses.quotient(*own) for name, own in metrics.items()}

    return loss


def _step_gflop(recipe: Recipe, subject: Opened) -> float | None:
    """XLA's count of the loss and its gradient on one batch: the model's work, without optimiser and sampler."""
    params = jax.eval_shape(lambda: lanes.init_params(subject, key=keys.root(0)))
    batch = jax.eval_shape(lambda: draw_batch(recipe, subject, key=keys.root(0), step=jnp.int32(0)))
    loss = mean_loss(totals_of(subject.model))
    return harness.count_gflop(jax.value_and_grad(loss, has_aux=True), (params, batch))
