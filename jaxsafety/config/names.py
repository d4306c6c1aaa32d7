"""The sentences that misspelt, missing and extra names get, and those of another version."""

import difflib
import glob
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

_SHOWN = 3  # names in one message
# What stands for a seed in the name of a file or directory of each.
SEED = "{seed}"
_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)
# Sections that earlier versions recorded in run directories: of recipes, and of commands about checkpoints.
EARLIER = ("world", "grammars", "model", "pretrain", "tune", "pair", "tuning")


def closest(name: object, known: Iterable[object]) -> str | None:
    """Returns the known name that looks most like ``name``, None if none does."""
    return next(iter(difflib.get_close_matches(str(name), [str(k) for k in known], n=1)), None)


def nearest(name: object, known: Iterable[object]) -> str:
    """Returns "; did you mean X?" for the known name that looks most like ``name``, or nothing if none does."""
    close = closest(name, known)
    return "" if close is None else f"; did you mean {close!r}?"


def is_hub_name(text: str) -> bool:
    """Whether a text may name a model on the Hugging Face Hub: ``org/name``, or ``org/name@revision``."""
    return _HUB.fullmatch(text.replace(SEED, "0")) is not None and ".." not in text


def with_adapter(text: str, *, beside: Path) -> tuple[str, str | None]:
    """Returns the model and the adapter that ``BASE+ADAPTER`` names, or the text and None where it names one thing.

    That is what there is of such a name, looked for ``beside`` a folder. ``BASE`` may have an adapter itself.
    """

    def named(side: str) -> bool:
        return is_hub_name(side) or _is_there(side, beside)

    cuts = [(text[: one.start()], text[one.end() :]) for one in re.finditer(r"(?<=.)\+(?=.)", text)][::-1]
    if not cuts or _is_there(text, beside):
        return text, None
    whole = ((base, adapter) for base, adapter in cuts if named(adapter) and (named(base) or "+" in base))
    half = ((base, adapter) for base, adapter in cuts if named(base) or named(adapter))
    return next(whole, next(half, (text, None)))


def model_named(text: str, *, beside: Path) -> str:
    """Returns what names a model wherever one works: a path that is looked for ``beside`` a folder, made absolute.

    A name on the Hub stays as it is, unless something of that name is there; of ``BASE+ADAPTER`` so does either side.
    """
    base, adapter = with_adapter(text, beside=beside)
    if adapter is not None:
        return f"{model_named(base, beside=beside)}+{model_named(adapter, beside=beside)}"
    if is_hub_name(text) and not _is_there(text, beside):
        return text
    return str((beside / os.path.expanduser(text)).resolve())


def _is_there(text: str, beside: Path) -> bool:
    """Whether there is something of that path, for any seed."""
    return any(glob.iglob(glob.escape(str(beside / os.path.expanduser(text))).replace(SEED, "*")))


def check_name(kind: str, name: object, known: Iterable[str]) -> None:
    """Refuses a name that is not a known one, in a ValueError that lists these and asks for the nearest."""
    names = list(known)
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}: expected one of {', '.join(names)}{nearest(name, names)}")


def check_all(where: str, found: Collection[str], expected: Collection[str], *, lacks: str, holds: str) -> None:
    """Refuses names that are not just those expected.

    ``where`` begins the sentence; in what it ``lacks`` and ``holds`` beyond these, ``{}`` stands for the first names.

    Raises:
        ValueError: some are missing or extra; the nearest name on the other side is told.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    sides = [side.format(_some(names)) for side, names in ((lacks, missing), (holds, extra)) if names]
    if sides:
        hint = nearest(missing[0], extra) if missing else nearest(extra[0], expected)
        raise ValueError(f"{where} {' and '.join(sides)}{hint}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def other_version(directory: object) -> str:
    """Returns what is told of a run directory of an earlier version, whose recipes had other sections."""
    return f"{directory} is a run of jaxsafety 0.1, which reads it: install that version, or run its recipe anew"
