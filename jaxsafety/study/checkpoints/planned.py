"""What making the models of a study of checkpoints needs, from shapes alone: nothing is loaded or written."""

from collections.abc import Iterator

from jaxsafety.formats import hf
from jaxsafety.recipe import graph
from jaxsafety.study.checkpoints import job, places, train, tuned
from jaxsafety.study.checkpoints.tuned import Plan
from jaxsafety.study.pipeline import Study


def lines(study: Study) -> Iterator[str]:
    """Yields what every program of training takes of a device's memory, those of its first model standing for all.

    Raises:
        ValueError: an example that cannot be read.
    """
    seed = study.recipe.seeds[0]
    start = hf.open_checkpoint(study.model(study.recipe.lanes[0].root, seed))
    for group in graph.groups(study.recipe.lanes):
        lane = group[0]
        if lane.training is None or all(map(study.is_made, group)):
            continue
        own = job.of_lane(lane, study.recipe.subject.options, seed)
        plan = tuned.plan(start.config, train.encoded(study, lane, start.config), own, places=places.local())
        yield from _told(plan, ", ".join(one.name for one in group))


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
    verdict = "fits" if total <= plan.free_bytes else "does not fit"
    yield f"it {verdict} into the {plan.free_bytes / 2**30:.2f} GiB that are free"
