"""Several processes as one: all compute the same programs on their share of the seeds, and process 0 has the disk.

With one process every function here is the plain thing. With several (``jax.distributed``) all run the same code, and
whatever depends on the disk, the clock or a signal is decided by one and told to the others, so that none goes another
way. Nothing here is inside a program: a chunk of training has no collective. All raise ``LostError`` where another
process has died.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsafety.config.told import is_told
from jaxsafety.engine.cluster import LostError
from jaxsafety.rundir import signals

# The errors that keep their kind, and with it the exit code, on their way to the other processes, unless they are bugs.
_KINDS = {kind.__name__: kind for kind in (ValueError, OSError, ImportError, FloatingPointError)}
_LENGTH_BYTES = 8
_MIN_BYTES = 1024  # what is told is padded to a power of two: few sizes, few programs


def is_first() -> bool:
    """Whether this process is the one that reads, writes and reports."""
    return jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Returns the arrays of a tree as NumPy arrays, whole on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def one(leaf: Any) -> np.ndarray:
        spread_out = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return multihost_utils.process_allgather(leaf, tiled=True) if spread_out else np.asarray(leaf)

    with _connected():
        return jax.tree.map(one, tree)


def decide(make: Callable[[], Any]) -> Any:
    """Returns on every process what ``make`` returns on process 0, which alone calls it; its error is raised on all.

    ``make`` reads or writes the disk and returns what JSON can hold. On the other processes its error has the same
    message.
    """
    if jax.process_count() == 1:
        return make()
    value, error = None, None
    if is_first():
        try:
            value = make()
        except Exception as raised:
            error = raised
    kind = next((name for name, kind in _KINDS.items() if error and isinstance(error, kind) and is_told(error)), "")
    told = _tell({"value": value, "error": error and [kind, str(error)]})
    if error is not None:
        raise error
    if told["error"]:
        kind, message = told["error"]
        raise _KINDS.get(kind, RuntimeError)(message)
    return told["value"]


def agree(own: dict[str, Any]) -> None:
    """Checks that every process has the same ``own``, field to what JSON can hold: process 0 records its own for all.

    Raises:
        ValueError: one has something else, on all of them.
    """
    if jax.process_count() == 1:
        return
    mine = json.loads(json.dumps(own))
    first = decide(lambda: own)
    differing = [name for name in sorted(first | mine) if json.dumps(first.get(name)) != json.dumps(mine.get(name))]
    with _connected():
        differs = multihost_utils.process_allgather(np.int32(bool(differing)))
    if not differs.any():
        return
    if differing:
        name = differing[0]
        told = f"{name} is {mine.get(name)!r} here and {first.get(name)!r} in process 0"
    else:
        told = f"process {int(differs.argmax())} has another recipe, command or version than process 0"
    raise ValueError(f"the processes of a run must be started alike, and {told}: start the same command on all hosts")


def least(number: int) -> int:
    """Returns the least number that a process has, 0 <= number < 2^63; they are told as bytes, as in :func:`load`."""
    if jax.process_count() == 1:
        return number
    own = np.frombuffer(number.to_bytes(_LENGTH_BYTES, "big"), np.uint8)
    with _connected():
        return min(int.from_bytes(row.tobytes(), "big") for row in multihost_utils.process_allgather(own))


def load(read: Callable[[Any], Any], like: Any) -> Any:
    """Returns the arrays that ``read`` loads, placed as the shardings of ``like`` say; process 0 alone reads.

    ``read`` takes the shapes to load, with their placement; ``like`` is a pytree of ``jax.ShapeDtypeStruct`` with a
    sharding each. What ``read`` raises is raised on all.
    """
    if jax.process_count() == 1:
        return read(like)
    host = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)

    def read_here() -> None:
        nonlocal host
        unplaced = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        host = jax.device_get(read(unplaced))

    decide(read_here)

    def spread(leaf: jax.ShapeDtypeStruct, own: np.ndarray) -> jax.Array:
        # As bytes: the sum that a broadcast is would make 0.0 of -0.0.
        whole = _broadcast(np.ascontiguousarray(own).reshape(-1).view(np.uint8))
        whole = whole.view(leaf.dtype).reshape(leaf.shape)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])

    return jax.tree.map(spread, like, host)


def check(where: str) -> None:
    """Ends the run here if any of its processes has been asked to; see :func:`jaxsafety.rundir.signals.check`.

    Raises:
        Stopped: a signal has asked to.
    """
    if jax.process_count() == 1:
        signals.check(where)
        return
    with _connected():
        number = int(multihost_utils.process_allgather(np.int32(signals.asked())).max())
    if number:
        raise signals.Stopped(number, where)


def _tell(message: Any) -> Any:
    """Returns on every process the message of process 0, which JSON can hold."""
    text = json.dumps(message).encode() if is_first() else b""
    # All must agree on the size of what they exchange before they do.
    size = int(_broadcast(np.frombuffer(len(text).to_bytes(_LENGTH_BYTES, "big"), np.uint8)).tobytes().hex(), 16)
    room = max(_MIN_BYTES, 1 << (size - 1).bit_length())
    return json.loads(_broadcast(np.frombuffer(text.ljust(room, b" "), np.uint8)).tobytes())


def _broadcast(data: np.ndarray) -> np.ndarray:
    with _connected():
        return np.asarray(multihost_utils.broadcast_one_to_all(data))


@contextmanager
def _connected() -> Iterator[None]:
    """Turns what a collective raises into a sentence."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # as one or the other, by what failed
        reason = str(error).partition("\n")[0]
        raise LostError(
            f"process {jax.process_index()} has lost another process of this run ({reason}): nothing that was saved is "
            "lost, and the same command, started on all hosts again, continues"
        ) from error
