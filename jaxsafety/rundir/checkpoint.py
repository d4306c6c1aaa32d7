"""Checkpoints of a whole training state: written atomically, verified on load, never loaded in part.

``directory/<step, 8 digits>`` is one Orbax checkpoint (``ocp.load`` reads it) of a flat dict from path, such as
``params/blocks/mlp/up``, to host array, so that neither record nor optax class names are part of the format, plus
``digests.json``: the type of every leaf and the BLAKE2b digests of every leaf and file. A directory of that name is
complete, because it gets its name by a rename after everything in it reached the disk; everything unfinished lives in
``directory/.unfinished``. One process writes: callers hold the run directory's lock.
"""

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxsafety.rundir import atomic
from jaxsafety.rundir.layout import steps

_UNFINISHED = ".unfinished"
_DIGESTS = "digests.json"
_METADATA_BYTES = 2**20  # room for Orbax's own files beside the arrays
_RETRIES_S = (0.01, 0.1, 0.5)
_SHOWN = 5  # differences named in one message
_blake2b = functools.partial(hashlib.blake2b, digest_size=32)


class _DamagedError(Exception):
    """The files of a checkpoint are not the ones that were written."""


def save(directory: Path, tree: Any, *, step: int, keep: int = 2) -> None:
    """Writes ``directory/<step>`` atomically, then deletes all but the newest ``keep`` checkpoints.

    A kill at any moment, or a full disk, leaves the earlier checkpoints as they were. A checkpoint of the same step
    is replaced. ``tree`` is a pytree of arrays (any dtype NumPy or ml_dtypes knows), every one addressable from this
    process.

    Raises:
        ValueError: ``step`` < 0 or ``keep`` < 1.
        OSError: the directory cannot be written or the disk is full. What was written is deleted; what TensorStore's
            threads still write after that stays in ``.unfinished``, until the next save deletes it.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"a checkpoint needs step >= 0 and keep >= 1, got step {step} and keep {keep}")
    leaves = {name: np.asarray(leaf) for name, leaf in jax.device_get(_by_path(tree)).items()}
    final = _path(directory, step)
    try:
        with _scratch(directory) as scratch:
            _reserve(scratch, sum(leaf.nbytes for leaf in leaves.values()) + _METADATA_BYTES)
            _write(scratch / "new", leaves)
            if final.exists():
                final.rename(scratch / "replaced")
            (scratch / "new").rename(final)
            atomic.sync(directory)
            _drop(directory, steps(directory)[:-keep], scratch)
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore reports a full disk as a ValueError
        raise OSError(
            f"cannot save checkpoint {final} ({_reason(error)}): free some space there or choose another directory; "
            "earlier checkpoints are intact"
        ) from error


def prune(directory: Path, *, keep: int) -> None:
    """Deletes all but the newest ``keep`` checkpoints; a kill at any moment leaves every other whole."""
    if extra := steps(directory)[:-keep]:
        with _scratch(directory) as scratch:
            _drop(directory, extra, scratch)


def _drop(directory: Path, old: list[int], scratch: Path) -> None:
    # Renamed before it is deleted: half a deletion must not look like a checkpoint.
    for step in old:
        _path(directory, step).rename(scratch / str(step))


def latest(directory: Path) -> int | None:
    """Returns the step of the newest complete checkpoint in ``directory``, None if there is none."""
    return max(steps(directory), default=None)


def load(directory: Path, like: Any, *, step: int | None = None) -> tuple[Any, int]:
    """Loads what :func:`save` wrote bit for bit, after checking its structure, shapes, dtypes and digests.

    ``like`` is a pytree of arrays or ``jax.ShapeDtypeStruct`` of the wanted structure; a leaf's sharding says where it
    goes, a leaf without one goes to the default device. ``step`` None is the newest.

    Returns:
        The tree, with the structure of ``like`` and ``jax.Array`` leaves, and its step.

    Raises:
        ValueError: no such checkpoint; it does not fit ``like`` (both sides are named); or its files are damaged (for
            the newest, the sentence says how to go on from an intact one).
    """
    known = steps(directory)
    if not known or (step is not None and step not in known):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise ValueError(f"no {wanted} in {directory}: the steps there are {', '.join(map(str, known)) or 'none'}")
    chosen = known[-1] if step is None else step
    expected = _by_path(like)
    try:
        host = _read(_path(directory, chosen), expected)
    except _DamagedError as error:
        # No other step replaces one that was asked for: what to do, its caller knows.
        advice = f": {_advice(directory, known[:-1], expected)}" if step is None else ""
        raise ValueError(f"checkpoint {_path(directory, chosen)} is damaged ({error}){advice}") from error
    leaves = [jax.device_put(host[name], _placement(leaf)) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), chosen


def _path(directory: Path, step: int) -> Path:
    return directory / f"{step:08d}"


def _by_path(tree: Any) -> dict[str, Any]:
    flat = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(named) != len(flat):
        raise ValueError("two leaves of the tree have the same path: dict keys must not contain '/'")
    return named


def _placement(leaf: Any) -> jax.sharding.Sharding | None:
    # An uncommitted array stays uncommitted, or a resumed run would compile a different program from a fresh one.
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _type(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _leaf_digest(leaf: np.ndarray) -> str:
    digest = _blake2b(_type(leaf).encode())
    digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _file_digests(path: Path) -> dict[str, str]:
    digests = {}
    for file in path.rglob("*"):
        if file.is_file() and file.name != _DIGESTS:
            with file.open("rb") as content:
                digests[file.relative_to(path).as_posix()] = hashlib.file_digest(content, _blake2b).hexdigest()
    return digests


def _seal(record: dict[str, Any]) -> str:
    return _blake2b(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """A new empty directory in ``directory/.unfinished``, of which everything is deleted, now or by the next save."""
    unfinished = directory / _UNFINISHED
    _remove(unfinished)
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        # A name of its own: TensorStore's threads outlive a failed save, and must not write into a later one.
        yield Path(tempfile.mkdtemp(dir=unfinished))
    finally:
        _remove(unfinished)


def _remove(path: Path) -> None:
    for wait_s in _RETRIES_S:
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(wait_s)


def _reserve(scratch: Path, size: int) -> None:
    """Claims ``size`` bytes and gives them back, so that a full disk or quota shows before Orbax's threads start."""
    if not hasattr(os, "posix_fallocate"):
        return
    probe = scratch / "space"
    with probe.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    probe.unlink()


