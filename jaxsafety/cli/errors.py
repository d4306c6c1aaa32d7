"""How an error ends a command: what a user caused in one sentence, a bug of ours with its traceback.

Whatever is wrong with what was given is raised on purpose, by a ``raise`` of ours with a sentence for it. A ValueError
that comes out of a library, or out of an operation, is nothing that we have thought of.
"""

import dis
import sys
import traceback
from collections.abc import Callable

from jaxsafety.engine import cluster
from jaxsafety.rundir import signals

# jax's words for errors of the machine rather than the program: a backend that is not there, memory that ran out.
_MACHINE = ("initialize backend", "RESOURCE_EXHAUSTED", "Out of memory")

_BUG = (
    "this is a bug, of jaxsafety unless the last lines above are of a module of your own: please report them, with "
    "what `jaxsafety env` prints"
)


def guarded(work: Callable[[], int], *, again: str, shown: bool) -> tuple[int, bool]:
    """Runs a verb; returns the exit code, and whether another process of the run is known to have died.

    1 for a run that failed and for a bug, 2 for what a user caused or the machine lacks, 128 and the signal's number.
    ``again`` is said after an interruption; with ``shown`` a sentence comes with its traceback, too.
    """
    try:
        return work(), False
    except cluster.LostError as error:
        return _said(error, code=1, shown=shown), True
    except FloatingPointError as error:
        return _said(error, code=1, shown=shown), False
    except signals.Stopped as stop:
        return _said(f"{stop}: the same command continues", code=128 + stop.number, shown=False), False
    except KeyboardInterrupt:
        return _said(f"interrupted{again}", code=130, shown=shown), False
    except Exception as error:
        if _is_caused_outside(error):
            return _said(error, code=2, shown=shown), False
        traceback.print_exc()
        return _said(_BUG, code=1, shown=False), False


def _is_caused_outside(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return any(sign in str(error) for sign in _MACHINE)
    return isinstance(error, OSError) or (isinstance(error, ValueError | ImportError) and _is_on_purpose(error))


def _is_on_purpose(error: Exception) -> bool:
    """Whether it comes from a ``raise`` in this package."""
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    code, module = place.tb_frame.f_code.co_code, place.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == "jaxsafety" and code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _said(problem: object, *, code: int, shown: bool) -> int:
    if shown:
        traceback.print_exc()
    print(f"jaxsafety: {' '.join(str(problem).split())}", file=sys.stderr)
    return code
