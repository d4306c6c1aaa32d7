"""The mechanics of safety fine-tuning in JAX.

Submodules are imported by name (``from jaxsafety import analysis, losses, methods, world``); importing them touches no
device and reads no environment.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxsafety.report.notebook import Run

__version__ = "0.2.0"


def open_run(directory: str | Path) -> "Run":
    """Opens a run directory to look at: ``table()``, ``curves()``, ``claims()``, ``figure(name)`` and itself, shown.

    Raises:
        ValueError: the directory holds no run.
        ImportError: the extra ``report`` is missing.
    """
    from jaxsafety.report import notebook

    return notebook.open_run(Path(directory).expanduser())
