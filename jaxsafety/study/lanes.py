"""One run of a recipe as pure functions of a single lane: initialise, a chunk of training, evaluate.

A single lane is one seed of a :class:`jaxsafety.recipe.lane.Lane`. Nothing here knows of the grid, jit, devices or
disk; the outer layer maps these over ``[h, s]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxsafety import keys, tree
from jaxsafety.models.through import through
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Edited, Training
from jaxsafety.recipe.nodes import EditConfig
from jaxsafety.recipe.schema import EvaluateConfig
from jaxsafety.training import objective, optim, stepping
from jaxsafety.types import HParams, Key, Method, Metrics, Opened, Params, Point, TrainState


class Seed(NamedTuple):
    """One seed, as a training takes it.

    Attributes:
        root: its root key.
        data: that of the stream of its examples, an input so that trainings of several generations are one program.
        place: its place among the study's seeds.
    """

    root: Key
    data: Key
    place: Int[Array, ""]


Chunk = Callable[[TrainState, dict[str, Params], Seed, HParams, Int[Array, ""]], tuple[TrainState, Metrics]]
# Of a seed's place the subject as that seed finds it, see :class:`jaxsafety.types.Opened`.
OfSeed = Callable[[Int[Array, ""]], Opened]

# What learning curves show of the conditions that they read, if the subject's judge tells it.
_SHOWN = ("exact_match", "complied", "refused")
# Their prompts come from a step of the evaluation stream that no table reaches.
_READOUT_STEP = 1 << 20
# Below a step's key, for gates that are drawn: another number than those of :mod:`jaxsafety.training.objective`.
_GATES = 2


def init_params(subject: Opened, *, key: Key) -> Params:
    """Returns fresh parameters from the seed's root key."""
    return subject.init(keys.stream(key, "init"))


def optimizer(training: Training, point: HParams) -> optax.GradientTransformation:
    """Returns the optimiser of a training at one hyper-parameter point."""
    return optim.make_optimizer(training.optim, peak_lr=point.peak_lr, total_steps=training.steps)


