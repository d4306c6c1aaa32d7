"""The figures of the analyses as files: each alone, all with their tables, and as SVG for the report.

A figure and its table come from the same rows, so the table holds what the picture shows. Which figures there are is in
``jaxsafety.report.section_list``.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from jaxsafety.config.names import check_name
from jaxsafety.recipe import yaml_file
from jaxsafety.report import dead_lanes, plotting
from jaxsafety.report.plot import NothingToDraw
from jaxsafety.report.plotting import Picture
from jaxsafety.report.section_list import Shown
from jaxsafety.report.section_list import sections as listed
from jaxsafety.report.seed_tables import LABELS, seed_table, with_layer_means
from jaxsafety.report.tables import dead_notes
from jaxsafety.rundir import atomic, results

FORMATS = (".svg", ".png", ".pdf")
_SLOPES = (pl.col("stage") == "tune") & (pl.col("metric") == "rewards/slope")


def read(run_directory: Path) -> dict[str, pl.DataFrame]:
    """Reads what figures need of a run directory: ``analyze``, and ``curves`` and ``evaluate`` where they are there.

    Raises:
        ValueError: the run has no analyses, or a file of it is damaged.
    """
    folder = run_directory / "results"
    if not (folder / "analyze.parquet").exists():
        raise ValueError(f"no analyses in {run_directory}: run `jaxsafety analyze` on it first")
    frames = {"analyze": results.read_results([folder / "analyze.parquet"], schema=results.ANALYSIS_SCHEMA)}
    for name in ("curves", "evaluate"):
        if (folder / f"{name}.parquet").exists():
            frames[name] = results.read_results([folder / f"{name}.parquet"])
    return frames


def of_run(run_directory: Path) -> dict[str, Shown]:
    """Returns the figures that a run's recipe has, by name; raises as :func:`yaml_file.recorded`."""
    return listed(yaml_file.recorded(run_directory))


def table(name: str, frames: Mapping[str, pl.DataFrame], shown: Mapping[str, Shown] | None = None) -> pl.DataFrame:
    """Returns the seed table of a figure of ``shown``: what it draws, and what its CSV holds.

    Frames are those of :func:`read`, figures those of :func:`of_run`; None for those of no run in particular.

    Raises:
        ValueError: an unknown name, or two values for one seed of one quantity.
    """
    shown = shown or listed()
    check_name("figure", name, shown)
    section = shown[name]
    rows = every_row(frames).filter(section.rows)
    if section.steps == "last":
        rows = last_steps(rows)
    if section.made is not None:
        rows = section.made(rows)
    if section.layer_means:
        rows = with_layer_means(rows)
    return seed_table(rows)


def every_row(frames: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Returns all rows of analyses, and what was judged and the curves' slopes as those of ``evaluate``, ``curves``."""
    columns = [*LABELS, "seed", "value"]
    analyses = dead_lanes.without_dead(frames["analyze"]).select(columns)
    others = (("curves", _SLOPES), ("evaluate", pl.col("stage") == "evaluate"))
    return pl.concat([analyses, *(_as_analysis(frames, columns, *one) for one in others)])


def last_steps(rows: pl.DataFrame) -> pl.DataFrame:
    """Returns the rows of finished models, and training curves, which have none, as they are."""
    lane = ["analysis", "method", "lr_name", "lr"]
    return rows.filter((pl.col("step") == pl.col("step").max().over(lane)) | (pl.col("analysis") == "curves"))


def draw(name: str, frames: Mapping[str, pl.DataFrame], shown: Mapping[str, Shown] | None = None) -> str:
    """Draws one figure as SVG; the arguments are those of :func:`table`.

    Raises:
        ValueError: an unknown name, or nothing to draw (``NothingToDraw``).
    """
    return plotting.svg(_picture(name, frames, shown or listed()))


def drawn(name: str, run_directory: Path) -> plotting.Drawn:
    """Draws one figure of a run as matplotlib's; raises as :func:`write_figure`."""
    return plotting.Drawn(_of_run(name, run_directory))


def write_figure(name: str, run_directory: Path, out: Path) -> None:
    """Draws one figure of a run into a file, atomically; the suffix says how: .svg, .png or .pdf.

    Raises:
        ValueError: an unknown name or suffix, a run without analyses, or nothing to draw.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"cannot write a figure as {out.name!r}: expected a name that ends in {', '.join(FORMATS)}")
    picture = _of_run(name, run_directory)
    if out.suffix == ".svg":
        atomic.atomic_write(out, plotting.svg(picture))
    else:
        atomic.atomic_write(out, plotting.image(picture, kind=out.suffix.removeprefix(".")))


def write_tables(run_directory: Path) -> dict[str, str]:
    """Writes ``results/tables/<name>.csv`` and ``.parquet`` of every figure that has rows, atomically.

    Returns name to the path of its table relative to the run directory, without the suffix; raises as :func:`read`.
    """
    frames, shown = read(run_directory), of_run(run_directory)
    folder = run_directory / "results" / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in shown:
        rows = table(name, frames, shown)
        if rows.is_empty():
            continue
        buffer = io.BytesIO()
        rows.write_parquet(buffer)
        atomic.atomic_write(folder / f"{name}.parquet", buffer.getvalue())
        atomic.atomic_write(folder / f"{name}.csv", rows.write_csv())
        written[name] = f"results/tables/{name}"
    return written


def _of_run(name: str, run_directory: Path) -> Picture:
    shown = of_run(run_directory)
    check_name("figure", name, shown)
    return _picture(name, read(run_directory), shown)


def _picture(name: str, frames: Mapping[str, pl.DataFrame], shown: Mapping[str, Shown]) -> Picture:
    rows, dead = table(name, frames, shown), dead_lanes.count_dead(frames["analyze"])
    if rows.is_empty():
        raise NothingToDraw(f"no rows for the figure {name!r}: run `jaxsafety analyze` on this run first")
    try:
        picture = shown[name].picture(rows)
    except NothingToDraw as nothing:
        raise NothingToDraw("; ".join([str(nothing), *dead_notes(dead)])) from nothing
    return plotting.with_dead(picture, dead)


def _as_analysis(frames: Mapping[str, pl.DataFrame], columns: list[str], name: str, which: pl.Expr) -> pl.DataFrame:
    """Some rows of another frame as rows of an analysis of its name."""
    if name not in frames:
        return pl.DataFrame(schema=results.ANALYSIS_SCHEMA).select(columns)
    absent = {"analysis": name, "subset": "all", "part": "", "layer": None, "strength": None}
    added = (pl.lit(value, dtype=results.ANALYSIS_SCHEMA[column]).alias(column) for column, value in absent.items())
    return dead_lanes.without_dead(frames[name].filter(which)).with_columns(added).select(columns)
