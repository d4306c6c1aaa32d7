"""SIGTERM and Ctrl-C as a request: the running chunk is finished and saved, then the run ends.

Only a program installs this; without it a library user's own handlers stay and :func:`check` does nothing.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked: list[int] = []  # signals are the whole process', and so is what was asked of it


class Stopped(Exception):
    """A run has ended where it was asked to, by the signal ``number``; all that it had finished is saved."""

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped by {signal.Signals(number).name} {where}")
        self.number = number


@contextmanager
def deferred(tell: Callable[[str], None]) -> Iterator[None]:
    """Makes SIGTERM and SIGINT a request that :func:`check` answers; a second signal ends the process at once.

    Outside the main thread, which alone may handle signals, nothing changes. A signal that is ignored stays ignored.
    ``tell`` is called with the name of the first signal, from another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader, tell), daemon=True)
    watcher.start()
    wakeup = signal.set_wakeup_fd(writer)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: _asked.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        watcher.join()
        os.close(reader)
        _asked.clear()


def check(where: str) -> None:
    """Ends the run here if it has been asked to; called where all that is finished is saved, or will be.

    ``where``, such as ``after step 200 of tune dpo``, is for the message.

    Raises:
        Stopped: a signal has asked to.
    """
    if number := asked():
        raise Stopped(number, where)


def asked() -> int:
    """Returns the number of the first signal that has asked to stop, 0 if none has."""
    return _asked[0] if _asked else 0


def _watch(reader: int, tell: Callable[[str], None]) -> None:
    """Counts signals as they come: the main thread may be inside a compilation or a chunk, where no handler runs."""
    seen = 0
    while number := os.read(reader, 1):
        if number[0] not in _SIGNALS:
            continue
        seen += 1
        if seen > 1:
            # Like a kill, which every file of a run survives.
            os._exit(128 + number[0])
        tell(signal.Signals(number[0]).name)