def train_chunk(of_seed: OfSeed, lane: Lane) -> Chunk:
    """Returns ``(state, given, seed, point, steps) -> (state, means over the steps)`` of a lane.

    It is that of all lanes whose trainings have the same ``program``, of whatever generation: their scalars are the
    point's. Given are parameters by role: the ``reference``, where the method asks for one, and what is trained is
    joined with.
    """
    training, own = lane.training, lane.training.load()

    def chunk(
        state: TrainState, given: dict[str, Params], seed: Seed, point: HParams, steps: Int[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        subject = of_seed(seed.place)
        model = subject.training
        options, own_stream = training.at_point(point), keys.stream(seed.root, "method")
        joined, reference = _joined(training, own, given, point), given.get("reference")
        step = objective.make_step(
            joined, model, optimizer(training, point), options, key=seed.root, total_steps=training.steps,
            parts=training.accumulate,
        )  # fmt: skip

        def draw(i: Int[Array, ""]) -> Any:
            batch = examples(subject.source, training, point, key=seed.data, step=i)
            return objective.prepared(own, model, batch, options, reference=reference, key=keys.at_step(own_stream, i))

        return stepping.run_steps(step, draw, state, steps=steps)

    return chunk


def _joined(training: Training, method: Method, trees: dict[str, Params], point: HParams) -> Method:
    """Returns the method of the whole model as one of what is trained of it."""
    if training.parametrisation.kind == "full":
        return method
    join = partial(training.parametrisation.load().join, trees, config=training.parametrisation.at_point(point))

    def totals(model: Any, trained: Any, *words: Any, key: Key, progress: Any) -> Any:
        whole = through(model, partial(join, key=jax.random.fold_in(key, _GATES)))
        return method.totals(whole, trained, *words, key=key, progress=progress)

    return method._replace(totals=totals)


def whole(training: Training, trained: Any, trees: dict[str, Params], point: HParams) -> Params:
    """Returns the parameters of the model of which a part is trained, as they are judged and kept."""
    part = training.parametrisation
    return part.load().join(trees, trained, config=part.at_point(point))


def edited(
    node: EditConfig | Edited,
    trees: dict[str, Params],
    *,
    point: Point,
    key: Key,
    moments: dict[str, dict[str, Array]] | None = None,
    layer: int | Int[Array, ""] = 0,
) -> Params:
    """Returns an edited model; the key is the seed's root key. Labels of one edit draw the same, and so compare.

    ``moments`` are those of the sites that the edit reads, by class, if any, and ``layer`` is the first of the layers
    there are; see :class:`jaxsafety.types.Edit`.
    """
    own, edit = keys.named(keys.stream(key, "analysis"), node.edit), node.load()
    given = ({"moments": moments} if edit.reads else {}) | ({"layer": layer} if edit.draws else {})
    with jax.default_matmul_precision("highest"):
        return edit.edit(trees, node.options, point=point, key=own, **given)


def seed(lane: Lane, root: Key, place: Int[Array, ""]) -> Seed:
    """Returns one seed of a lane.

    Models of one generation see the same examples at the same step, so that they compare; those of the next see others.
    """
    return Seed(root, generation_stream(lane.stage, lane.generation, root), place)


def generation_stream(stage: Literal["pretrain", "tune"], generation: int, key: Key) -> Key:
    """Returns the key of the stream of examples of a generation's stage below the seed's root key."""
    stream = keys.stream(key, stage)
    return stream if generation < 2 else keys.named(stream, f"generation {generation}")


def examples(source: Any, training: Training, point: HParams, *, key: Key, step: Int[Array, ""]) -> Any:
    """Draws the examples ``[b, ...]`` of one step of a training, at one hyper-parameter point.

    Of a number of different examples they come in turn, the same order again and again.
    """
    data, count, total = training.data, training.batch_size, training.steps
    draw = partial(data.load().draw, source, data.at_point(point), key=key, total_steps=total)
    if data.prompts is None:
        return draw(step=step, batch_size=count)
    n = jnp.int32(point.data["prompts"])
    places = (step % n * (count % n) + jnp.arange(count)) % n
    one = jax.vmap(lambda place: draw(step=place, batch_size=1))(places)
    return jax.tree.map(lambda leaf: leaf[:, 0], one)


def init_state(training: Training, trees: dict[str, Params], *, key: Key, point: HParams) -> TrainState:
    """Returns the state that a training begins with at one hyper-parameter point, from its ``parent`` among trees."""
    part = training.parametrisation
    first = keys.named(keys.stream(key, "init"), part.kind)
    params = part.load().init(trees, config=part.at_point(point), key=first)
    return objective.init_state(training.load(), params, optimizer(training, point), training.at_point(point), key=key)


def _means(metrics: Metrics) -> Metrics:
    return {name: jnp.mean(values) for name, values in metrics.items()}


def prompts(
    subject: Opened, config: EvaluateConfig, *, condition: Any, key: Key, late_probability: float | Float[Array, ""]
) -> Any:
    """Draws ``evaluate.prompts`` prompts ``[n, b, ...]`` of a condition for one seed.

    They depend on the seed alone, so that all its models are judged on the same prompts. ``key`` is the seed's stream
    key: not its root, so that one compiled program draws for every stream. See :class:`jaxsafety.types.Opened`.
    """
    draw = partial(subject.trials, condition, key=key, batch_size=config.batch_size, late_probability=late_probability)
    return jax.vmap(lambda step: draw(step=step))(jnp.arange(config.prompts // config.batch_size))


def readout_prompts(subject: Opened, conditions: Sequence[str], *, count: int, key: Key) -> Any:
    """Draws the prompts of the learning curves for one seed: ``count`` of each condition, none of the table's."""
    draw = partial(subject.trials, key=keys.stream(key, "evaluate"), step=_READOUT_STEP, batch_size=count)
    return tree.stack([draw(name, late_probability=subject.late_probability) for name in conditions])


def judge(subject: Opened, params: Params, trials: Any) -> dict[str, Float[Array, " n"]]:
    """Returns the mean verdict rates and accuracies of every batch ``[n]``, see ``Opened.judge``."""
    return jax.lax.map(lambda trial: _means(subject.judge(params, trial)), trials)


def evaluate(subject: Opened, params: Params, trials: Any) -> Metrics:
    """Returns each metric's mean over all prompts."""
    return _means(judge(subject, params, trials))


def readout(subject: Opened, conditions: Sequence[str], params: Params, trials: Any) -> Metrics:
    """Returns the learning curves' rates on the prompts of :func:`readout_prompts`, as ``condition/metric``."""
    rates = judge(subject, params, trials)
    return {f"{one}/{name}": rates[name][i] for i, one in enumerate(conditions) for name in _SHOWN if name in rates}
