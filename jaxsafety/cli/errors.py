"""How an error ends a command: what a user caused in one sentence, a bug of ours with its traceback."""

import os
import re
import sys
import traceback
from collections.abc import Callable

from jaxsafety.config.told import is_told
from jaxsafety.engine import cluster
from jaxsafety.rundir import signals

_BUG = (
    "this is a bug, of jaxsafety unless the last lines above are of a module of your own: please report them, with "
    "what `jaxsafety env` prints"
)


def guarded(work: Callable[[], int], *, again: str = "", shown: bool) -> tuple[int, bool]:
    """Runs a verb; returns the exit code, and whether another process of the run is known to have died.

    1 for a run that failed and for a bug, 2 for what a user caused or the machine lacks, 128 and the signal's number.
    ``again`` is said after an interruption; with ``shown`` a sentence comes with its traceback, too.
    """
    try:
        return work(), False
    except cluster.LostError as error:
        return _said(error, code=1, shown=shown), True
    except signals.Stopped as stop:
        return _said(f"{stop}: the same command continues", code=128 + stop.number, shown=shown), False
    except KeyboardInterrupt:
        return _said(f"interrupted{again}", code=130, shown=shown), False
    except Exception as error:
        told = is_told(error)
        problem = (str(error) or "memory ran out") if told else _BUG
        if told and "RESOURCE_EXHAUSTED" in str(error):
            problem = f"{problem}: fewer seeds or smaller batches at once need less, and other processes may hold some"
        # Whatever a missing device has made of itself on its way here, an assertion of jax's among it.
        if (not told or isinstance(error, RuntimeError)) and (missing := _no_device()):
            told, problem = True, missing
        code = 2 if told and not isinstance(error, FloatingPointError) else 1
        return _said(problem, code=code, shown=shown or not told), False


def _no_device() -> str | None:
    """What keeps jax from its devices, None where it has some."""
    try:
        import jax
    except Exception as error:  # a variable that is none of its values, versions that do not go together
        return f"jax does not start: {error}"
    if jax.distributed.is_initialized():  # a backend that is not up would wait for the other processes
        return None
    try:
        jax.devices()
    except Exception as error:
        from importlib import metadata  # slow, and wanted here alone

        named = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
        asked = [f"{name}={os.environ[name]}" for name in named if os.environ.get(name)]
        # A plugin is called xla_cuda12 for a platform cuda.
        plugins = {re.sub(r"^xla_|\d+$", "", one.name) for one in metadata.entry_points(group="jax_plugins")}
        there = " or ".join(["cpu", *sorted(name for name in plugins if not any(name in one for one in asked))])
        how = "unset the variable, or install" if asked else "set JAX_PLATFORMS to one, or install"
        wanted = f" for {asked[0]}" if asked else ""
        return (
            f"jax finds no device{wanted} ({str(error) or 'it is not there'}): expected one that is here, {there}; "
            f"{how} what it needs, such as jax[cuda12]"
        )
    return None


def _said(problem: object, *, code: int, shown: bool) -> int:
    if shown:
        traceback.print_exc()
    print(f"jaxsafety: {' '.join(str(problem).split())}", file=sys.stderr)
    return code
