"""Where a run directory keeps what its stages leave; read by those who only look, so nothing here imports jax."""

import re
from pathlib import Path

RESULT_FILES = ("curves.parquet", "examples.json", "evaluate.parquet")
ANALYSIS_FILE = "analyze.parquet"
REPORT_FILE = "report.html"

# Of every lane by its name: states to go on from, and parameters at steps on the way.
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
# Of a study of checkpoints: every model that it makes, by name and seed, as a directory.
MODELS = "models"
# And every adapter that it keeps beside, or instead.
ADAPTERS = "adapters"
# Copies of the user's files that the subject is made of.
FILES = "world"
# Below the directory of a grid.
CELLS = "cells"


def check_run(directory: Path, *, grid: bool = False) -> None:
    """Refuses, in a ValueError, what is no run directory and, unless ``grid``, that of a grid, whose cells are runs."""
    if not (directory / "config.yaml").exists():
        raise ValueError(f"no run in {directory}: expected a directory that `jaxsafety run` made, with a config.yaml")
    if not grid and (directory / CELLS).is_dir():
        first = min((directory / CELLS).iterdir(), default="one that has begun")
        raise ValueError(f"{directory} is a grid: name one of its cells, such as {first}")


def steps(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in ``directory``, ascending; empty if there is no directory."""
    if not directory.is_dir():
        return []
    names = (entry.name for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(name) for name in names if re.fullmatch(r"\d{8}|[1-9]\d{8,}", name))


def finished_files(directory: Path, stage: str) -> bool:
    """Whether a stage that leaves files other than checkpoints has left them all: evaluate, analyze or report."""
    if stage == "report":
        return (directory / REPORT_FILE).exists()
    names = (ANALYSIS_FILE,) if stage == "analyze" else RESULT_FILES
    return all((directory / "results" / name).exists() for name in names)
