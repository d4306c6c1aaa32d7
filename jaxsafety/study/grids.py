"""Runs the cells of a grid: ``cells/NAME`` is an ordinary run directory each.

What goes wrong in a cell is written into its manifest and stops none of the others. Several processes may work on one
grid: a lock guards every cell.
"""

import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jaxsafety.config.told import is_told, told_of
from jaxsafety.formats.sources import Places
from jaxsafety.recipe import cells
from jaxsafety.recipe.cells import Cell
from jaxsafety.recipe.schema import Recipe, as_dict
from jaxsafety.rundir import layout, locks, manifest_file, opening, progress, signals
from jaxsafety.study import pipeline
from jaxsafety.study.pipeline import Study
from jaxsafety.study.stages import prepare

_POLL_S = 2.0


@dataclass(frozen=True)
class Job:
    """A cell made ready to run in its own directory."""

    cell: Cell
    ready: Study


@dataclass
class Outcome:
    """What became of the cells of a process, by name: ended here, before, held by another process, failed and why."""

    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def plan(recipe: Recipe, chosen: Sequence[Cell], directory: Path, places: Places) -> list[Job]:
    """Builds the studies of chosen cells, or the one of a recipe without a grid; writes nothing into ``directory``.

    Raises:
        ValueError: bad grammar, model or strategy; the cell is named.
    """
    if not recipe.grid:
        return [Job(cell, prepare(recipe, directory, places)) for cell in chosen]
    jobs = []
    for cell in chosen:
        with told_of(f"cell {cell.name}"):
            jobs.append(Job(cell, prepare(cell.recipe, directory / layout.CELLS / cell.name, places)))
    return jobs


def record(recipe: Recipe, directory: Path) -> None:
    """Writes what the grid consists of into its directory, for :mod:`jaxsafety.rundir.status`; any process may do so.

    Raises:
        ValueError: the directory holds another grid.
        OSError: it cannot be written.
    """
    listed = {
        cell.name: {"values": cell.values, "models": pipeline.steps(cell.recipe)} for cell in cells.expand(recipe)
    }
    with _waited_for(directory, recipe):
        opening.keep_files(directory / layout.FILES, pipeline.own_files(recipe))
        manifest_file.write_manifest(directory, {layout.CELLS: listed})


def run(
    jobs: Sequence[Job], stages: Sequence[str], *, open_: Callable[[Study], AbstractContextManager[None]],
    advance: Callable[[Study, str], None],
) -> Outcome:  # fmt: skip
    """Runs the stages of all cells that are not finished; a cell that fails stops no other.

    ``open_`` opens a cell's directory, ``advance`` runs one stage of one study to its end, if it is not finished.
    """
    outcome = Outcome()
    for job in jobs:
        with _kept(job, "start", outcome):
            # A cell that trained to its end with every lane dead has its checkpoints, and has failed.
            failed_in = (manifest_file.read_manifest(job.ready.directory).get("failed") or {}).get("stage")
            if failed_in not in stages and all(pipeline.is_finished(job.ready, name) for name in stages):
                outcome.skipped.append(job.cell.name)
                continue
        if job.cell.name not in outcome.failed:
            _run_cell(job, stages, outcome, open_, advance)
    return outcome


def _run_cell(
    job: Job, stages: Sequence[str], outcome: Outcome, open_: Callable[[Study], AbstractContextManager[None]],
    advance: Callable[[Study, str], None],
) -> None:  # fmt: skip
    with ExitStack() as held:
        with _kept(job, "start", outcome):
            try:
                held.enter_context(open_(job.ready))
            except locks.RunInUseError:
                outcome.in_use.append(job.cell.name)
                return
            if len(stages) == 1:
                pipeline.check_ready(job.ready, stages[0])
        for name in stages:
            if job.cell.name in outcome.failed:
                return
            with _kept(job, name, outcome):
                advance(job.ready, name)
        if job.cell.name not in outcome.failed:
            outcome.finished.append(job.cell.name)


@contextmanager
def _kept(job: Job, stage: str, outcome: Outcome) -> Iterator[None]:
    """Turns an error into the failure of a cell, told at the end and kept in its manifest."""
    try:
        with manifest_file.failure_kept(job.ready.directory, stage):
            yield
    except signals.Stopped:
        raise
    except Exception as error:
        if not is_told(error):
            traceback.print_exc()
        outcome.failed[job.cell.name] = f"{stage}: {manifest_file.reason(error)}"


@contextmanager
def _waited_for(directory: Path, recipe: Recipe) -> Iterator[None]:
    """Opens a directory that another process of the same grid may be at work in."""
    with ExitStack() as lock:
        for attempt in itertools.count():
            try:
                lock.enter_context(opening.open_run(directory, as_dict(recipe)))
                break
            except locks.RunInUseError:
                if not attempt:
                    progress.say(f"waiting for another process to end its work in {directory}")
                signals.check(f"while another process works in {directory}")
                time.sleep(_POLL_S)
        yield
