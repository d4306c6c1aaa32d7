"""Opening a run directory: its lock, the configuration that it records, copies of its input files."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from jaxsafety.config import yaml12
from jaxsafety.config.names import EARLIER, other_version
from jaxsafety.rundir.atomic import atomic_write, plain
from jaxsafety.rundir.locks import RunInUseError, hold

_SHOWN = 5  # differing fields named in one message
_NO_CONFIG = "remove it if the run was made with this very recipe, else choose another output directory (--out)"


@contextmanager
def open_run(directory: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """Creates or re-enters a run directory, holds its lock for the duration of the context and yields it.

    The first run writes the resolved configuration, plain data, to ``config.yaml``.

    Raises:
        RunInUseError: another process holds the directory.
        ValueError: it records a different configuration.
        OSError: the directory cannot be created or written.
    """
    with hold(directory):
        record_config(directory / "config.yaml", config)
        yield directory


@contextmanager
def unused_dropped(directory: Path, files: Sequence[str], *, begun: Callable[[], bool]) -> Iterator[None]:
    """Removes the files that a command has made in its directory if it ends in bad input before its work has begun, so
    that the corrected command finds none of what it was asked before.

    ``files`` are the names of what it writes before its work, which ``begun`` tells. The directory is removed, too, if
    it was not there and nothing else is in it, and so are folders in it.
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
            folders = {(directory / name).parent for name in files} - {directory}
            for folder in (*folders, *([] if there else [directory])):
                with suppress(OSError):
                    folder.rmdir()
        raise


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


def record_config(
    path: Path, config: Mapping[str, Any], *, grows: str | None = None, free: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> bool:  # fmt: skip
    """Writes a configuration of plain data as YAML, or checks that it is the recorded one; see :func:`check_config`.

    Returns whether it adds to one that was recorded.

    Raises:
        ValueError: another one is recorded, whose differing fields are named, or the file is damaged.
        OSError: it cannot be written.
    """
    there = path.exists()
    if not check_config(path, config, grows=grows, free=free, defaults=defaults):
        return False
    atomic_write(path, yaml12.dump(dict(config)))
    return there


def check_config(
    path: Path, config: Mapping[str, Any], *, grows: str | None = None, free: str | None = None, what: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> bool:  # fmt: skip
    """Checks that no other configuration is recorded; returns whether there is something to record.

    Fields whose dotted names match the regular expression ``grows`` may be absent, null or 0 where they are recorded,
    and those that match ``free`` may be anything there. ``what`` the run is then said to be, for another sentence than
    that of another configuration. ``defaults`` are what fields are that were not there yet when the run was recorded.

    Raises:
        ValueError: another one is, whose differing fields are named, or the file is damaged or of an earlier version.
    """
    if not path.exists():
        return True
    try:
        content = yaml12.load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {_NO_CONFIG}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a configuration: {_NO_CONFIG}")
    if content.keys() & {*EARLIER}:
        raise ValueError(other_version(path.parent))
    recorded, new = flat(defaults or {}) | flat(content), flat(config)
    # An absent field is a null one: dumpers may leave those out.
    differing = [name for name in sorted(recorded | new) if not _same(recorded.get(name), new.get(name))]
    if differing and all(_may_change(name, recorded.get(name), grows=grows, free=free) for name in differing):
        return True
    if differing:
        shown = [f"{name} is {recorded.get(name)!r} there and {new.get(name)!r} here" for name in differing[:_SHOWN]]
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ValueError(
            f"{path.parent} holds a run {what or 'of another configuration'} ({'; '.join(shown)}{more}): "
            "choose another output directory (--out)"
        )
    return False


def _may_change(name: str, recorded: Any, *, grows: str | None, free: str | None) -> bool:
    nothing = recorded in (None, 0) and recorded is not False
    return bool((free and re.fullmatch(free, name)) or (grows and nothing and re.fullmatch(grows, name)))


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
            leaves[name] = value if isinstance(value, float) else plain(value)  # infinity differs from null here
    return leaves


def _same(recorded: Any, new: Any) -> bool:
    # YAML reads 3e-4, as a person may write it, as a string.
    if isinstance(recorded, str) and isinstance(new, float):
        try:
            return float(recorded) == new
        except ValueError:
            return False
    return recorded == new and isinstance(recorded, bool) == isinstance(new, bool)
