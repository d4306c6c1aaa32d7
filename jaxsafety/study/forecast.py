"""What a run would do, without doing it: cells, programs to compile, memory, steps and, where something is known, time.

Touches no disk but to look at what is there, and computes shapes only.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jaxsafety.config import fields
from jaxsafety.engine import memory
from jaxsafety.recipe import cells
from jaxsafety.rundir import checkpoint, manifest_file
from jaxsafety.study import pipeline
from jaxsafety.study.grids import Job


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
    left = {"pretrain": sum(map(_pretrain_left, pretrainings)), "tune": sum(map(_tune_left, todo))}
    lines.append(
        f"seed-steps left: {left['pretrain']} of pretraining, {left['tune']} of tuning "
        "(steps x seeds, in tuning x learning rates x methods)"
    )
    lines.append(f"time: {_time(every, pretrainings, todo)}")
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


def _pretrain_left(job: Job) -> int:
    config = job.source.recipe.pretrain
    return config.steps * len(job.source.recipe.seeds) - _pretrain_done(job)


def _pretrain_done(job: Job) -> int:
    return (checkpoint.latest(job.source.pretrain_leg.checkpoints) or 0) * len(job.source.recipe.seeds)


def _tune_left(job: Job) -> int:
    config = job.ready.recipe.tune
    return config.steps * len(config.methods) * _lanes(job) - _tune_done(job)


def _tune_done(job: Job) -> int:
    legs = [job.ready.tune_leg(label) for label in job.ready.recipe.tune.methods]
    return sum(checkpoint.latest(leg.checkpoints) or 0 for leg in legs) * _lanes(job)


def _lanes(job: Job) -> int:
    return len(job.ready.recipe.seeds) * len(job.ready.recipe.tune.learning_rates)


def _time(every: Sequence[Job], pretrainings: Sequence[Job], todo: Sequence[Job]) -> str:
    """Seconds of training from speeds that this directory records for programs of the same shape."""
    if not pretrainings and not todo:
        return "no training left"
    spent: dict[str, list[tuple[int, float]]] = {}
    for job in _sources(every):
        seconds = manifest_file.read_manifest(job.source.directory).get("pretrain", {}).get("seconds", 0.0)
        spent.setdefault(_pretrain_kind(job), []).append((_pretrain_done(job), seconds))
    for job in every:
        seconds = manifest_file.read_manifest(job.ready.directory).get("tune", {}).get("seconds", 0.0)
        spent.setdefault(_tune_kind(job), []).append((_tune_done(job), seconds))
    wanted = [(_pretrain_kind(job), _pretrain_left(job)) for job in pretrainings]
    wanted += [(_tune_kind(job), _tune_left(job)) for job in todo]
    speeds = {kind: _speed(records) for kind, records in spent.items()}
    if unknown := sum(not speeds[kind] for kind, _ in wanted):
        return f"unknown: no earlier run to go by for {unknown} of {len(wanted)} trainings"
    seconds = round(sum(left / speeds[kind] for kind, left in wanted))
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return (
        f"about {clock} of training, one process, at the seed-steps per second that manifests in this directory record "
        "for the same shapes; evaluation, analysis and report come on top"
    )


def _pretrain_kind(job: Job) -> str:
    return f"pretrain {cells.pretraining_program(job.cell)}"


def _tune_kind(job: Job) -> str:
    return f"tune {cells.tuning_program(job.cell)}"


def _speed(records: Sequence[tuple[int, float]]) -> float:
    """Seed-steps a second of the trainings that recorded both; 0 if none did."""
    known = [(steps, seconds) for steps, seconds in records if steps and seconds]
    return sum(steps for steps, _ in known) / sum(seconds for _, seconds in known) if known else 0.0
