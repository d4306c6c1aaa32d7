"""How far a run, or every cell of a grid, is: a table from what lies in the directory. Imports no jax.

A cell is *running* while a process holds its lock, *failed* with the reason in its manifest, *done* once all stages
have left their files, else *waiting*, however far it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxsafety.config import yaml12
from jaxsafety.config.names import EARLIER, other_version
from jaxsafety.rundir import layout, locks, manifest_file, printed
from jaxsafety.rundir.printed import Form

_FILE_STAGES = ("evaluate", "analyze", "report")


@dataclass(frozen=True)
class Progress:
    """One run directory, or one cell.

    ``steps`` are by model (done, total), summed over its lanes; ``stages`` whether evaluate, analyze and report are
    done. ``state`` is ``done``, ``running``, ``failed`` or ``waiting``; ``reason`` why it failed, else empty.
    """

    name: str
    steps: dict[str, tuple[int, int]]
    stages: dict[str, bool]
    state: str
    reason: str


def read(directory: Path) -> list[Progress]:
    """Returns the progress of a run, or of every cell of a grid in the grid's order.

    Raises:
        ValueError: ``config.yaml`` or a manifest is damaged, or of an earlier version.
    """
    manifest = manifest_file.read_manifest(directory)
    if not (listed := manifest.get(layout.CELLS)):
        models = manifest["models"] if "models" in manifest else _begun(directory)
        return [_progress(directory, directory.name, models)]
    try:
        models = {name: dict(about["models"]) for name, about in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{directory / 'manifest.json'} lists no cells: move it away and run the grid again"
        ) from error
    return [_progress(directory / layout.CELLS / name, name, own) for name, own in models.items()]


def render(rows: list[Progress], form: Form = "table") -> str:
    """Returns steps done of total per model, stages and state; a table has a summary where there are several rows."""
    if form in ("json", "csv"):
        return printed.records([_record(row) for row in rows], form)
    head = ["run" if len(rows) == 1 else "cell", *rows[0].steps, *_FILE_STAGES, "state"]
    cells = [list(_cells(row)) for row in rows]
    if form == "markdown":
        return printed.pipe_table(head, cells)
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (head, *cells)]
    if len(rows) > 1:
        states = [row.state for row in rows]
        counts = (f"{states.count(state)} {state}" for state in ("done", "running", "failed", "waiting"))
        lines.append(f"{len(rows)} cells: {', '.join(counts)}")
    return "\n".join(lines) + "\n"


def _record(row: Progress) -> dict[str, Any]:
    """A row for a program: what stands in a table as one text, apart."""
    steps = {
        f"{name} {what}": n for name, both in row.steps.items() for what, n in zip(("done", "steps"), both, strict=True)
    }
    return {"name": row.name, **steps, **row.stages, "state": row.state, "reason": row.reason}


def _cells(row: Progress) -> Iterator[str]:
    yield row.name
    yield from (f"{done}/{total}" for done, total in row.steps.values())
    yield from ("done" if done else "-" for done in row.stages.values())
    yield f"{row.state}: {row.reason}" if row.reason else row.state


def _begun(directory: Path) -> dict[str, Any]:
    """The models of a run whose manifest has none: nothing has begun, or it is no study of this version."""
    path, content = directory / "config.yaml", None
    try:
        content = yaml12.load(path.read_text())
        return {label: {} for label in content["models"]}
    # Bytes that are no text are a ValueError.
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        if isinstance(content, dict) and content.keys() & {*EARLIER}:
            raise ValueError(other_version(directory)) from error
        raise ValueError(
            f"{path} is not the configuration of a study: expected a directory that `jaxsafety run` made"
        ) from error


def _progress(directory: Path, name: str, models: dict[str, dict[str, int]]) -> Progress:
    steps = {
        label: (sum(_done(directory, *one) for one in own.items()), sum(max(total, 1) for total in own.values()))
        for label, own in models.items()
    }
    stages = {stage: layout.finished_files(directory, stage) for stage in _FILE_STAGES}
    whole = all(done == total for done, total in steps.values()) and all(stages.values())
    reason = _failure(directory)
    if locks.is_in_use(directory):
        state, reason = "running", ""
    elif reason:
        state = "failed"
    else:
        state = "done" if whole else "waiting"
    return Progress(name, steps, stages, state, reason)


def _failure(directory: Path) -> str:
    try:
        failed = manifest_file.read_manifest(directory).get("failed")
    except ValueError as error:  # of one cell; the table still tells of the others
        return f"start: {error}"
    return f"{failed.get('stage')}: {failed.get('reason')}" if isinstance(failed, dict) else ""


def _done(directory: Path, lane: str, total: int) -> int:
    """Steps of a lane; of one that is not trained, 1 once it is there."""
    state = directory / layout.CHECKPOINTS / lane
    adapter = (directory / layout.ADAPTERS / lane / "adapter_config.json").is_file() and not state.exists()
    if adapter or (directory / layout.MODELS / lane / "config.json").is_file():
        return max(total, 1)
    found = layout.steps(state)
    return min(max(found, default=0), total) if total else len(found[:1])
