"""Directories that appear under their name only when all of their content is on the disk.

What is unfinished lies beside it under a hidden name, which its writer holds by the kernel's lock until it ends.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxsafety.rundir import atomic, flock


@contextmanager
def directory(place: Path) -> Iterator[Path]:
    """Makes a folder to write into, which becomes ``place`` at the end, unless what is done in it fails.

    Folders that killed writers left are deleted.

    Raises:
        ValueError: there is something else at ``place`` than an empty directory.
        OSError: it cannot be written; nothing is left there.
    """
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{place} exists and is not an empty directory: choose another one to write to")
    try:
        with _unfinished(place) as scratch:
            yield scratch
            atomic.sync(scratch)
            scratch.rename(place)
            atomic.sync(place.absolute().parent)
    except OSError as error:
        raise OSError(
            f"cannot write {place} ({error.strerror or error}): free some space there or choose another place"
        ) from error


@contextmanager
def _unfinished(place: Path) -> Iterator[Path]:
    """A new directory beside ``place``, deleted unless it is renamed; deletes those that killed writers left."""
    parent, prefix = place.absolute().parent, f".{place.name}.unfinished-"
    flock.check()
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{prefix}*"):
        with suppress(OSError), _locked(leftover):
            shutil.rmtree(leftover)
    scratch = parent / f"{prefix}{secrets.token_hex(8)}"
    scratch.mkdir()
    try:
        with _locked(scratch):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flock.take(descriptor)
        yield
    finally:
        os.close(descriptor)
