"""The kernel's lock of an open file: it ends with the process, however that dies, and is never stale.

Where there is none, as on Windows, run directories cannot be kept from being written twice, and a sentence says so.
"""

from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None


class NoLocksError(ValueError):
    """This system has no such locks."""


def check() -> None:
    """Raises a NoLocksError where the operating system has no such locks."""
    if fcntl is None:
        raise NoLocksError(
            "this system has no locks of the kind that keep a run directory from being written twice: expected Linux "
            "or macOS (on Windows, its Subsystem for Linux)"
        )


def take(file: IO | int, *, shared: bool = False, wait: bool = False) -> None:
    """Takes the lock of a file, by its object or descriptor, until it is closed.

    ``shared`` goes with others that are shared; ``wait`` waits for whoever has it.

    Raises:
        BlockingIOError: another process has it.
        OSError: this file system has no locks.
        NoLocksError: this operating system has none.
    """
    check()
    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
