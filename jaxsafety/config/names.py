"""The one sentence that a misspelt name gets."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[object]) -> str:
    """Returns "; did you mean X?" for the known name that looks most like ``name``, or nothing if none does."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_name(kind: str, name: object, known: Iterable[str]) -> None:
    """Refuses a name that is not a known one.

    Raises:
        ValueError: it is not; the message lists the known names and asks for the nearest.
    """
    names = list(known)
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}: expected one of {', '.join(names)}{nearest(name, names)}")
