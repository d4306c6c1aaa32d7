"""What a run would do, without doing it: its models, programs to compile, memory, steps and, where known, time.

Touches no disk but to look at what is there, and computes shapes only.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxsafety.engine import memory
from jaxsafety.recipe import graph
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Edited, Given, Reused, Selected, Training
from jaxsafety.recipe.schema import Recipe
from jaxsafety.rundir import checkpoint, manifest_file
from jaxsafety.study import pipeline, train
from jaxsafety.study.checkpoints import files, planned
from jaxsafety.study.checkpoints.planned import Line
from jaxsafety.study.grids import Job
from jaxsafety.study.pipeline import Study


def render(every: Sequence[Job], chosen: Sequence[Job]) -> Line:
    """Returns the forecast of running ``chosen`` as text, and whether all that was forecast of memory fits.

    It goes by speeds that any cell of ``every`` has recorded.
    """
    todo = [job.ready for job in chosen if not _is_trained(job.ready)]
    lines = []
    if len(every) > 1:
        lines.append(f"{len(chosen)} of {len(every)} cells, {len(chosen) - len(todo)} of them trained already")
        lines += [f"  {job.cell.name}: {'to train' if job.ready in todo else 'trained already'}" for job in chosen]
    lines += _models(chosen[0].ready)
    if chosen[0].ready.recipe.subject.of_files:
        lines += dict.fromkeys(line for job in chosen for line in files.readings(job.ready))
        needs = [line for job in chosen for line in planned.lines(job.ready)]
        return Line("\n".join([*lines, *(line.text for line in needs)]) + "\n", all(line.fits for line in needs))
    lines.append(f"programs to compile for training: {sum(len({*map(_program, _groups(ready))}) for ready in todo)}")
    lines += _memory(todo)
    work = [_training(ready, stage) for ready in todo for stage in ("pretrain", "tune")]
    left = {stage: sum(one.left for one in work if one.stage == stage) for stage in ("pretrain", "tune")}
    lines.append(
        f"seed-steps left: {left['pretrain']} of pretraining, {left['tune']} of tuning (steps x seeds x lanes)"
    )
    lines.append(f"time: {_time(every, [one for one in work if one.left])}")
    return Line("\n".join(lines) + "\n")


def records(chosen: Sequence[Job]) -> list[dict[str, Any]]:
    """Returns a flat record for every lane of some studies: how it comes about, its program there, and steps a seed."""
    found = []
    for job in chosen:
        numbers = _numbers(job.ready)
        for lane in job.ready.recipe.lanes:
            found.append({
                "cell": job.cell.name, "model": lane.label, "lane": lane.name, "made": _made(lane),
                "from": None if lane.parent is None else lane.parent.name, "seeds": len(job.ready.recipe.seeds),
                "program": numbers.get(lane), "steps": lane.steps, "there": job.ready.is_made(lane),
            })  # fmt: skip
    return found


def _is_trained(ready: Study) -> bool:
    return all(pipeline.is_finished(ready, stage) for stage in ("pretrain", "tune"))


def _groups(ready: Study) -> list[tuple[Lane, ...]]:
    """The groups of lanes that have something left to do."""
    groups = graph.groups(ready.recipe.lanes)
    return [group for group in groups if group[0].training and any(_done(ready, lane) < lane.steps for lane in group)]


def _program(group: Sequence[Lane]) -> Hashable:
    """What groups have in common that one compiled program trains, one after the other."""
    return group[0].stage, group[0].training.program, len(group)


def _numbers(ready: Study) -> dict[Lane, int]:
    """By lane that is trained, which program trains it, counted from 1."""
    groups = [group for group in graph.groups(ready.recipe.lanes) if group[0].training]
    numbers = {program: number for number, program in enumerate(dict.fromkeys(map(_program, groups)), 1)}
    return {lane: numbers[_program(group)] for group in groups for lane in group}


def _done(ready: Study, lane: Lane) -> int:
    return checkpoint.latest(ready.leg(lane).checkpoints) or 0


def _models(ready: Study) -> Iterator[str]:
    """The graph: every model, what it begins with, its method, its lanes, and which program trains it."""
    recipe = ready.recipe
    numbers = _numbers(ready)
    for label in recipe.models:
        lanes = recipe.lanes_of(label)
        parents = dict.fromkeys(lane.parent.label for lane in lanes if lane.parent is not None)
        programs = sorted({numbers[lane] for lane in lanes if lane in numbers})
        done = sum(map(ready.is_made, lanes))
        yield (
            f"  {label}: {_made(lanes[0])}{' from ' if parents else ''}{', '.join(parents)}; "
            f"{_counted(len(lanes), 'lane')} x {_counted(len(recipe.seeds), 'seed')}"
            + (f", program{'s' * (len(programs) > 1)} {', '.join(map(str, programs))}" if programs else "")
            + (f", {done} there already" if done else "")
        )
        if len(lanes) > 1:
            yield from (f"    {lane.name}" for lane in lanes)


def _made(lane: Lane) -> str:
    """How a lane comes about, in a few words, and its role."""
    how = lane.how
    match how:
        case Training():
            told = how.method
        case Edited():
            told = f"edit {how.edit}"
        case Selected():
            told = f"selected of {', '.join(how.select)}"
        case Reused():
            told = f"{how.model} of {how.run}"
        case Given():
            told = how.checkpoint
    return told if how.role == "model" else f"{told} ({how.role})"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _memory(todo: Sequence[Study]) -> Iterator[str]:
    stacks = [train.shapes(ready, group) for ready in todo for group in _groups(ready)]
    if stacks:
        largest = max(stacks, key=memory.size)
        size, (rows, seeds) = memory.size(largest), largest.step.shape
        yield (
            f"memory: the largest stacked state has {_counted(rows, 'lane')} x {_counted(seeds, 'seed')} of parameters "
            "and optimiser state, "
            f"{size / 2**20:.1f} MiB in all; activations and gradients come on top"
        )


class _Training(NamedTuple):
    """A stage of a study: what its speed depends on, seed-steps in all and done, seconds recorded."""

    stage: str
    kind: Any
    total: int
    done: int
    seconds: float

    @property
    def left(self) -> int:
        return self.total - self.done


def _training(ready: Study, stage: str) -> _Training:
    lanes, seeds = ready.stage_lanes(stage), len(ready.recipe.seeds)
    done, total = sum(_done(ready, lane) for lane in lanes), sum(lane.steps for lane in lanes)
    seconds = manifest_file.read_manifest(ready.directory).get(stage, {}).get("seconds", 0.0)
    return _Training(stage, _kind(ready.recipe, lanes), total * seeds, done * seeds, seconds)


def _kind(recipe: Recipe, lanes: Sequence[Lane]) -> Any:
    """What two stages have in common that take as long a step."""
    return (
        repr(recipe.subject),
        len(recipe.seeds),
        tuple(lane.training.program for lane in lanes if lane.training),
    )


def _time(every: Sequence[Job], wanted: Sequence[_Training]) -> str:
    """Seconds of training from speeds that this directory records for programs of the same shape."""
    if not wanted:
        return "no training left"
    spent: dict[Any, list[_Training]] = {}
    for one in (_training(job.ready, stage) for job in every for stage in ("pretrain", "tune")):
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
