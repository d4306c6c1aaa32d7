"""Which lanes of a run are dead, read from its result rows.

A lane is one seed of one model. It died if nothing of its last step is finite; then nothing of it is a result, not even
what it was before, or a mean along training would jump where one seed drops out of it.
"""

import polars as pl

from jaxsafety.report.tables import Dead, Model, model_order

_LANE = ("method", "lr_name", "lr", "seed")


def count_dead(rows: pl.DataFrame) -> dict[Model, Dead]:
    """Counts the dead seeds of every model that has any, models in table order, by all rows of a stage or the analyses.

    An analysis of pairs is null where either lane is dead: only what else there is of a lane tells that it lives.
    """
    lanes = _lanes(rows)
    models = {Model(*key): lane for key, lane in lanes.group_by("method", "lr_name", "lr")}
    dead = {model: Dead(models[model]["dead"].sum(), models[model].height) for model in sorted(models, key=model_order)}
    return {model: count for model, count in dead.items() if count.dead}


def without_dead(rows: pl.DataFrame) -> pl.DataFrame:
    """Returns the rows in their order, those of dead lanes null at every step; ``rows`` as of ``count_dead``."""
    dead = _lanes(rows).filter("dead")
    if dead.is_empty():
        return rows
    marked = rows.join(dead, on=list(_LANE), how="left", maintain_order="left")
    value = pl.when(pl.col("dead").is_null()).then(pl.col("value")).alias("value")
    return marked.with_columns(value).drop("dead")


def _lanes(rows: pl.DataFrame) -> pl.DataFrame:
    # Of a dead lane the curves' ``finite`` alone is a number: it says so.
    last = rows.filter(pl.col("metric") != "finite", pl.col("step") == pl.col("step").max().over(_LANE))
    return last.group_by(_LANE).agg(pl.col("value").is_null().all().alias("dead"))
