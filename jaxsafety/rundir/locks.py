"""The lock of a run directory: the kernel's, held for as long as a process works in it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from jaxsafety.rundir import flock

_LOCK_RETRIES_S = (0.02, 0.05, 0.1)  # longer than a look at the lock takes


class RunInUseError(ValueError):
    """Another process holds the run directory."""


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Creates a directory if it is absent and holds its lock for the duration of the context.

    The lock is the kernel's: it ends with the process, however that dies, and is never stale.

    Raises:
        RunInUseError: another process holds the directory.
        NoLocksError: this system has no such locks.
        OSError: the directory cannot be created or written.
    """
    flock.check()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("a+")
    except OSError as error:
        raise OSError(f"cannot write to the run directory {directory} ({error.strerror}): choose another") from error
    with lock:
        try:
            _take(lock)
            lock.truncate(0)
            os.write(lock.fileno(), str(os.getpid()).encode())
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise RunInUseError(
                f"the run directory {directory} is in use by another process ({holder}): wait for it to end or "
                "choose another directory"
            ) from error
        except OSError as error:
            raise OSError(f"cannot lock the run directory {directory} ({error.strerror}): choose another") from error
        yield


def _take(lock: IO[str]) -> None:
    for wait_s in _LOCK_RETRIES_S:
        with suppress(BlockingIOError):
            return flock.take(lock)
        time.sleep(wait_s)
    flock.take(lock)


def is_in_use(directory: Path) -> bool:
    """Whether a process holds the run directory's lock, which is looked at for a moment only."""
    path = directory / ".lock"
    if not path.exists():
        return False
    with path.open() as lock:
        try:
            flock.take(lock, shared=True)
        except BlockingIOError:
            return True
    return False
