"""Files that are replaced whole or not at all, and values as JSON knows them."""

import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from jaxsafety.rundir import flock

_TEMPORARY = ".jaxsafety-{}.tmp"


def sync(path: Path) -> None:
    """Brings a file's content, or a directory's list of names, to the disk, or raises an OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file so that a reader, a kill or a full disk finds either the old content or all of the new.

    A link stays one; a device or a pipe is written to, as root could replace even these.

    Raises:
        NoLocksError: this system has no locks by which what a killed writer left could be told from what is written.
        OSError: the file cannot be written; the old content is intact.
    """
    content = data.encode() if isinstance(data, str) else data
    flock.check()
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        place = Path(os.path.realpath(path))
        with _temporary(place.parent) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(place)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}): free some space or choose another place") from error


@contextmanager
def _temporary(folder: Path) -> Iterator[BinaryIO]:
    """A new file in ``folder`` for what replaces another; deletes those that killed processes left there.

    Its writer holds the kernel's lock of it, which ends with the process: neither process numbers, which come again and
    differ between hosts, nor ages need to tell who is dead. The name is drawn, as one that comes again could be deleted
    in the hands of its next writer.
    """
    for leftover in folder.glob(_TEMPORARY.format("*")):
        with suppress(OSError), leftover.open("rb+") as dead:
            flock.take(dead)
            leftover.unlink()
    file = _create(folder)
    try:
        with file:
            yield file
    finally:
        Path(file.name).unlink(missing_ok=True)


def _create(folder: Path) -> BinaryIO:
    while True:
        path = folder / _TEMPORARY.format(secrets.token_hex(8))
        file = path.open("xb")
        with suppress(OSError):  # where there are no locks, nobody can take one to delete
            flock.take(file, wait=True)
        if path.exists():
            return file
        file.close()  # deleted by another process before it was locked


def plain(value: Any) -> Any:
    """Returns ``value`` as JSON knows it: arrays as lists, paths as text, null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return plain(value.tolist()) if hasattr(value, "tolist") else value
