"""What making and attacking the models of a study of checkpoints needs, by shapes: nothing is loaded or written."""

from collections.abc import Iterator
from typing import NamedTuple

from jaxsafety.engine import memory
from jaxsafety.formats.hf_tokenizer import Tokenizer
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.recipe import graph
from jaxsafety.recipe.models import Edited
from jaxsafety.study import pipeline
from jaxsafety.study.checkpoints import edited, inputs, job, opened, places, train, tuned
from jaxsafety.study.checkpoints.attempts import Attempt
from jaxsafety.study.checkpoints.batches import Encoded
from jaxsafety.study.checkpoints.tuned import Plan
from jaxsafety.study.pipeline import Study


class Line(NamedTuple):
    """A line of a forecast; ``fits`` is False where it says that something does not."""

    text: str
    fits: bool = True


def lines(study: Study) -> Iterator[Line]:
    """Yields what programs of training, edits and attacks take of a device's memory.

    The first model stands for its group, and for those that are attacked.

    Raises:
        ValueError: an example that cannot be read.
    """
    if opened.is_of_weights(study.recipe):
        return
    seed = study.recipe.seeds[0]
    start = opened.of_lane(study, study.recipe.lanes[0].root, seed)
    yield from _edits(study, start.config)
    for group in graph.groups(study.recipe.lanes):
        lane = group[0]
        if lane.training is None or all(map(study.is_made, group)):
            continue
        own = job.of_lane(lane, study.about, seed)
        plan = tuned.plan(start.config, train.encoded(study, lane, start.config), own, places=places.local())
        yield from _told(plan, ", ".join(one.name for one in group))
    if study.recipe.attacks and not pipeline.is_finished(study, "analyze"):
        asked, reader = inputs.asked(study, models=inputs.given(study)), inputs.tokenizer(study)
        for label in study.recipe.attacks:
            yield from _attacked(study, label, asked, reader)


def _attacked(study: Study, label: str, asked: Encoded, reader: Tokenizer) -> Iterator[Line]:
    """The largest batch stands for all; of an attack that looks at a base both models are in memory."""
    lanes = [lane for lane in study.recipe.lanes if lane.is_among(study.recipe.attacks[label].on)]
    # What is made has the shapes of the model that it begins with, and is not there yet.
    attempt = Attempt(study, label, lanes[0].root, lanes[-1], study.recipe.seeds[0], asked, reader)
    size, held = attempt.need(), "both models" if attempt.is_based else "the model"
    count = sum(len(batch.rows) for strength in attempt.strengths for batch in strength.batches)
    yield Line(
        f"attacks.{label}: {count:,} answers of up to {attempt.max_new} tokens a model, models: {len(lanes)}; {held} "
        f"and the largest batch take {size / 2**30:.2f} GiB"
    )
    yield _verdict(size, memory.available())


def _edits(study: Study, config: LlamaConfig) -> Iterator[Line]:
    """A tensor at a time is edited, so that the largest is the need, however deep the model is."""
    for name in study.recipe.models:
        left = [one for one in study.recipe.lanes_of(name) if isinstance(one.how, Edited) and not study.is_made(one)]
        if left:
            path, size = edited.need(config, left[0].how, ["target", *left[0].others])
            need = f"{size / 2**30:.2f} GiB"
            yield Line(f"{name}: edited a tensor at a time; the largest need, {need}, is that of {path}")
            yield _verdict(size, memory.available())


def _told(plan: Plan, what: str) -> Iterator[Line]:
    sizes = {
        "weights as they are": plan.frozen_bytes,
        "trained, with the optimiser's state": plan.state_bytes,
        "examples": plan.data_bytes,
        "steps, as planned by the compiler": plan.step_bytes,
    }
    total = sum(sizes.values())
    yield Line(f"{what}: {plan.parameters:,} parameters, {plan.trained:,} trained; on one device:")
    for name, size in (sizes | {"together": total}).items():
        yield Line(f"  {name:36} {size / 2**30:8.2f} GiB")
    yield _verdict(total, plan.free_bytes)


def _verdict(size: int, free: int) -> Line:
    fits = size <= free
    return Line(f"it {'fits' if fits else 'does not fit'} into the {free / 2**30:.2f} GiB that are free", fits)
