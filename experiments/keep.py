"""``python -m experiments.keep RUN``: what tables and figures need of a run, as small files in ``results/NAME``.

Kept are the recipe, the judged rates, the learning curves and, of the analyses, the rows of finished models without
those of single directions and bins; ``make tables`` then draws without the run.
"""

import argparse
import shutil
from pathlib import Path

import polars as pl

from jaxsafety.rundir import results

RESULTS = Path(__file__).parent / "results"
# Of many directions or bins each.
_LONG = ("projection", "null_norm", "histogram")


def finished(rows: pl.DataFrame) -> pl.DataFrame:
    """Returns the rows of every model's last step in each analysis, but for the long ones."""
    last = pl.col("step").max().over("analysis", "method", "lr_name")
    return rows.filter(pl.col("step") == last, ~pl.col("metric").is_in(_LONG))


def keep(run: Path, kept: Path) -> None:
    """Copies what is small, and of the analyses what is kept.

    Raises:
        FileNotFoundError: the run is not evaluated.
        ValueError: a damaged file.
    """
    (kept / "results").mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "config.yaml", kept)
    for name in ("evaluate.parquet", "curves.parquet"):
        shutil.copy(run / "results" / name, kept / "results")
    analyses = run / "results" / "analyze.parquet"
    if analyses.exists():
        rows = results.read_results([analyses], schema=results.ANALYSIS_SCHEMA)
        results.write_results(kept / "results" / analyses.name, finished(rows), schema=results.ANALYSIS_SCHEMA)


def main() -> None:
    """Keeps the run of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    keep(run, RESULTS / run.name)


if __name__ == "__main__":
    main()
