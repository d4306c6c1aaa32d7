"""A first signal is a request that is answered at a safe place, a second one ends the process; handlers come back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from jaxsafety.rundir import signals


def raised(number):
    """Sends the signal to this process, as the kernel does; its handler has run on return."""
    signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_told_at_once_and_answered_at_the_next_check(number):
    told, heard = [], threading.Event()
    with signals.deferred(lambda name: (told.append(name), heard.set())):
        signals.check("too early")
        raised(number)
        assert heard.wait(10)
        with pytest.raises(signals.Stopped, match=f"^stopped by {number.name} after step 2$") as stop:
            signals.check("after step 2")
    assert told == [number.name] and stop.value.number == number


def test_handlers_come_back_and_nothing_is_left_asked():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with pytest.raises(signals.Stopped), signals.deferred(lambda _: None):
        raised(signal.SIGTERM)
        signals.check("here")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(wakeup) == wakeup
    signals.check("a library that installed nothing")


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.deferred(pytest.fail):
            raised(signal.SIGINT)
            signals.check("a background job whose shell ignores Ctrl-C for it")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_change_nothing():
    handlers = []

    def work():
        with signals.deferred(pytest.fail):
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


# Hashing holds the main thread in C, as a compilation does, and lets other threads run: no Python handler runs
# meanwhile.
BUSY = """
import hashlib
from jaxsafety.rundir import signals

with signals.deferred(lambda name: print(name, flush=True)):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_even_inside_a_long_call(second):
    command = [sys.executable, "-c", f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{BUSY}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "SIGTERM\n"
            process.send_signal(second)
            assert process.wait(30) == 128 + second
        finally:
            process.kill()
