"""Runs the stages of a recipe, or of the cells of its grid, as the console script does: locked, stoppable, on record.

Once jax is configured, everything between the command line and the stages is here.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import jax

from jaxsafety.engine import hosts, sweep
from jaxsafety.formats import sources
from jaxsafety.formats.sources import Places
from jaxsafety.recipe import cells
from jaxsafety.recipe.cells import Cell
from jaxsafety.recipe.schema import Recipe, as_dict
from jaxsafety.rundir import atomic, layout, locks, machine, manifest_file, opening, printed, signals, status
from jaxsafety.rundir.printed import Form
from jaxsafety.study import forecast as forecasts
from jaxsafety.study import grids, pipeline
from jaxsafety.study import stages as stages_
from jaxsafety.study.pipeline import Study

# What a run directory says of itself before any work.
_RECORDS = ("config.yaml", "inputs.yaml")


def run(recipe: Recipe, directory: Path, stages: Sequence[str], *, form: Form = "table") -> int:
    """Runs stages of a recipe without a grid that are not finished; returns the exit code.

    ``form`` is that of what the report prints.

    Raises:
        ValueError: bad grammar, model or strategy; a stage before is not finished; the directory is another run's.
        OSError: it cannot be written.
        FloatingPointError: every lane of a stage has diverged.
        Stopped: a signal has asked to stop.
    """
    read = tuple(stages) == ("report",)
    ready = stages_.made(recipe, directory) if read else stages_.prepare(recipe, directory, _places())
    if not read:
        hosts.agree(_told(recipe, stages))
        _say_idle_devices(recipe)
    if len(stages) == 1:
        pipeline.check_ready(ready, stages[0])
    with signals.deferred(say_stopping), _unused_dropped(directory), _growth_undone(directory), ExitStack() as lock:
        hosts.decide(lambda: _open(ready, lock, read=read))
        for stage in stages:
            with manifest_file.failure_kept(directory, stage) if hosts.is_first() else nullcontext():
                _advance(ready, stage, form=form)
    return 0


def _places() -> Places:
    """Where this process looks for models that recipes name."""
    return sources.from_environment(os.environ)


def _told(recipe: Recipe, stages: Sequence[str]) -> dict[str, object]:
    """What the processes of one run have in common; the subject's files count by their content."""
    about = pipeline.subject_told(recipe, pipeline.own_files(recipe))
    told = {name: one for name, one in as_dict(recipe).items() if name != "subject"}
    return opening.flat(told) | about | {"stages": list(stages), **machine.versions()}


def _open(ready: Study, lock: ExitStack, *, read: bool = False) -> None:
    """Locks the directory and puts the study on record, or of one that is only ``read`` checks that it is."""
    lock.enter_context(locks.hold(ready.directory))
    if read:
        defaults = stages_.as_read_today(ready.directory)
        opening.check_config(ready.directory / "config.yaml", as_dict(ready.recipe), defaults=defaults)
    else:
        stages_.record(ready)
    manifest_file.write_manifest(ready.directory, {"models": pipeline.steps(ready.recipe), "failed": None})


def _unused_dropped(directory: Path) -> AbstractContextManager[None]:
    """Leaves nothing of a run that ends in bad input before its work has begun."""
    begun = (layout.CHECKPOINTS, layout.MODELS, layout.ADAPTERS, "metrics.jsonl", layout.FILES)
    # A study of checkpoints that writes no answers has these of nothing, before its analyses.
    empty = [f"results/{name}" for name in layout.RESULT_FILES]
    return opening.unused_dropped(
        directory, (".lock", "manifest.json", *_RECORDS, *empty),
        begun=lambda: bool(_pieces(directory)) or any((directory / name).exists() for name in begun),
    )  # fmt: skip


@contextmanager
def _growth_undone(directory: Path) -> Iterator[None]:
    """Leaves a run as it was, with its results, where more is asked of it in vain: bad input, and nothing made."""
    results = (f"results/{name}" for name in (*layout.RESULT_FILES, layout.ANALYSIS_FILE))
    places = [directory / name for name in (*_RECORDS, *results)]
    before, made = {place: place.read_bytes() for place in places if place.exists()}, _pieces(directory)
    try:
        yield
    except ValueError:
        changed = [place for place in before if not place.exists() or place.read_bytes() != before[place]]
        for place in changed if _pieces(directory) == made else ():
            atomic.atomic_write(place, before[place])
        raise


