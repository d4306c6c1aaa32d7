"""What a run directory holds besides checkpoints: lock, ``config.yaml``, ``manifest.json``, ``metrics.jsonl``.

Functions over the directory's path. Every whole file is replaced atomically; metrics are JSON lines, each flushed as
it is written, so what follows the last newline is a line that a kill tore off, and is ignored. Nothing here imports
jax at import time.
"""

import fcntl
import json
import math
import os
import platform
import secrets
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any, BinaryIO

import yaml

from jaxsafety import signals

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_SHOWN = 5  # differing fields named in one message
_GIT_TIMEOUT_S = 5.0
# Errors whose message is a sentence for the user.
_TOLD = (ValueError, OSError, ImportError, FloatingPointError)
_LOCK_RETRIES_S = (0.02, 0.05, 0.1)  # longer than a look at the lock takes

_NO_CONFIG = "remove it if the run was made with this very recipe, else choose another output directory (--out)"
_TEMPORARY = ".jaxsafety-{}.tmp"


class RunInUseError(ValueError):
    """Another process holds the run directory."""


@contextmanager
def open_run(directory: Path, config: Mapping[str, Any], *, resolved_yaml: str) -> Iterator[Path]:
    """Creates or re-enters a run directory and holds its lock for the duration of the context.

    Args:
        directory: the run directory, created with its parents if absent.
        config: the resolved configuration as plain data.
        resolved_yaml: the same as YAML text, written to ``config.yaml`` on the first run.

    Yields:
        ``directory``.

    Raises:
        RunInUseError: another process holds the directory.
        ValueError: it records a different configuration.
        OSError: the directory cannot be created or written.
    """
    with hold(directory):
        record_config(directory / "config.yaml", config, resolved_yaml)
        yield directory


@contextmanager
def unused_dropped(directory: Path, files: Sequence[str], *, begun: Callable[[], bool]) -> Iterator[None]:
    """Removes the files that a command has made in its directory if it ends in bad input before its work has begun, so
    that the corrected command finds none of what it was asked before.

    Args:
        directory: the run directory; removed, too, if it was not there and nothing else is in it.
        files: names of what the command writes before its work.
        begun: whether there is work that these belong to.
    """
    there, before = directory.exists(), {name for name in files if (directory / name).exists()}
    try:
        yield
    except RunInUseError:
        raise
    except ValueError:
        if not begun():
            for name in set(files) - before:
                (directory / name).unlink(missing_ok=True)
            if not there:
                with suppress(OSError):
                    directory.rmdir()
        raise


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Creates a directory if it is absent and holds its lock for the duration of the context.

    The lock is the kernel's: it ends with the process, however that dies, and is never stale.

    Raises:
        RunInUseError: another process holds the directory.
        OSError: the directory cannot be created or written.
    """
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
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(wait_s)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_in_use(directory: Path) -> bool:
    """Whether a process holds the run directory's lock, which is looked at for a moment only."""
    path = directory / ".lock"
    if not path.exists():
        return False
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def keep_files(folder: Path, files: Mapping[str, str]) -> None:
    """Keeps copies of a run's input files, so that one edited between two starts of the run is noticed.

    Raises:
        ValueError: a kept copy differs.
    """
    for name, content in files.items():
        kept = folder / name
        if not kept.exists():
            folder.mkdir(exist_ok=True)
            atomic_write(kept, content)
        elif kept.read_bytes() != content.encode():
            raise ValueError(
                f"the file behind {kept} has changed since this run began: choose another directory (--out); "
                "or if that copy is damaged, remove it"
            )


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns ``manifest.json``, empty if there is none.

    Raises:
        ValueError: the manifest is not JSON.
    """
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

    Raises:
        ValueError: the existing manifest is not JSON.
    """
    merged = _merge(read_manifest(directory), _plain(fields))
    atomic_write(directory / "manifest.json", json.dumps(merged, indent=2, allow_nan=False) + "\n")


@contextmanager
def timed(directory: Path, name: str, fields: Mapping[str, Any]) -> Iterator[None]:
    """Records in the manifest under ``name`` what a command runs on, and its seconds over all its processes.

    Args:
        directory: the run directory.
        name: of the command.
        fields: recorded beside them.
    """
    before, started = read_manifest(directory).get(name, {}).get("seconds", 0.0), time.monotonic()
    write_manifest(directory, {name: environment() | dict(fields)})
    try:
        yield
    finally:
        write_manifest(directory, {name: {"seconds": round(before + time.monotonic() - started, 1)}})


@contextmanager
def failure_kept(directory: Path, stage: str) -> Iterator[None]:
    """Keeps in the manifest, as ``failed``, why a stage ended in an error, which then goes on its way.

    A signal is no failure.
    """
    try:
        yield
    except signals.Stopped:
        raise
    except Exception as error:
        about = {"stage": stage, "reason": reason(error)}
        if not isinstance(error, _TOLD):
            about["traceback"] = traceback.format_exc()
        # What made the stage fail may keep the manifest from being written too.
        with suppress(OSError, ValueError):
            directory.mkdir(parents=True, exist_ok=True)
            write_manifest(directory, {"failed": about})
        raise


def reason(error: Exception) -> str:
    """Returns an error's message on one line, with its type where it is no sentence for the user."""
    text = " ".join(str(error).split())
    return text if isinstance(error, _TOLD) else f"{type(error).__name__}: {text}"


def versions() -> dict[str, str | None]:
    """Returns the versions of the packages that a run computes with."""
    return {name: _version(name) for name in _PACKAGES}


