"""One run of a recipe as pure functions of a single lane: initialise, a chunk of pretraining or tuning, evaluate.

A lane is one seed at one hyper-parameter point. Nothing here knows of the grid, jit, devices or disk; the outer layer
maps these over ``[h, s]``.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxsafety import keys, tree, world
from jaxsafety.methods import sft
from jaxsafety.models import gpt
from jaxsafety.recipe.nodes import MethodConfig
from jaxsafety.recipe.schema import PretrainConfig, Recipe, TuneConfig
from jaxsafety.subjects import judge as judging
from jaxsafety.training import objective, optim, stepping
from jaxsafety.types import Batch, HParams, Key, Metrics, Model, Params, PreferenceBatch, Terms, TrainState, Trial
from jaxsafety.world import Condition, World

Chunk = Callable[[TrainState, Any, HParams, Int[Array, ""]], tuple[TrainState, Metrics]]

# Conditions that the learning curves read out.
READOUT = ("safe", "unsafe")
# Their prompts come from a step of the evaluation stream that no table reaches.
_READOUT_STEP = 1 << 20


def model_of(recipe: Recipe, world: World) -> Model:
    """Returns the model with its static configuration bound, in float32: what is measured."""
    return gpt.model(recipe.model.build(world))


def training_model_of(recipe: Recipe, world: World) -> Model:
    """Returns the model that losses and their gradients are taken of, in ``model.compute_dtype``."""
    return gpt.model(replace(recipe.model.build(world), compute_dtype=recipe.model.compute_dtype))


def init_params(recipe: Recipe, world: World, *, key: Key) -> Params:
    """Returns fresh parameters from the seed's root key."""
    return gpt.init(recipe.model.build(world), key=keys.stream(key, "init"))


def optimizer(stage: PretrainConfig | TuneConfig, point: HParams) -> optax.GradientTransformation:
    """Returns the optimiser of a stage at one hyper-parameter point."""
    return optim.make_optimizer(stage.optim, peak_lr=point.peak_lr, total_steps=stage.steps)


def pretrain_chunk(recipe: Recipe, world_: World) -> Chunk:
    """Returns ``(state, root key, point, steps) -> (state, means over the steps)`` of pretraining."""
    config = recipe.pretrain
    model = training_model_of(recipe, world_)

    def totals(params: Params, batch: Batch, aux: Any, **_: Any) -> tuple[Terms, Terms]:
        return sft.next_token(model, params, batch)

    def chunk(state: TrainState, key: Key, point: HParams, steps: Int[Array, ""]) -> tuple[TrainState, Metrics]:
        stream = keys.stream(key, "pretrain")
        draw = partial(
            world.pretrain_batch_at, world_, config.mixture, key=stream, total_steps=config.steps,
            batch_size=config.batch_size,
        )  # fmt: skip
        gradient = stepping.make_gradient(totals, key=stream, total_steps=config.steps)
        step = stepping.make_step(gradient, optimizer(config, point))
        return stepping.run_steps(step, lambda i: draw(step=i), state, steps=steps)

    return chunk


def tune_chunk(recipe: Recipe, world_: World, method: MethodConfig) -> Chunk:
    """Returns ``(state, (root key, reference params), point, steps) -> (state, means over the steps)`` of a method."""
    config, own = recipe.tune, method.load()
    model = training_model_of(recipe, world_)

    def chunk(
        state: TrainState, per_seed: tuple[Key, Params], point: HParams, steps: Int[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        key, reference = per_seed
        options, stream, own_stream = method.at_point(point), keys.stream(key, "tune"), keys.stream(key, "method")
        step = objective.make_step(own, model, optimizer(config, point), options, key=key, total_steps=config.steps)
        drawn = partial(
            world.tune_batch_at, world_, key=stream, batch_size=config.batch_size, p_unsafe=point.p_unsafe,
            mix=config.mix,
        )  # fmt: skip

        def draw(i: Int[Array, ""]) -> PreferenceBatch:
            given = {"reference": reference, "key": keys.at_step(own_stream, i)}
            return objective.prepared(own, model, drawn(step=i), options, **given)

        return stepping.run_steps(step, draw, state, steps=steps)

    return chunk


def init_tuned(recipe: Recipe, method: MethodConfig, params: Params, *, key: Key, point: HParams) -> TrainState:
    """Returns the state that a method begins with at one hyper-parameter point."""
    own = optimizer(recipe.tune, point)
    return objective.init_state(method.load(), params, own, method.at_point(point), key=key)


def _means(metrics: Metrics) -> Metrics:
    return {name: jnp.mean(values) for name, values in metrics.items()}


def prompts(
    recipe: Recipe, world_: World, *, condition: str | Condition, key: Key, late_probability: float | Float[Array, ""]
) -> Trial:
    """Draws ``evaluate.prompts`` prompts ``[n, b, ...]`` of a condition for one seed.

    They depend on the seed alone, so that all its models are judged on the same prompts. ``key`` is the seed's stream
    key: not its root, so that one compiled program draws for every stream. See :func:`jaxsafety.world.batch_at`.
    """
    config = recipe.evaluate
    draw = partial(
        world.batch_at, world_, condition, key=key, batch_size=config.batch_size, late_probability=late_probability
    )
    return jax.vmap(lambda step: draw(step=step))(jnp.arange(config.prompts // config.batch_size))


def readout_prompts(recipe: Recipe, world_: World, *, key: Key) -> Trial:
    """Draws the prompts of the learning curves for one seed: one batch of each of ``READOUT``, none of the table's."""
    stream, count = keys.stream(key, "evaluate"), recipe.evaluate.probe_prompts
    drawn = [world.batch_at(world_, name, key=stream, step=_READOUT_STEP, batch_size=count) for name in READOUT]
    return tree.stack(drawn)


def judge(recipe: Recipe, world_: World, params: Params, trials: Trial) -> dict[str, Float[Array, " n"]]:
    """Returns the mean verdict rates and accuracies of every batch ``[n]``, see ``subjects.judge``."""
    model = model_of(recipe, world_)
    return jax.lax.map(lambda trial: _means(judging.judge(model, params, trial)), trials)


def evaluate(recipe: Recipe, world_: World, params: Params, trials: Trial) -> Metrics:
    """Returns each metric's mean over all prompts."""
    return _means(judge(recipe, world_, params, trials))


def readout(recipe: Recipe, world_: World, params: Params, trials: Trial) -> Metrics:
    """Returns the learning curves' rates on the prompts of :func:`readout_prompts`, as ``condition/metric``."""
    rates = judge(recipe, world_, params, trials)
    names = ("exact_match", "complied", "refused")
    return {f"{condition}/{name}": rates[name][i] for i, condition in enumerate(READOUT) for name in names}
