"""What somebody names a model by, to the directory that it is read from.

That is a directory, a GGUF file, a name on the Hub, or one of these with an adapter of PEFT. A GGUF file is converted
and an adapter merged once, into a folder that is named after its content.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jaxsafety
from jaxsafety.config.names import is_hub_name, with_adapter
from jaxsafety.formats import gguf_file, hub, peft_config
from jaxsafety.formats.hf_config import ParamsDtype
from jaxsafety.formats.hub import Hub
from jaxsafety.rundir import progress

_CONVERTED = "~/.cache/jaxsafety/models"
_CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Places:
    """Where models are looked for: the Hub's cache, and the folder of those made of GGUF files and adapters."""

    hub: Hub
    converted: Path


@dataclass(frozen=True)
class Source:
    """A model's directory, and what tells it from others of its name: a commit, a digest of files, or nothing."""

    directory: Path
    version: str | None = None


def from_environment(environment: Mapping[str, str]) -> Places:
    """Returns the places that ``os.environ`` and the user's home tell."""
    return Places(hub.from_environment(environment), Path(_CONVERTED).expanduser())


def find(named: str, places: Places, *, store: ParamsDtype | None = None) -> Source:
    """Returns the source of a model: what is there of that path, else what the Hub has of that name.

    Of ``BASE+ADAPTER``, or of an adapter whose model is found by what it names, it is the model with the adapter merged
    in, of type ``store``, or that of the base. What is nothing of these comes back as a path, for its reader to refuse.

    Raises:
        ImportError: an extra for a GGUF file is not installed.
        FileNotFoundError: it is a name on the Hub that is not in the cache, or an adapter whose model is not found.
        ValueError: a GGUF file or an adapter that cannot be read, or a directory of several models.
        OSError: a directory cannot be written.
    """
    base, adapter = with_adapter(named, beside=Path())
    if adapter is not None:
        if gguf_file.is_gguf(Path(adapter)):
            raise ValueError(f"{adapter} is a GGUF file: expected an adapter of PEFT's, a directory")
        return _merged(find(base, places, store=store), _found(adapter, places), named, places, store)
    found = _found(named, places)
    if not peft_config.is_adapter(found.directory):
        return found
    return _merged(_base(found.directory, named, places), found, named, places, store)


def _found(named: str, places: Places) -> Source:
    """What a name that holds no adapter beside a model is of."""
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


def _base(adapter: Path, named: str, places: Places) -> Source:
    """The model that an adapter was trained on, by what its trainer named it."""
    settings = peft_config.read_settings(adapter)
    how, base = f"name its model, as BASE+{named}", settings.base
    if base is None:
        raise ValueError(f"{named} is an adapter, and {settings.file} names no base_model_name_or_path: {how}")
    if is_hub_name(base) and not Path(base).exists():
        try:
            found = _found(base if settings.revision is None else f"{base}@{settings.revision}", places)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{named} is an adapter: {error}, or {how}") from error
    elif Path(base).exists():
        found = _found(base, places)
    else:
        raise FileNotFoundError(f"{named} is an adapter of {base}, which is not here: {how}")
    if peft_config.is_adapter(found.directory):
        raise ValueError(f"{named} is an adapter of {base}, which is an adapter, too: {how}")
    return found


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
    return _made(_digest(file), places, f"{file} is converted", lambda directory: gguf.write(file, directory))


def _merged(base: Source, adapter: Source, named: str, places: Places, store: ParamsDtype | None) -> Source:
    from jaxsafety.formats import hf_config, peft_merge

    # Both are refused before they are read whole.
    hf_config.read_config(base.directory)
    peft_config.read_settings(adapter.directory)
    sides = [one.version or _content(one.directory) for one in (base, adapter)]
    digest = _shortened(hashlib.sha256(" ".join([*sides, str(store)]).encode()))

    def write(directory: Path) -> None:
        peft_merge.write(base.directory, adapter.directory, directory, dtype=store)

    return _made(digest, places, f"{named} is merged", write)


def _made(digest: str, places: Places, what: str, write: Callable[[Path], None]) -> Source:
    """A directory that is written unless it is there."""
    # Another version may write it otherwise.
    directory = places.converted / f"{digest}-{jaxsafety.__version__}"
    if not (directory / _CONFIG_FILE).is_file():
        progress.say(f"{what}, once, into {directory}")
        try:
            write(directory)
        except (OSError, ValueError):
            # Another process may have been as far.
            if not (directory / _CONFIG_FILE).is_file():
                raise
    return Source(directory, digest)


def _content(directory: Path) -> str:
    """What tells a directory from others: a digest of all that a model or an adapter is read from."""
    from jaxsafety.formats import hf_write

    found = {*directory.glob("*.json"), *directory.glob("*.safetensors"), *hf_write.companions(directory)}
    files = sorted(file for one in found for file in (one.rglob("*") if one.is_dir() else [one]) if file.is_file())
    told = "".join(f"{file.relative_to(directory)} {_digest(file)}\n" for file in files)
    return _shortened(hashlib.sha256(told.encode()))


def _digest(file: Path) -> str:
    about = file.stat()
    return _digest_at(file, about.st_size, about.st_mtime_ns)


@cache
def _digest_at(file: Path, _: int, __: int) -> str:
    """Of a file's content, read once for all that look at it as it is at a moment."""
    with file.open("rb") as content:
        return _shortened(hashlib.file_digest(content, "sha256"))


def _shortened(digest: Any) -> str:
    return digest.hexdigest()[:32]
