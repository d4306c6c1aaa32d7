"""Which errors are sentences for the user, and which are bugs.

Whatever is wrong with what was given is raised on purpose, by a ``raise`` of this package with a sentence for it. A
ValueError that comes out of a library, or out of an operation, is nothing that we have thought of.
"""

import dis
from collections.abc import Iterator
from contextlib import contextmanager

# jax's words for errors of the machine rather than the program: a backend that is not there, memory that ran out.
_MACHINE = ("initialize backend", "RESOURCE_EXHAUSTED", "Out of memory")


def is_told(error: BaseException) -> bool:
    """Whether an error is told by its message: what a user caused, what the machine lacks, a run that diverged."""
    if isinstance(error, OSError | MemoryError | FloatingPointError):
        return True
    if isinstance(error, ValueError | ImportError):
        return _is_on_purpose(error)
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MACHINE)


@contextmanager
def told_of(owner: str, *, module: str = "") -> Iterator[None]:
    """Puts whose it is before a sentence that is raised inside; an error that is a bug's goes on as it is.

    ``module`` may be somebody else's, whose own ``raise`` of a ValueError counts as a sentence, too.
    """
    try:
        yield
    except ValueError as error:
        if not _is_on_purpose(error, module.partition(".")[0]):
            raise
        raise ValueError(f"{owner}: {error}") from error


def _is_on_purpose(error: BaseException, *packages: str) -> bool:
    """Whether it comes from a ``raise`` in this package, or one of others."""
    place = error.__traceback__
    if place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    code, module = place.tb_frame.f_code.co_code, place.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in ("jaxsafety", *packages) and code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]
