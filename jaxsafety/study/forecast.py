"""What a run would do, without doing it: cells, programs to compile, memory, steps and, where something is known, time.

Touches no disk but to look at what is there, and computes shapes only.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxsafety.config import fields
from jaxsafety.engine import memory
from jaxsafety.engine.loop import Leg
from jaxsafety.recipe import cells
from jaxsafety.rundir import checkpoint, manifest_file
from jaxsafety.study import pipeline
from jaxsafety.study.grids import Job
from jaxsafety.study.pipeline import Study


def render(every: Sequence[Job], chosen: Sequence[Job]) -> str:
    """Returns the forecast of running ``chosen`` as text; it goes by speeds that any cell of ``every`` has recorded."""
    todo = [job for job in chosen if not pipeline.is_finished(job.ready, "tune")]
    pretrainings = [job for job in _sources(todo) if not pipeline.is_finished(job.source, "pretrain")]
    by_name = {job.cell.name: job for job in todo}
    groups = [[by_name[cell.name] for cell in group] for group in cells.groups(job.cell for job in todo)]
    families = [[by_name[cell.name] for cell in part] for part in cells.families(job.cell for job in pretrainings)]
    program_of = {job.cell.name: number for number, group in enumerate(groups, 1) for job in group}
    lines = [f"{len(chosen)} of {len(every)} cells, {len(chosen) - len(todo)} of them tuned already"]
    lines += [f"  {job.cell.name or job.cell.recipe.name}: {_plan_of(job, program_of)}" for job in chosen]
    lines.append(
        f"programs to compile for training: {len(families)} of pretraining, {len(_tuning_programs(groups))} of tuning"
    )
    lines += _memory(families, groups)
    pretraining, tuning = [*map(_pretraining, pretrainings)], [*map(_tuning, todo)]
    lines.append(
        f"seed-steps left: {sum(one.left for one in pretraining)} of pretraining, {sum(one.left for one in tuning)} of "
        "tuning (steps x seeds, in tuning x learning rates x methods)"
    )
    lines.append(f"time: {_time(every, pretraining + tuning)}")
    return "\n".join(lines) + "\n"


def _sources(jobs: Iterable[Job]) -> list[Job]:
    """One job for each pretraining."""
    return list({job.source.directory: job for job in jobs}.values())


def _plan_of(job: Job, program_of: dict[str, int]) -> str:
    if job.cell.name not in program_of:
        return "tuned already"
    shared = f", pretraining {job.source.directory.name}" if job.cell.name else ""
    return f"tuned in group {program_of[job.cell.name]}{shared}"


def _tuning_programs(groups: Sequence[Sequence[Job]]) -> set[tuple[Any, ...]]:
    """Methods whose static fields are the same are one program: the traced ones are its inputs."""
    return {
        (cells.tuning_program(group[0].cell), len(group), method.method, fields.program(method.options))
        for group in groups
        for method in group[0].ready.recipe.tune.methods.values()
    }


def _memory(families: Sequence[Sequence[Job]], groups: Sequence[Sequence[Job]]) -> Iterable[str]:
    stacks = [pipeline.pretrain_shapes([job.source for job in family]) for family in families]
    stacks += [
        pipeline.tune_shapes([job.ready for job in group], label)
        for group in groups
        for label in group[0].ready.recipe.tune.methods
    ]
    if stacks:
        largest = max(stacks, key=memory.size)
        lanes, size = math.prod(largest.step.shape), memory.size(largest)
        yield (
            f"memory: the largest stacked state has {lanes} lanes of parameters and optimiser state, "
            f"{size / 2**20:.1f} MiB in all; activations and gradients come on top"
        )


class _Training(NamedTuple):
    """A pretraining, or the tuning of a cell: its program's shape, seed-steps in all and done, seconds recorded."""

    kind: str
    total: int
    done: int
    seconds: float

    @property
    def left(self) -> int:
        return self.total - self.done


def _pretraining(job: Job) -> _Training:
    recipe, leg = job.source.recipe, job.source.pretrain_leg
    lanes, kind = len(recipe.seeds), f"pretrain {cells.pretraining_program(job.cell)}"
    return _training(job.source, "pretrain", kind, [leg], recipe.pretrain.steps, lanes)


def _tuning(job: Job) -> _Training:
    recipe = job.ready.recipe
    legs = [job.ready.tune_leg(label) for label in recipe.tune.methods]
    lanes, kind = len(recipe.seeds) * len(recipe.tune.learning_rates), f"tune {cells.tuning_program(job.cell)}"
    return _training(job.ready, "tune", kind, legs, recipe.tune.steps, lanes)


def _training(study: Study, stage: str, kind: str, legs: Sequence[Leg], steps: int, lanes: int) -> _Training:
    done = sum(checkpoint.latest(leg.checkpoints) or 0 for leg in legs)
    seconds = manifest_file.read_manifest(study.directory).get(stage, {}).get("seconds", 0.0)
    return _Training(kind, steps * len(legs) * lanes, done * lanes, seconds)


def _time(every: Sequence[Job], wanted: Sequence[_Training]) -> str:
    """Seconds of training from speeds that this directory records for programs of the same shape."""
    if not wanted:
        return "no training left"
    spent: dict[str, list[_Training]] = {}
    for one in (*map(_pretraining, _sources(every)), *map(_tuning, every)):
        if one.done and one.seconds:
            spent.setdefault(one.kind, []).append(one)
    if unknown := sum(one.kind not in spent for one in wanted):
        return f"unknown: no earlier run to go by for {unknown} of {len(wanted)} trainings"
    speeds = {kind: sum(one.done for one in ran) / sum(one.seconds for one in ran) for kind, ran in spent.items()}
    seconds = round(sum(one.left / speeds[one.kind] for one in wanted))
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return (
        f"about {clock} of training, one process, at the seed-steps per second that manifests in this directory record "
        "for the same shapes; evaluation, analysis and report come on top"
    )
