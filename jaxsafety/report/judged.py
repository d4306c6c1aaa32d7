"""What a run's models were judged by, and the columns that its table has for that."""

from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from jaxsafety import subjects
from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.schema import Recipe
from jaxsafety.report import matrix, tables
from jaxsafety.report.tables import Column
from jaxsafety.rundir import manifest_file, results
from jaxsafety.types import Subject


class Judged(NamedTuple):
    """A run that has been evaluated.

    Attributes:
        recipe: that of the run; None where it holds none of this version.
        about: the subject, and ``options`` its fields.
        evaluated: rows of ``evaluate.parquet``; of a matrix those of the models that its table shows.
        curves: rows of ``curves.parquet``, of the same models.
        columns: those of the result table.
        further: conditions beside the subject's own that were judged.
    """

    recipe: Recipe | None
    about: Subject
    options: Any
    evaluated: pl.DataFrame
    curves: pl.DataFrame
    columns: dict[str, Column]
    further: tuple[str, ...]

    @property
    def labelled(self) -> bool:
        """Whether the prompts' own labels say the conditions."""
        return not self.about.conditions

    def table(self) -> list[tables.StudyRow]:
        """Returns the result table."""
        return tables.study_table(self.evaluated, self.columns)


def read(directory: Path) -> Judged:
    """Reads the results of a run directory.

    Raises:
        ValueError: the run has not been evaluated, or a file of it is damaged.
    """
    folder = directory / "results"
    if not (folder / "evaluate.parquet").exists():
        raise ValueError(f"no results in {directory}: run `jaxsafety evaluate` on it first")
    evaluated, curves = (results.read_results([folder / f"{name}.parquet"]) for name in ("evaluate", "curves"))
    recipe = yaml_file.recorded(directory)
    about = subjects.load("world") if recipe is None else recipe.subject.load()
    options = about.Config() if recipe is None else recipe.subject.options
    judged = set(evaluated["condition"])
    further = tuple(name for name in about.further(options) if name in judged) if about.further else ()
    columns = _columns(evaluated, about, recipe) | {
        f"{name} {metric}": Column(name, metric)
        # Of safe prompts that look unsafe it is whether they are refused.
        for name, metric in ((name, "refused" if name == "near_miss" else "complied") for name in further)
    }
    if recipe is not None and matrix.has_matrix(recipe):
        selected = manifest_file.read_manifest(directory).get("selected", {})
        evaluated, curves = (matrix.defended(rows, recipe=recipe, selected=selected) for rows in (evaluated, curves))
    return Judged(recipe, about, options, evaluated, curves, columns, further)


def _columns(evaluated: pl.DataFrame, about: Subject, recipe: Recipe | None) -> dict[str, Column]:
    if not about.conditions:
        return tables.refused_columns(evaluated)
    columns = tables.columns_of(about.conditions)
    if recipe is None:
        return columns
    # What a recipe does not ask has no column.
    return {name: column for name, column in columns.items() if column.condition in recipe.evaluated}
