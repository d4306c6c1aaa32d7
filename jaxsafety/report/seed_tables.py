"""Rows of the analyses side by side over seeds: what a figure draws and what its CSV holds are the same table.

One row per quantity (``LABELS``), with ``mean``, ``low``, ``high``, ``n`` and a column ``seed_<k>`` per seed. ``low``
and ``high`` are the 95 % Student-t interval over the finite seeds, null below two of them, and clipped to [0, 1] for
shares. A seed that is not finite is null and left out. Where rows bring an interval of their own, over prompts, as the
metrics ``METRIC_low``, ``METRIC_high`` and ``METRIC_n``, and a model's are all the same for all seeds (of one seed, or
a model that they share), it and its number stand there instead.
"""

import polars as pl

from jaxsafety.claims.intervals import student_interval
from jaxsafety.report.tables import CONDITIONS, Model, model_order

_MODEL = ("method", "lr_name", "lr")
LABELS = ("analysis", *_MODEL, "step", "condition", "subset", "layer", "part", "strength", "metric")
# The metrics of an interval that rows bring along.
BOUND = "^(.*)_(low|high|n)$"
# Metrics that are shares of something: in [0, 1], and so is their interval.
SHARES = (
    *("complied", "refused", "other", "exact_match", "first_refusal", "never_refuses", "histogram", "nearest_safe"),
    *("accuracy", "auc", "probability", "leading_share", "leading_energy", "jacobian_converged"),
    *("null_norm", "null_norm_mean", "null_energy", "total_null_energy"),
    *("baseline_norm", "baseline_energy", "baseline_sampled"),
)


def seed_table(rows: pl.DataFrame) -> pl.DataFrame:
    """Puts the values of all seeds of one quantity, rows of ``LABELS``, seed and value, into one row.

    Rows are in the order of analyses, models, steps and metrics.

    Raises:
        ValueError: two values for one seed of one quantity (results of several runs).
    """
    rows, given = _given_intervals(rows)
    keys = [*LABELS, "seed"]
    if twice := rows.filter(pl.struct(keys).is_duplicated()).head(1).to_dicts():
        row = twice[0]
        raise ValueError(
            f"two values of {row['analysis']}/{row['metric']} for {row['method']} {row['lr_name']} seed {row['seed']}: "
            "expected one; filter the frame to one run first"
        )
    seeds = sorted(rows["seed"].unique())
    wide = rows.select(*keys, "value").pivot("seed", index=list(LABELS), values="value")
    wide = wide.rename({str(seed): f"seed_{seed}" for seed in seeds})
    names = [f"seed_{seed}" for seed in seeds]
    summary = [student_interval(values) for values in wide.select(*names).iter_rows()]
    schema = {"mean": pl.Float64, "low": pl.Float64, "high": pl.Float64, "n": pl.Int64}
    table = wide.hstack(pl.DataFrame(summary, schema=schema, orient="row"))
    table = table.join(given, on=list(LABELS), how="left", nulls_equal=True, maintain_order="left")
    table = table.with_columns(pl.coalesce(f"given_{name}", name).alias(name) for name in ("low", "high", "n"))
    # Somebody else's metric of a share's name may be none.
    share = pl.col("metric").is_in(SHARES) & pl.col("mean").fill_null(0).is_between(0, 1)
    clipped = (pl.when(share).then(pl.col(name).clip(0, 1)).otherwise(name).alias(name) for name in ("low", "high"))
    table = table.with_columns(clipped)
    return _ordered(table).select(*LABELS, *schema, *names)


def with_layer_means(rows: pl.DataFrame) -> pl.DataFrame:
    """Adds to tidy rows of layers each seed's mean over them, as rows without a layer.

    A seed that lacks a layer which others have, or whose value there is not finite, has no mean (a null).
    """
    keys = [name for name in LABELS if name != "layer"]
    # The mean of the layers' intervals over prompts is none.
    rows, _ = _given_intervals(rows)
    layers = rows.filter(pl.col("layer").is_not_null())
    whole = pl.col("value").drop_nulls().len() == pl.col("count").max()
    means = (
        layers.with_columns(pl.col("layer").n_unique().over(keys).alias("count"))
        .group_by([*keys, "seed"], maintain_order=True)
        .agg(pl.when(whole).then(pl.col("value").mean()).alias("value"))
        .with_columns(pl.lit(None, dtype=rows.schema["layer"]).alias("layer"))
    )
    columns = [*LABELS, "seed", "value"]
    return pl.concat([rows.select(columns), means.select(columns)])