def environment() -> dict[str, Any]:
    """Returns versions, git revision, machine and devices, as a bug report or manifest wants them.

    Initialises jax's backend. ``revision`` is None outside a git checkout of this package and ends in ``-dirty`` where
    tracked files were changed; ``devices`` is a sentence where the backend cannot start.
    """
    import jax

    try:
        devices: list[str] | str = [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]
    except RuntimeError as error:
        devices = f"unavailable: {str(error).partition(chr(10))[0]}"
    return {
        "jaxsafety": _version("jaxsafety"),
        "revision": _revision(Path(__file__)),
        "python": platform.python_version(),
        "packages": versions(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "count": os.cpu_count()},
        "devices": devices,
    }


def append_metrics(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows to ``metrics.jsonl``, one JSON object a line, null for a number that is not finite.

    Raises:
        OSError: the file cannot be written.
    """
    path = directory / "metrics.jsonl"
    try:
        _drop_torn_line(path)
        with path.open("a") as file:
            for row in rows:
                file.write(json.dumps(_plain(row), allow_nan=False) + "\n")
                file.flush()
            # On the disk before the checkpoint of the same step is, or the power failing between loses rows for good.
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}): free some space there and resume") from error


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Returns the rows of ``metrics.jsonl``, without a torn last line; empty if there is no file.

    Raises:
        ValueError: a line before the last is not a JSON object.
    """
    path = directory / "metrics.jsonl"
    return [_row(path, number, line) for number, line in enumerate(_lines(path), 1)]


def truncate_metrics(directory: Path, *, stage: str, method: str | None, after_step: int) -> None:
    """Drops the rows of one stage with a step beyond ``after_step``, atomically; other lines stay byte for byte.

    Called on resume, so that a killed and resumed run leaves the file of an uninterrupted one.

    Args:
        directory: the run directory; nothing happens if it has no ``metrics.jsonl``.
        stage: the ``stage`` of the rows to drop.
        method: their ``method``; None for every method of the stage.
        after_step: the step of the checkpoint that the run continues from.

    Raises:
        ValueError: a line before the last is not a JSON object.
    """
    path = directory / "metrics.jsonl"
    if not path.exists():
        return

    def is_kept(row: dict[str, Any]) -> bool:
        of_stage = row.get("stage") == stage and (method is None or row.get("method") == method)
        return not of_stage or row.get("step", after_step) <= after_step

    kept = [line for number, line in enumerate(_lines(path), 1) if is_kept(_row(path, number, line))]
    atomic_write(path, b"".join(line + b"\n" for line in kept))


def sync(path: Path) -> None:
    """Brings a file's content, or a directory's list of names, to the disk.

    Raises:
        OSError: it cannot be opened or written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file so that a reader, a kill or a full disk finds either the old content or all of the new.

    Raises:
        OSError: the file cannot be written; the old content is intact.
    """
    try:
        with _temporary(path.parent) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
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
            fcntl.flock(dead, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # deleted by another process before it was locked


def record_config(path: Path, config: Mapping[str, Any], resolved_yaml: str) -> None:
    """Writes a configuration where none is recorded yet, else checks that it is the recorded one.

    Args:
        path: the YAML file.
        config: the configuration as plain data.
        resolved_yaml: the same as YAML text.

    Raises:
        ValueError: another one is recorded, whose differing fields are named, or the file is damaged.
        OSError: it cannot be written.
    """
    if not path.exists():
        atomic_write(path, resolved_yaml)
        return
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {_NO_CONFIG}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a configuration: {_NO_CONFIG}")
    recorded, new = flat(content), flat(config)
    # An absent field is a null one: dumpers may leave those out.
    differing = [name for name in sorted(recorded | new) if not _same(recorded.get(name), new.get(name))]
    if differing:
        shown = [f"{name} is {recorded.get(name)!r} there and {new.get(name)!r} here" for name in differing[:_SHOWN]]
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ValueError(
            f"{path.parent} holds a run of another configuration ({'; '.join(shown)}{more}): "
            "choose another output directory (--out)"
        )


def flat(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings (and of lists of them) by dotted path."""
    leaves = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{name}.")
        else:
            leaves[name] = value if isinstance(value, float) else _plain(value)  # infinity differs from null here
    return leaves


def _same(recorded: Any, new: Any) -> bool:
    # YAML reads 3e-4, as a person may write it, as a string.
    if isinstance(recorded, str) and isinstance(new, float):
        try:
            return float(recorded) == new
        except ValueError:
            return False
    return recorded == new and isinstance(recorded, bool) == isinstance(new, bool)


def _plain(value: Any) -> Any:
    """Returns ``value`` as JSON knows it: arrays as lists, paths as text, null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merge(old.get(key), value) for key, value in new.items()}


def _lines(path: Path) -> list[bytes]:
    content = path.read_bytes() if path.exists() else b""
    return content.split(b"\n")[:-1]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is not JSON: remove that line to go on") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} of {path} is not a JSON object: remove that line to go on")
    return row


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if size and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision(file: Path) -> str | None:
    # The first question keeps an environment inside somebody else's checkout from answering with their revision.
    questions = (
        ["ls-files", "--error-unmatch", file.name],
        ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
    )
    answer = ""
    for question in questions:
        command = ["git", "-C", str(file.parent), *question]
        try:
            # Ctrl-C on the terminal, which ends a run at the next chunk, is not meant for git.
            answer = subprocess.run(
                command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True, start_new_session=True
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return None
    return answer.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
