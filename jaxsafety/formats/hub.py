"""Models in the cache that Hugging Face's tools share: from a name and a revision to the directory of a snapshot.

The cache holds ``models--ORG--NAME`` with ``refs`` (a file per branch or tag, which holds a commit) and ``snapshots``
(a directory per commit, of links to ``blobs``). What is there is found without the network.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxsafety.formats.gguf_file import SUFFIX
from jaxsafety.formats.hf_index import INDEX_FILE, weight_map
from jaxsafety.rundir import progress

_BRANCH = "main"
_LEAST = 4  # letters of a commit that stand for it
_TRUE = ("1", "on", "yes", "true")
# What a model here is read from, and weights that some repositories hold a second time.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
_UNWANTED = ["original/*", "consolidated*"]
_FIRST = ("config.json", "adapter_config.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Hub:
    """Where snapshots are looked for, and whether one that is not there may be downloaded."""

    cache: Path
    offline: bool = True


@dataclass(frozen=True)
class Snapshot:
    """A directory of the cache, and the commit that it is of."""

    directory: Path
    commit: str


def from_environment(environment: Mapping[str, str]) -> Hub:
    """Returns the cache that the variables of Hugging Face's tools in ``os.environ`` name, else the usual one."""

    def given(*names: str) -> str | None:
        return next((environment[name] for name in names if environment.get(name)), None)

    above = Path(given("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(given("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") or Path(given("HF_HOME") or above) / "hub")
    offline = (given("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") or "").lower() in _TRUE
    return Hub(cache.expanduser(), offline)


def find(hub: Hub, named: str) -> Snapshot:
    """Returns the snapshot of ``org/name`` or ``org/name@revision``: a branch, a tag, a commit or its beginning.

    One that is not there whole is downloaded, where the ``huggingface_hub`` package is installed and not offline.

    Raises:
        FileNotFoundError: it is not there, and could not be downloaded; how to is told.
        ValueError: several commits begin like this.
    """
    name, _, revision = named.partition("@")
    folder = hub.cache / f"models--{name.replace('/', '--')}"
    commit = _commit(folder, revision or _BRANCH, named=named)
    lacks = None if commit is None else _lacks(folder / "snapshots" / commit)
    if commit is not None and lacks is None:
        return Snapshot(folder / "snapshots" / commit, commit)
    there = f"is in {hub.cache} without its {lacks}" if lacks else f"is neither a path here nor in {hub.cache}"
    here = [] if lacks else _revisions(folder)
    others = f" (where there is {name}@{f', {name}@'.join(here)})" if here else ""
    if not hub.offline and (place := _downloaded(hub, name, revision, f"{named} {there}{others}")):
        return Snapshot(place, place.name)
    raise FileNotFoundError(f"{named} {there}{others}: download it with `{_command(name, revision)}`")


def _command(name: str, revision: str) -> str:
    return f"hf download {name} --revision {revision}" if revision else f"hf download {name}"


def _commit(folder: Path, revision: str, *, named: str) -> str | None:
    """The commit that a revision stands for in the cache; None where it does not know."""
    ref = folder / "refs" / revision
    if ref.is_file():
        return ref.read_text().strip()
    found = _beginning(folder, revision) if len(revision) >= _LEAST else []
    if len(found) > 1:
        raise ValueError(f"{named} is one of {', '.join(found)} in {folder}: expected more of the commit")
    return next(iter(found), None)


def _beginning(folder: Path, start: str) -> list[str]:
    return sorted(place.name for place in (folder / "snapshots").glob("*") if place.name.startswith(start))


def _revisions(folder: Path) -> list[str]:
    """The revisions that the cache knows whole, commits shortened where no branch or tag is of them."""
    refs = {place.read_text().strip(): place.relative_to(folder / "refs").as_posix()
            for place in sorted((folder / "refs").rglob("*")) if place.is_file()}  # fmt: skip
    whole = [commit for commit in _beginning(folder, "") if _lacks(folder / "snapshots" / commit) is None]
    return [refs.get(commit, commit[:8]) for commit in whole]


def _lacks(snapshot: Path) -> str | None:
    """What of a model a snapshot lacks, as where a download has not ended or a link is to nothing; None if nothing."""
    if _some(snapshot, [f"*{SUFFIX}"]):
        return None
    if not _some(snapshot, _FIRST):
        return _FIRST[0]
    index = snapshot / INDEX_FILE
    if index.is_file():
        files = sorted(set(weight_map(index).values()))
        return next((name for name in files if not (snapshot / name).is_file()), None)
    return None if _some(snapshot, _WEIGHTS) else "weights"


def _some(folder: Path, patterns: Iterable[str]) -> bool:
    return any(place.is_file() for pattern in patterns for place in folder.glob(pattern))


def _downloaded(hub: Hub, name: str, revision: str, what: str) -> Path | None:
    """The snapshot once it is downloaded; None without the package."""
    try:
        import huggingface_hub
    except ImportError:
        return None
    progress.say(f"{what}: downloading it")
    try:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision or None, cache_dir=hub.cache, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        ))  # fmt: skip
    except Exception as error:  # of the network, the Hub, access to the model, the disk
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"{what}, and downloading it failed ({reason}): try `{_command(name, revision)}`"
        ) from error
