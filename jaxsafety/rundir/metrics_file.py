"""``metrics.jsonl``: JSON lines, each flushed as it is written.

What follows the last newline is a line that a kill tore off, and is ignored.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsafety.rundir.atomic import atomic_write, plain


def append_metrics(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows, one JSON object a line, null for a number that is not finite; an OSError says what to do."""
    path = directory / "metrics.jsonl"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        with path.open("a") as file:
            for row in rows:
                file.write(json.dumps(plain(row), allow_nan=False) + "\n")
                file.flush()
            # On the disk before the checkpoint of the same step is, or the power failing between loses rows for good.
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error.strerror}): free some space there, or see that it may be written, and resume"
        ) from error


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Returns the rows without a torn last line, none if there is no file; ValueError at a line that is no object."""
    path = directory / "metrics.jsonl"
    return [_row(path, number, line) for number, line in enumerate(_lines(path), 1)]


def truncate_metrics(directory: Path, *, of: Sequence[Mapping[str, Any]], after_step: int) -> None:
    """Drops rows with a step beyond ``after_step``, atomically; other lines stay byte for byte.

    Those that have all the fields of one of ``of``. Called on resume, so that a killed and resumed run leaves the file
    of an uninterrupted one. Nothing happens where there is no ``metrics.jsonl``.

    Raises:
        ValueError: a line before the last is not a JSON object.
    """
    path = directory / "metrics.jsonl"
    if not path.exists():
        return

    # By the names that they are labelled with: a run may have thousands.
    wanted: dict[tuple[str, ...], set[tuple[Any, ...]]] = {}
    for one in of:
        wanted.setdefault(tuple(one), set()).add(tuple(one.values()))

    def is_kept(row: dict[str, Any]) -> bool:
        is_of = any(tuple(map(row.get, names)) in values for names, values in wanted.items())
        return not is_of or row.get("step", after_step) <= after_step

    kept = [line for number, line in enumerate(_lines(path), 1) if is_kept(_row(path, number, line))]
    atomic_write(path, b"".join(line + b"\n" for line in kept))


def _lines(path: Path) -> list[bytes]:
    content = path.read_bytes() if path.exists() else b""
    return content.split(b"\n")[:-1]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is not JSON: remove that line to go on") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} of {path} is not a JSON object: remove that line to go on")
    return row


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if size and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