def _pieces(directory: Path) -> set[Path]:
    """What a study of checkpoints has measured, and written to prompts."""
    places = (place for name in ("analyze", "answers") for place in (directory / "results" / name).rglob("*"))
    return {place for place in places if place.is_file()}


@contextmanager
def _opened(ready: Study) -> Iterator[None]:
    with ExitStack() as lock:
        _open(ready, lock)
        yield


def run_grid(
    recipe: Recipe, chosen: Sequence[Cell], directory: Path, stages: Sequence[str], *, form: Form = "table"
) -> int:
    """Runs stages of chosen cells that are not finished; one that fails stops no other, and makes the exit code 1.

    What is printed at the end is the grid's status, in a ``form`` for programs.

    Raises:
        ValueError: bad grammar, model or strategy of a cell; the directory is another grid's.
        OSError: it cannot be written.
        Stopped: a signal has asked to stop.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"a grid runs in processes by themselves, and this one is one of {jax.process_count()}: give each a part "
            "of the cells with --shard i/n, which joins none"
        )
    jobs = grids.plan(recipe, chosen, directory, _places())
    _say_idle_devices(recipe)
    with signals.deferred(say_stopping):
        grids.record(recipe, directory)
        outcome = grids.run(jobs, stages, open_=_opened, advance=_advance)
    for name in outcome.in_use:
        print(f"jaxsafety: cell {name} is running in another process", file=sys.stderr)
    if form == "table":
        print(f"{len(outcome.finished)} cells finished, {len(outcome.skipped)} had been before; {directory}")
    else:
        sys.stdout.write(status.render(status.read(directory), form))
    for name, reason in outcome.failed.items():
        print(f"jaxsafety: cell {name} failed, {reason}", file=sys.stderr)
    return 1 if outcome.failed else 0


def forecast(recipe: Recipe, chosen: Sequence[Cell], directory: Path, *, form: Form = "table") -> int:
    """Prints what running the chosen cells would do; no run is written.

    Returns the exit code, 1 where something would not fit into memory, as what is printed says. Models that it reads
    are found first, as in a run: a GGUF file is converted, one on the Hub downloaded. Forms for programs hold a record
    a lane, without memory and time.
    """
    every = grids.plan(recipe, cells.expand(recipe), directory, _places())
    names = {cell.name for cell in chosen}
    planned = [job for job in every if job.cell.name in names]
    if form != "table":
        sys.stdout.write(printed.records(forecasts.records(planned), form))
        return 0
    told = forecasts.render(every, planned)
    sys.stdout.write(told.text)
    return 0 if told.fits else 1


def _advance(ready: Study, stage: str, *, form: Form = "table") -> None:
    """Runs one stage of one study to its end, if it is not finished."""
    if stage == "report":
        from jaxsafety.report import study_report

        table = hosts.decide(lambda: study_report.write(ready.directory, form=form))
        sys.stdout.write(table if hosts.is_first() else "")
    elif not pipeline.is_finished(ready, stage):
        about = {"strategy": ready.strategy, "processes": jax.process_count()}
        with ExitStack() as record:
            hosts.decide(lambda: record.enter_context(manifest_file.timed(ready.directory, stage, about)))
            stages_.work(ready)[stage](ready)
    hosts.check(f"after {stage}")


def say_stopping(name: str) -> None:
    """Says on standard error that a signal has come and what it does; for :func:`jaxsafety.rundir.signals.deferred`."""
    # A progress bar hides the cursor, and a second signal leaves no time to show it again.
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    print(
        f"{cursor}jaxsafety: {name}: stopping as soon as what runs is saved; once more stops at once", file=sys.stderr
    )


def _say_idle_devices(recipe: Recipe) -> None:
    if recipe.subject.of_files:
        return
    seeds, there = len(recipe.seeds), len(jax.devices())
    used = len(sweep.devices_of(seeds))
    # A CPU's idle cores still share the work inside an operation.
    if used < there and jax.default_backend() != "cpu" and hosts.is_first():
        print(
            f"jaxsafety: {seeds} seeds split evenly over {used} of {there} devices; the rest is idle", file=sys.stderr
        )
