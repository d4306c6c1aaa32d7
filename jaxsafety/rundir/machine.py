"""What a run computes on and with: versions, revision, machine, devices. jax is imported only when asked."""

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_GIT_TIMEOUT_S = 5.0


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
    except (RuntimeError, AssertionError) as error:  # jax asserts that a platform that is asked for is there
        devices = f"unavailable: {str(error).partition(chr(10))[0]}".removesuffix(": ")
    return {
        "jaxsafety": _version("jaxsafety"),
        "revision": _revision(Path(__file__)),
        "python": platform.python_version(),
        "packages": versions(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "count": os.cpu_count()},
        "devices": devices,
    }


@cache
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
