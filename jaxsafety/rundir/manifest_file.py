"""``manifest.json``: what a run computed with, how long each stage took, and why one failed."""

import json
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxsafety.config.told import is_told
from jaxsafety.rundir import signals
from jaxsafety.rundir.atomic import atomic_write, plain
from jaxsafety.rundir.machine import environment


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns ``manifest.json``, empty if there is none; raises a ValueError if it is not JSON."""
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: move it away to start a new one") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is not a manifest: move it away to start a new one")
    return manifest


def write_manifest(directory: Path, fields: Mapping[str, Any]) -> None:
    """Merges ``fields`` into ``manifest.json``, nested mappings key by key, and replaces the file atomically.

    Raises what :func:`read_manifest` and :func:`jaxsafety.rundir.atomic.atomic_write` do.
    """
    merged = _merge(read_manifest(directory), plain(fields))
    atomic_write(directory / "manifest.json", json.dumps(merged, indent=2, allow_nan=False) + "\n")


@contextmanager
def timed(directory: Path, name: str, fields: Mapping[str, Any]) -> Iterator[None]:
    """Records in the manifest under ``name`` what a command runs on, and its seconds over all its processes.

    ``fields`` are recorded beside them.
    """
    before, started = read_manifest(directory).get(name, {}).get("seconds", 0.0), time.monotonic()
    write_manifest(directory, {name: dict(fields) | environment()})
    try:
        yield
    finally:
        seconds = before + time.monotonic() - started
        # On a full disk the error that ended the command is the one to be told.
        with suppress(OSError):
            write_manifest(directory, {name: {"seconds": round(seconds, 1)}})


@contextmanager
def failure_kept(directory: Path, stage: str) -> Iterator[None]:
    """Keeps in the manifest, as ``failed``, why a stage ended in an error, which goes on its way; a signal is none."""
    try:
        yield
    except signals.Stopped:
        raise
    except Exception as error:
        about = {"stage": stage, "reason": reason(error)}
        if not is_told(error):
            about["traceback"] = traceback.format_exc()
        # What made the stage fail may keep the manifest from being written too.
        with suppress(OSError, ValueError):
            directory.mkdir(parents=True, exist_ok=True)
            write_manifest(directory, {"failed": about})
        raise


def reason(error: Exception) -> str:
    """Returns an error's message on one line, with its type where it is no sentence for the user."""
    text = " ".join(str(error).split())
    return text if is_told(error) else f"{type(error).__name__}: {text}"


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merge(old.get(key), value) for key, value in new.items()}
