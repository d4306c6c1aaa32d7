"""One run of a recipe as pure functions of a single lane: initialise, a chunk of pretraining or tuning, evaluate.

A lane is one seed at one hyper-parameter point. Nothing here knows of the grid, jit, devices or disk; the outer layer
maps these over ``[h, s]``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import keys, objectives, optim, train, world
from jaxsafety.models import gpt
from jaxsafety.recipe import MethodConfig, Recipe
from jaxsafety.types import Forward, HParams, Key, Loss, Metrics, Params, TrainState
from jaxsafety.world import World

Chunk = Callable[[TrainState, Any, HParams], tuple[TrainState, Metrics]]

# Read-out steps of the learning curves live far above those of the final table, in the same stream.
_PROBE_OFFSET = 1 << 20


def forward_of(recipe: Recipe, world: World) -> Forward:
    """Returns the model's forward pass with its static configuration bound."""
    return partial(gpt.forward, config=recipe.model.build(world))


def init_params(recipe: Recipe, world: World, *, key: Key) -> Params:
    """Returns fresh parameters from the seed's root key."""
    return gpt.init(recipe.model.build(world), key=keys.stream(key, "init"))


def pretrain_optimizer(recipe: Recipe, point: HParams) -> optim.optax.GradientTransformation:
    """Returns the optimiser of the pretraining stage at one hyper-parameter point."""
    return optim.make_optimizer(recipe.pretrain.optim, peak_lr=point.peak_lr, total_steps=recipe.pretrain.steps)


def tune_optimizer(recipe: Recipe, point: HParams) -> optim.optax.GradientTransformation:
    """Returns the optimiser of the tuning stage at one hyper-parameter point."""
    return optim.make_optimizer(recipe.tune.optim, peak_lr=point.peak_lr, total_steps=recipe.tune.steps)


def pretrain_chunk(recipe: Recipe, world_: World) -> Chunk:
    """Returns ``(state, root key, point) -> (state, chunk means and read-out)`` of pretraining."""
    config = recipe.pretrain
    forward = forward_of(recipe, world_)

    def chunk(state: TrainState, key: Key, point: HParams) -> tuple[TrainState, Metrics]:
        draw = partial(
            world.pretrain_batch_at, world_, config.mixture, key=keys.stream(key, "pretrain"),
            total_steps=config.steps, batch_size=config.batch_size,
        )  # fmt: skip
        step = train.make_step(objectives.next_token(forward), pretrain_optimizer(recipe, point))
        state, metrics = train.scan_steps(step, lambda i: draw(step=i), state, steps=config.chunk_steps)
        return state, _means(metrics) | probe(recipe, world_, state, key=key)

    return chunk


def tune_chunk(recipe: Recipe, world_: World, method: MethodConfig) -> Chunk:
    """Returns ``(state, (root key, reference params), point) -> (state, chunk means and read-out)`` of a method."""
    config = recipe.tune
    forward = forward_of(recipe, world_)

    def chunk(state: TrainState, per_seed: tuple[Key, Params], point: HParams) -> tuple[TrainState, Metrics]:
        key, reference = per_seed
        draw = partial(
            world.tune_batch_at, world_, key=keys.stream(key, "tune"), batch_size=config.batch_size,
            p_unsafe=point.p_unsafe, mix=config.mix,
        )  # fmt: skip
        loss = _objective(forward, method, reference=reference, point=point)
        step = train.make_step(loss, tune_optimizer(recipe, point))
        state, metrics = train.scan_steps(step, lambda i: draw(step=i), state, steps=config.chunk_steps)
        return state, _means(metrics) | probe(recipe, world_, state, key=key)

    return chunk


def _objective(forward: Forward, method: MethodConfig, *, reference: Params, point: HParams) -> Loss:
    if method.objective == "sft":
        return objectives.sft(forward)
    if method.objective == "dpo":
        return objectives.dpo(forward, reference=reference, hparams=point, reduction=method.reduction)
    return objectives.unlearn(forward, hparams=point, reduction=method.reduction)


def _means(metrics: Metrics) -> Metrics:
    return {name: jnp.mean(values) for name, values in metrics.items()}


def probe(recipe: Recipe, world_: World, state: TrainState, *, key: Key) -> Metrics:
    """Returns the read-out of the learning curves: verdict rates on a few fresh safe and unsafe prompts."""
    rates = {}
    for condition in ("safe", "unsafe"):
        means = judge(
            recipe, world_, state.params, condition=condition, key=key, step=_PROBE_OFFSET + state.step,
            batch_size=recipe.evaluate.probe_prompts,
        )  # fmt: skip
        rates |= {f"{condition}/{name}": means[name] for name in ("exact_match", "complied", "refused")}
    return rates


def judge(
    recipe: Recipe, world_: World, params: Params, *, condition: str, key: Key, step: Any, batch_size: int
) -> dict[str, Float[Array, ""]]:
    """Returns mean verdict rates and accuracies on one fresh batch of a condition (see ``train.answer_metrics``)."""
    trial = world.batch_at(world_, condition, key=keys.stream(key, "evaluate"), step=step, batch_size=batch_size)
    per_prompt = train.answer_metrics(
        forward_of(recipe, world_), params, complied=trial.complied, refused=trial.refused, blocks=trial.blocks
    )
    return _means(per_prompt)


def evaluate(recipe: Recipe, world_: World, params: Params, *, condition: str, key: Key) -> dict[str, Float[Array, ""]]:
    """Returns each metric's mean over ``recipe.evaluate.prompts`` fresh prompts of a condition."""
    config = recipe.evaluate
    one = partial(judge, recipe, world_, params, condition=condition, key=key, batch_size=config.batch_size)
    return _means(jax.lax.map(lambda step: one(step=step), jnp.arange(config.prompts // config.batch_size)))
