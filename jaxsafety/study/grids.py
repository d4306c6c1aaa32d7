"""Runs the cells of a grid: ``cells/NAME`` is an ordinary run directory each, ``pretrained/NAME`` a pretraining.

Nothing here compiles more than it must: pretrainings that differ in the learning rate alone run as one program, cells
that differ in traced scalars alone are tuned as one, and every cell reads the pretraining it shares through a link.
What goes wrong in a cell is written into its manifest and stops none of the others. Several processes may work on one
grid: a lock guards every cell and every pretraining.
"""

import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxsafety import tree
from jaxsafety.config.told import is_told
from jaxsafety.engine import programs
from jaxsafety.recipe import cells
from jaxsafety.recipe.cells import Cell
from jaxsafety.recipe.schema import Recipe, as_dict
from jaxsafety.rundir import layout, locks, manifest_file, metrics_file, opening, progress, signals
from jaxsafety.study import pipeline
from jaxsafety.study.pipeline import Study

_POLL_S = 2.0


@dataclass(frozen=True)
class Job:
    """A cell made ready to run in its own directory, and the study whose pretraining it shares, its ``source``."""

    cell: Cell
    ready: Study
    source: Study


@dataclass
class Outcome:
    """What became of the cells of a process, by name: ended here, before, held by another process, failed and why."""

    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stages:
    """The stages to run, in their order, and the caller's ways to run one.

    ``advance`` runs one stage of one study to its end, if it is not finished; ``recorded`` notes in the manifests of
    studies what a stage that they share takes.
    """

    names: tuple[str, ...]
    advance: Callable[[Study, str], None]
    recorded: Callable[[Sequence[Study], str], AbstractContextManager[None]]


def plan(recipe: Recipe, chosen: Sequence[Cell], directory: Path) -> list[Job]:
    """Builds the studies of chosen cells, or the one of a recipe without a grid; touches no disk.

    Raises:
        ValueError: bad grammar, model or strategy; the cell is named.
    """
    if not recipe.grid:
        ready = pipeline.prepare(recipe, directory)
        return [Job(cell, ready, ready) for cell in chosen]
    # Of all cells, so that every process calls a pretraining the same.
    shared = cells.pretraining(recipe, cells.expand(recipe))
    sources: dict[str, Study] = {}
    jobs = []
    for cell in chosen:
        source = shared[cell.name]
        try:
            if source.name not in sources:
                folder = directory / layout.PRETRAINED / source.name
                sources[source.name] = pipeline.prepare(source.recipe, folder)
            ready = pipeline.prepare(cell.recipe, directory / layout.CELLS / cell.name)
        except ValueError as error:
            raise ValueError(f"cell {cell.name}: {error}") from error
        jobs.append(Job(cell, ready, sources[source.name]))
    return jobs


def record(recipe: Recipe, directory: Path) -> None:
    """Writes what the grid consists of into its directory, for :mod:`jaxsafety.rundir.status`; any process may do so.

    Raises:
        ValueError: the directory holds another grid.
        OSError: it cannot be written.
    """
    every = cells.expand(recipe)
    shared = cells.pretraining(recipe, every)
    listed = {cell.name: {"values": cell.values, "pretraining": shared[cell.name].name} for cell in every}
    with _waited_for(directory, recipe):
        opening.keep_files(directory / "grammars", pipeline.own_grammars(recipe))
        manifest_file.write_manifest(directory, {layout.CELLS: listed})


def run(jobs: Sequence[Job], stages: Stages) -> Outcome:
    """Runs the stages of all cells that are not finished; a cell that fails stops no other."""
    outcome = Outcome()
    todo = []
    for job in jobs:
        with _kept([job], "start", outcome):
            # A cell that trained to its end with every lane dead has its checkpoints, and has failed.
            failed_in = (manifest_file.read_manifest(job.ready.directory).get("failed") or {}).get("stage")
            if failed_in not in stages.names and all(pipeline.is_finished(job.ready, name) for name in stages.names):
                outcome.skipped.append(job.cell.name)
            else:
                todo.append(job)
    by_name = {job.cell.name: job for job in todo}
    for family in cells.families([job.cell for job in todo]):
        members = [by_name[cell.name] for cell in family]
        if "pretrain" in stages.names:
            _pretrain(members, stages, outcome)
        for group in cells.groups(family):
            left = [by_name[cell.name] for cell in group if cell.name not in outcome.failed]
            _run_group(left, stages, outcome)
    return outcome


def _pretrain(jobs: Sequence[Job], stages: Stages, outcome: Outcome) -> None:
    """Pretrains what the jobs share, side by side as far as possible; a process that comes second waits."""
    sources = {job.source.directory: job.source for job in jobs}
    # In one order in every process, or two could wait for each other.
    todo = [source for _, source in sorted(sources.items()) if not pipeline.is_finished(source, "pretrain")]

    def users(studies: Sequence[Study]) -> list[Job]:
        folders = {source.directory for source in studies}
        return [job for job in jobs if job.source.directory in folders]

    with ExitStack() as locks, _kept(users(todo), "pretrain", outcome):
        for source in todo:
            locks.enter_context(_waited_for(source.directory, source.recipe))
            opening.keep_files(source.directory / "grammars", pipeline.own_grammars(source.recipe))
        for part in pipeline.in_step(todo, lambda source: source.pretrain_leg):
            _as_one(part, "pretrain", pipeline.pretrain_together, users, stages, outcome)


