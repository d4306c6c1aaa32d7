"""Joins the processes of one run, before jax starts: from flags, or from what SLURM, Open MPI or Kubernetes has set.

A process that ends takes the others with it within a bounded time, and every one of them says why. jax itself can only
abort where another process has died, so a small watcher process outlives this one and adds the sentence.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

_HEARTBEAT_S = 20  # a process not heard of for so long is dead
_START_S = 300  # for the last host to come up
_LEAVE_S = 10  # for all to have come to an orderly end
_SAID = b"said"
_JOINED = b"joined "
# Reads until this process says that it has spoken, or ends without that word, with the others or before it met them.
_WATCHER = f"""
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
told = sys.stdin.buffer.read()
if not told.endswith({_SAID}):
    os.write(2, sys.argv[2 if told else 1].encode())
"""
_watcher: subprocess.Popen | None = None


class LostError(OSError):
    """Another process of the run has died."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of its run.

    ``method`` is jax's name of the cluster that tells the rest, ``flags`` where the flags do. How many ``processes``
    there are, and which one this is, is None where only the cluster knows; ``coordinator`` is host and port of process
    0.
    """

    method: str
    processes: int | None
    process: int | None
    coordinator: str = ""


def from_flags(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """Returns the place that the flags give, None if none is given.

    Raises:
        ValueError: some are missing, or one is out of range.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) == len(given):
            return None
        raise ValueError(f"{', '.join(given)} go together, and {' and '.join(missing)} is missing")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator must be HOST:PORT of process 0, such as node1:5000, got {coordinator!r}")
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(f"--process must be in [0, --processes), got {process} of {processes}")
    return Place("flags", processes, process, coordinator)


def from_environment(environment: Mapping[str, str]) -> Place | None:
    """Returns the place that a launcher has given this process in ``os.environ``, None where it runs by itself.

    A batch script of SLURM without ``srun``, or a pod without an index, is a process by itself.
    """

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 0

    if number("SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        return Place("slurm", number("SLURM_STEP_NUM_TASKS"), number("SLURM_PROCID"))
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return Place("ompi", number("OMPI_COMM_WORLD_SIZE"), number("OMPI_COMM_WORLD_RANK"))
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return Place("k8s", None, None)
    return None


def join(place: Place) -> None:
    """Waits for the other processes and joins them; must come before jax touches a device.

    Raises:
        ImportError: Kubernetes without jax's extra for it.
        OSError: process 0 cannot be reached, or not all processes came in time; jax aborts in most such cases, and the
            watcher says so.
        ValueError: the launcher has not told all that jax needs to know.
    """
    import jax

    if place.method == "k8s":
        _check_kubernetes()
    # With flags every device of this process is its own; nothing is to be asked of a cluster.
    flags = place.method == "flags"
    _watch(place)
    try:
        jax.distributed.initialize(
            *((place.coordinator, place.processes, place.process) if flags else ()),
            cluster_detection_method="deactivate" if flags else place.method,
            initialization_timeout=_START_S,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_LEAVE_S,
        )
    except KeyError as error:
        # Such as Open MPI 5, which no longer names its own process.
        _tell_watcher()
        raise ValueError(
            f"{place.method} has told this process to be one of {place.processes}, but {error.args[0]}, by which jax "
            "finds the others, is not set: name --coordinator, --processes and --process"
        ) from error
    except RuntimeError as error:
        _tell_watcher()
        reason = str(error).partition("\n")[0]
        raise OSError(f"the processes of this run did not find each other ({reason})") from error
    _watcher.stdin.write(_JOINED)
    _watcher.stdin.flush()


def leave(code: int, *, lost: bool) -> None:
    """Ends this process, the others having come to the same end, or else soon to be ended; flush what is printed first.

    Returns only from success (``code`` 0), or in a process by itself. ``lost``: another process is known to have died,
    so that none is waited for.
    """
    if "jax" not in sys.modules:  # it may be why this process ends that jax does not start
        return
    import jax

    if not jax.distributed.is_initialized():
        return
    _tell_watcher()
    if not lost:
        with suppress(RuntimeError):
            jax.distributed.shutdown()
    if code:
        # Without jax's own farewell, which waits for those that are gone.
        os._exit(code)


def _watch(place: Place) -> None:
    global _watcher
    where = f"at {place.coordinator}" if place.coordinator else f"where {place.method} tells"
    who = "a process" if place.process is None else f"process {place.process} of {place.processes}"
    sentences = (
        f"jaxsafety: {who} of this run was ended before all had met, by a kill or because they did not within "
        f"{_START_S} s: start the same command on all hosts, and see that process 0 can be reached {where}\n",
        f"jaxsafety: {who} of this run was ended, by a kill or because another process had died: nothing that was "
        "saved is lost, and the same command, started on all hosts again, continues\n",
    )
    # A session of its own: Ctrl-C is for the run.
    _watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCHER, *sentences], stdin=subprocess.PIPE, start_new_session=True
    )


def _tell_watcher() -> None:
    if _watcher is not None:
        with suppress(OSError):
            _watcher.communicate(_SAID)


def _check_kubernetes() -> None:
    try:
        import kubernetes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'to join the pods of an indexed Job jax needs kubernetes: pip install "jax[k8s]", or name '
            "--coordinator, --processes and --process"
        ) from error
