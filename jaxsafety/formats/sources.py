"""What somebody names a model by, a directory, a GGUF file or a name on the Hub, to the directory that it is read from.

A GGUF file is converted once, into a folder that is named after its content.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jaxsafety
from jaxsafety.config.names import is_hub_name
from jaxsafety.formats import gguf_file, hub
from jaxsafety.formats.hub import Hub
from jaxsafety.rundir import progress

_CONVERTED = "~/.cache/jaxsafety/gguf"
_CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Places:
    """Where models are looked for: the Hub's cache, and the folder of converted files."""

    hub: Hub
    converted: Path


@dataclass(frozen=True)
class Source:
    """A model's directory, and what tells it from others of its name: a commit, a file's digest, or nothing."""

    directory: Path
    version: str | None = None


def from_environment(environment: Mapping[str, str]) -> Places:
    """Returns the places that ``os.environ`` and the user's home tell."""
    return Places(hub.from_environment(environment), Path(_CONVERTED).expanduser())


def find(named: str, places: Places) -> Source:
    """Returns the source of a model: what is there of that path, else what the Hub has of that name.

    What is neither comes back as a path, for its reader to refuse.

    Raises:
        ImportError: an extra for a GGUF file is not installed.
        FileNotFoundError: it is a name on the Hub that is not in the cache.
        ValueError: a GGUF file that cannot be read, or a directory of several.
        OSError: a converted file cannot be written.
    """
    path = Path(named)
    if gguf_file.is_gguf(path):
        return _converted(path, places)
    if path.exists() or not is_hub_name(named):
        inside = _only_gguf(path)
        return Source(path) if inside is None else _converted(inside, places)
    snapshot = hub.find(places.hub, named)
    inside = _only_gguf(snapshot.directory)
    directory = snapshot.directory if inside is None else _converted(inside, places).directory
    return Source(directory, snapshot.commit)


def _only_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory that holds one and no other model."""
    found = [] if (directory / _CONFIG_FILE).exists() else sorted(directory.glob(f"*{gguf_file.SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{directory} holds several models ({names}): name the file, such as {found[0]}")
    return next(iter(found), None)


def _converted(file: Path, places: Places) -> Source:
    from jaxsafety.formats import gguf

    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: expected a GGUF file")
    about = file.stat()
    digest = _digest(file, about.st_size, about.st_mtime_ns)
    # Another version may convert otherwise.
    directory = places.converted / f"{digest}-{jaxsafety.__version__}"
    if not (directory / _CONFIG_FILE).is_file():
        progress.say(f"{file} is converted, once, into {directory}")
        try:
            gguf.write(file, directory)
        except (OSError, ValueError):
            # Another process may have been as far.
            if not (directory / _CONFIG_FILE).is_file():
                raise
    return Source(directory, digest)


@cache
def _digest(file: Path, _: int, __: int) -> str:
    """Of a file's content, read once for all that look at it as it is at a moment."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:32]