def _write(path: Path, leaves: dict[str, np.ndarray]) -> None:
    # Orbax refuses empty arrays and relative paths.
    with _quiet(), _alone():
        ocp.save(path.absolute(), {name: leaf for name, leaf in leaves.items() if leaf.size})
    types = {name: _type(leaf) for name, leaf in leaves.items()}
    digests = {name: _leaf_digest(leaf) for name, leaf in leaves.items()}
    record = {"types": types, "leaves": digests, "files": _file_digests(path)}
    (path / _DIGESTS).write_text(json.dumps(record | {"seal": _seal(record)}))
    for root, _, files in os.walk(path):
        for name in [*files, "."]:
            atomic.sync(Path(root, name))


@contextmanager
def _alone() -> Iterator[None]:
    """Lets Orbax work for this process, which waits for no other and has no limits of time.

    It takes those by the wall clock, a leap of which would fail a save. Of several processes one saves; Orbax would ask
    the others for the path even so (its ``active_processes`` does not reach that question), and they would not answer.
    """
    context, here = ocp.Context(), jax.process_index()
    context.asynchronous.timeout_secs = None
    # Made in the background, directories are waited for five minutes at most, by the same clock.
    context.asynchronous.create_directories_asynchronously = False
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = here, {here}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{here}"
    with _sole() if jax.process_count() > 1 else nullcontext(), context:
        yield


@contextmanager
def _sole() -> Iterator[None]:
    """Has Orbax count one process; the only place that reaches behind its public names, for runs of several hosts."""
    try:
        from orbax.checkpoint.experimental.v1._src.synchronization import multihost
    except ImportError as error:
        raise ImportError(
            "this version of orbax-checkpoint keeps its count of processes elsewhere, so one of several hosts can't "
            "save alone: expected a version of constraints.txt"
        ) from error
    count = multihost.process_count
    multihost.process_count = lambda: 1
    try:
        yield
    finally:
        multihost.process_count = count


def _read(path: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """Reads every leaf to the host; raises ValueError where it does not fit, _DamagedError where it is not intact."""
    record = _record(path)
    _check_fits(path, record["types"], expected)
    # Before Orbax sees them, whose threads print tracebacks of their own for a damaged file.
    files = _file_digests(path)
    for name in sorted(files.keys() | record["files"].keys()):
        if files.get(name) != record["files"].get(name):
            state = "missing" if name not in files else "altered" if name in record["files"] else "foreign"
            raise _DamagedError(f"file {name} is {state}")
    wanted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in expected.items()}
    with _quiet(), _alone():
        found = wanted | ocp.load(path.absolute(), {name: leaf for name, leaf in wanted.items() if leaf.size})
    for name, leaf in found.items():
        if _leaf_digest(leaf) != record["leaves"][name]:
            raise _DamagedError(f"{name} has other values than were saved")
    return found


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / _DIGESTS).read_bytes())
        seal = record.pop("seal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"file {_DIGESTS} is unreadable") from error
    if seal != _seal(record):
        raise _DamagedError(f"file {_DIGESTS} is altered")
    return record


def _check_fits(path: Path, recorded: dict[str, str], expected: dict[str, Any]) -> None:
    types = {name: _type(leaf) for name, leaf in expected.items()}
    differences = [
        f"{name}: found {recorded.get(name, 'nothing')}, expected {types.get(name, 'nothing')}"
        for name in sorted(recorded.keys() | types.keys())
        if recorded.get(name) != types.get(name)
    ]
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ValueError(f"checkpoint {path} is of another state: {'; '.join(differences[:_SHOWN])}{more}")


def _advice(directory: Path, earlier: list[int], expected: dict[str, Any]) -> str:
    for step in reversed(earlier):
        try:
            _read(_path(directory, step), expected)
        except (_DamagedError, ValueError):
            continue
        return f"remove it to continue from step {step} ({_path(directory, step)}), which is intact"
    return f"remove {directory}, which holds no intact one, to train {directory.name} again from the start"


def _reason(error: Exception) -> str:
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops Orbax's log records: it logs the tracebacks of errors that it then raises, and we report."""

    def is_foreign(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(is_foreign)
    try:
        yield
    finally:
        logger.removeFilter(is_foreign)