def features_of(clusters: pl.DataFrame) -> str:
    """The activations to show where there is place for one kind: the first answer tokens, as in the paper, if any."""
    return next((part for part in ("response", "last") if part in clusters["part"]), "response")


def conditions_of(table: pl.DataFrame) -> list[str]:
    """The conditions that a table has rows of, in the order of the study's, then others by name."""
    found = set(table["condition"]) - {""}
    return [name for name in CONDITIONS if name in found] + sorted(found - set(CONDITIONS))


def models_of(table: pl.DataFrame) -> list[Model]:
    """The models that a table has rows of: pretrained, then method by learning rate."""
    return sorted({Model(*key) for key in table.select(_MODEL).iter_rows()}, key=model_order)


def of_model(table: pl.DataFrame, model: Model) -> pl.DataFrame:
    """The rows of one model."""
    return pick(table, **model._asdict())


def pick(table: pl.DataFrame, **labels: object) -> pl.DataFrame:
    """The rows whose labels are these; a tuple stands for any of its members."""
    wanted = (
        pl.col(name).is_in(value) if isinstance(value, tuple) else pl.col(name).eq_missing(value)
        for name, value in labels.items()
    )
    return table.filter(*wanted)


def _given_intervals(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows without those of intervals; and where all seeds have one, ``LABELS``, given_low, given_high, given_n."""
    rows = rows.with_row_index("place")
    metric = pl.col("metric")
    bounded = rows.filter(metric.str.contains(BOUND)).with_columns(
        metric.str.extract(BOUND, 1), metric.str.extract(BOUND, 2).alias("bound")
    )
    own = rows.select("analysis", "metric").unique()
    bounded = bounded.join(own, on=["analysis", "metric"], how="semi")
    bounds = {"low": pl.Float64, "high": pl.Float64, "n": pl.Int64}
    if bounded.is_empty():
        absent = (pl.lit(None, dtype).alias(f"given_{name}") for name, dtype in bounds.items())
        return rows.drop("place"), bounded.select(*LABELS, *absent)
    plain = rows.join(bounded.select("place"), on="place", how="anti", maintain_order="left").drop("place")
    keys = [*LABELS, "seed"]
    given = bounded.select(keys).unique()
    for name, dtype in bounds.items():
        one = bounded.filter(bound=name).select(*keys, pl.col("value").cast(dtype).alias(f"given_{name}"))
        given = given.join(one, on=keys, how="left", nulls_equal=True)
    # Of every seed that has a value, the same.
    seeds = plain.group_by(LABELS).agg(pl.col("seed").n_unique().alias("seeds"))
    counted = given.with_columns(pl.len().over(list(LABELS)).alias("own"))
    whole = counted.join(seeds, on=list(LABELS), how="inner", nulls_equal=True).filter(pl.col("own") == pl.col("seeds"))
    one = whole.drop("seed", "own", "seeds").unique().with_columns(pl.len().over(list(LABELS)).alias("alike"))
    # Of a model in all that it has: shares of a few prompts are the same in two seeds by chance.
    return plain, one.filter(pl.col("alike").max().over(*_MODEL, "step") == 1).drop("alike")


def _ordered(table: pl.DataFrame) -> pl.DataFrame:
    ranks = [(*model, rank) for rank, model in enumerate(models_of(table))]
    schema = dict(zip(_MODEL, (pl.String, pl.String, pl.Float64), strict=True)) | {"rank": pl.Int64}
    ranked = table.join(pl.DataFrame(ranks, schema=schema, orient="row"), on=_MODEL)
    names = list(CONDITIONS)
    condition = pl.col("condition").replace_strict(names, range(len(names)), default=-1, return_dtype=pl.Int64)
    order = ["analysis", "rank", "step", "metric", condition, "condition", "subset", "part", "layer", "strength"]
    return ranked.sort(order)
