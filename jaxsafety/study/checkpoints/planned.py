"""What making the models of a study of checkpoints needs, from shapes alone: nothing is loaded or written."""

from collections.abc import Iterator

from jaxsafety.engine import memory
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.recipe import graph
from jaxsafety.recipe.models import Edited
from jaxsafety.study.checkpoints import edited, job, opened, places, train, tuned
from jaxsafety.study.checkpoints.tuned import Plan
from jaxsafety.study.pipeline import Study


def lines(study: Study) -> Iterator[str]:
    """Yields what programs of training and of edits take of a device's memory, the first model standing for its group.

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


def _edits(study: Study, config: LlamaConfig) -> Iterator[str]:
    """A tensor at a time is edited, so that the largest is the need, however deep the model is."""
    for name in study.recipe.models:
        left = [one for one in study.recipe.lanes_of(name) if isinstance(one.how, Edited) and not study.is_made(one)]
        if left:
            path, size = edited.need(config, left[0].how, ["target", *left[0].others])
            yield f"{name}: edited a tensor at a time; the largest need, {size / 2**30:.2f} GiB, is that of {path}"
            yield _verdict(size, memory.available())


def _told(plan: Plan, what: str) -> Iterator[str]:
    sizes = {
        "weights as they are": plan.frozen_bytes,
        "trained, with the optimiser's state": plan.state_bytes,
        "examples": plan.data_bytes,
        "steps, as planned by the compiler": plan.step_bytes,
    }
    total = sum(sizes.values())
    yield f"{what}: {plan.parameters:,} parameters, {plan.trained:,} trained; on one device:"
    for name, size in (sizes | {"together": total}).items():
        yield f"  {name:36} {size / 2**30:8.2f} GiB"
    yield _verdict(total, plan.free_bytes)


def _verdict(size: int, free: int) -> str:
    return f"it {'fits' if size <= free else 'does not fit'} into the {free / 2**30:.2f} GiB that are free"