def _run_group(jobs: Sequence[Job], stages: Stages, outcome: Outcome) -> None:
    with ExitStack() as held:
        mine = []
        for job in jobs:
            with _kept([job], "start", outcome):
                try:
                    held.enter_context(_opened(job.ready.directory, job.ready.recipe))
                except locks.RunInUseError:
                    outcome.in_use.append(job.cell.name)
                    continue
                opening.keep_files(job.ready.directory / "grammars", pipeline.own_grammars(job.ready.recipe))
                manifest_file.write_manifest(job.ready.directory, {"failed": None})
                if pipeline.is_finished(job.source, "pretrain"):
                    _adopt(job)
                if len(stages.names) == 1:
                    pipeline.check_ready(job.ready, stages.names[0])
                mine.append(job)
        if "tune" in stages.names:
            _tune(mine, stages, outcome)
        for job in mine:
            _finish(job, stages, outcome)


def _tune(jobs: Sequence[Job], stages: Stages, outcome: Outcome) -> None:
    """Tunes every method of a group; a study that another process left ahead of the others goes by itself."""
    by_study = {job.ready.directory: job for job in jobs}

    def users(studies: Sequence[Study]) -> list[Job]:
        return [by_study[ready.directory] for ready in studies]

    def tune(studies: Sequence[Study], label: str) -> None:
        base = programs.at_once(lambda states: tree.lane(states, 0), pipeline.pretrained(studies[0]))
        pipeline.tune_together(studies, label, base)

    for label in jobs[0].ready.recipe.tune.methods if jobs else ():
        alive = [job.ready for job in jobs if job.cell.name not in outcome.failed]
        for part in pipeline.in_step(alive, lambda ready, label=label: ready.tune_leg(label)):
            _as_one(part, "tune", lambda studies, label=label: tune(studies, label), users, stages, outcome)
        for ready in alive:
            job = by_study[ready.directory]
            if job.cell.name not in outcome.failed:
                with _kept([job], "tune", outcome):
                    pipeline.tuned_method(ready, label)


def _as_one(
    studies: Sequence[Study], stage: str, train: Callable[[Sequence[Study]], Any],
    users: Callable[[Sequence[Study]], list[Job]], stages: Stages, outcome: Outcome,
) -> None:  # fmt: skip
    """Trains studies as one program; where that fails, one by one, so that only the one at fault fails."""
    apart: Sequence[Study] = ()
    with _kept(users(studies), stage, outcome):
        try:
            with stages.recorded(studies, stage):
                train(studies)
        except (signals.Stopped, FloatingPointError):  # asked for, and true of each
            raise
        except Exception as error:
            if len(studies) == 1:
                raise
            apart = studies
            progress.say(f"{stage} of {len(studies)} cells together failed ({manifest_file.reason(error)}): one by one")
    for one in apart:
        _as_one((one,), stage, train, users, stages, outcome)


def _finish(job: Job, stages: Stages, outcome: Outcome) -> None:
    """Runs one by one the stages that only this cell has."""
    for name in stages.names:
        if job.cell.name in outcome.failed:
            return
        with _kept([job], name, outcome):
            if name == "pretrain":
                pipeline.pretrained(job.ready)
            else:
                stages.advance(job.ready, name)
    if job.cell.name not in outcome.failed:
        outcome.finished.append(job.cell.name)


def _adopt(job: Job) -> None:
    """Gives a cell the finished pretraining it shares: curves and record as copies, parameters as a link."""
    link, source = job.ready.pretrain_leg.checkpoints, job.source
    if link.exists():
        return
    rows = metrics_file.read_metrics(source.directory)
    metrics_file.truncate_metrics(job.ready.directory, stage="pretrain", method=None, after_step=-1)
    metrics_file.append_metrics(job.ready.directory, rows)
    record = manifest_file.read_manifest(source.directory).get("pretrain", {})
    manifest_file.write_manifest(job.ready.directory, {"pretrain": {**record, "shared": source.directory.name}})
    link.parent.mkdir(exist_ok=True)
    # Relative, so that the whole grid can be moved.
    target = os.path.relpath(source.pretrain_leg.checkpoints.absolute(), link.parent.absolute())
    link.symlink_to(target, target_is_directory=True)


@contextmanager
def _kept(jobs: Sequence[Job], stage: str, outcome: Outcome) -> Iterator[None]:
    """Turns an error into the failure of cells, told at the end and kept in their manifests."""
    try:
        with ExitStack() as records:
            for job in jobs:
                records.enter_context(manifest_file.failure_kept(job.ready.directory, stage))
            yield
    except signals.Stopped:
        raise
    except Exception as error:
        if not is_told(error):
            traceback.print_exc()
        for job in jobs:
            outcome.failed[job.cell.name] = f"{stage}: {manifest_file.reason(error)}"


def _opened(directory: Path, recipe: Recipe) -> AbstractContextManager[Path]:
    return opening.open_run(directory, as_dict(recipe))


@contextmanager
def _waited_for(directory: Path, recipe: Recipe) -> Iterator[None]:
    """Opens a directory that another process of the same grid may be at work in."""
    with ExitStack() as lock:
        for attempt in itertools.count():
            try:
                lock.enter_context(_opened(directory, recipe))
                break
            except locks.RunInUseError:
                if not attempt:
                    progress.say(f"waiting for another process to end its work in {directory}")
                signals.check(f"while another process works in {directory}")
                time.sleep(_POLL_S)
        yield
