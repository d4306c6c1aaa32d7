"""What an analysis draws with: the argument ``plot`` of its ``draw`` (:class:`jaxsafety.types.Section`).

Panels, curves and dots of rows of a seed table, how to pick such rows, and the looks that all figures share.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from jaxsafety.claims.intervals import student_interval
from jaxsafety.report.analysis_panels import (
    SIDES,
    NothingToDraw,
    axis_titles,
    blank,
    dodged,
    dot,
    draw_band,
    draw_curve,
    draw_dot,
    draw_upright,
    few_ticks,
    flow_grid,
    flow_slots,
    head,
    hollow,
    key,
    layer_ticks,
    legend,
    legend_height,
    log_range,
    log_ticks,
    model_grid,
    needed,
    reference,
    seed_values,
    short,
    side_legend,
    stacked,
)
from jaxsafety.report.plotting import BROWN, GREY, INK, PINK, VERDICT_COLOURS, Picture, condition_styles, model_styles
from jaxsafety.report.seed_tables import conditions_of, features_of, models_of, of_model, pick
from jaxsafety.report.tables import Model, condition_label, model_label
from jaxsafety.rundir.results import METHODS

# fmt: off
__all__ = [
    "ATTENTION", "CHANCE", "INK", "MLP", "PAIR_STYLES", "RANDOM", "RATE_DASHES", "ROW", "SIDES", "VERDICT_COLOURS",
    "WIDE", "NothingToDraw", "Picture", "alive", "axis_titles", "blank", "condition_label", "condition_styles",
    "conditions_of", "dodged", "dot", "draw_band", "draw_curve", "draw_dot", "draw_upright", "fastest", "features_of",
    "few_ticks", "flow_grid", "flow_slots", "head", "hollow", "key", "layer_ticks", "legend", "legend_height",
    "log_range", "log_ticks", "model_grid", "model_keys", "model_label", "model_styles", "models_of", "needed",
    "of_model", "pair_label", "pair_order", "pick", "reference", "seed_values", "share_intervals", "short",
    "side_legend", "spaced", "stacked", "together",
]
# fmt: on

MLP = ("gate", "up", "down")
ATTENTION = ("q", "k", "v", "o")
# Height of a row of panels; columns beside which there is place for a few words in a title.
ROW, WIDE = 84, 2
RANDOM = {"color": INK, "linestyle": (0, (1, 1.5))}
CHANCE = RANDOM | {"linewidth": 1.2}
PAIR_STYLES = ({"color": PINK, "marker": "o"}, {"color": BROWN, "marker": "s"}, {"color": GREY, "marker": "^"})
RATE_DASHES = ("solid", (0, (4, 2)), (0, (1.2, 1.2)))


def together(*tables: pl.DataFrame) -> pl.DataFrame:
    """The rows of all tables."""
    return pl.concat(tables)


def alive(table: pl.DataFrame) -> pl.DataFrame:
    """The rows with a finite seed."""
    return table.filter(pl.col("n") > 0)


def fastest(models: Sequence[Model]) -> list[Model]:
    """Every method's model at its largest learning rate."""
    highest = {method: max(model.lr for model in models if model.method == method) for method, *_ in models}
    return [model for model in models if model.lr == highest[model.method]]


def model_keys(styles: dict[Model, Any]) -> list[Any]:
    """Entries of a legend, one a model."""
    return [key(model_label(model), style) for model, style in styles.items()]


def share_intervals(curves: Sequence[np.ndarray]) -> pl.DataFrame:
    """Mean, low and high at every point of the seeds' curves, which are shares: intervals end at 0 and 1."""
    summary = [student_interval(column)._asdict() for column in np.transpose(curves)]
    frame = pl.DataFrame(summary, schema_overrides={"low": pl.Float64, "high": pl.Float64})
    return frame.with_columns(pl.col("low", "high").clip(0, 1))


def spaced(layers: Sequence[int], *, most: int) -> list[int]:
    """At most so many of the layers, evenly spaced, the first and the last among them."""
    chosen = np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int)
    return [layers[place] for place in chosen]


def pair_label(pair: str) -> str:
    """Two methods' names for people, of ``one~other``."""
    return " ~ ".join(METHODS.get(name, name) for name in pair.split("~"))


def pair_order(pair: str) -> tuple[list[int], str]:
    """What to sort pairs of methods by."""
    names = list(METHODS)
    return [names.index(name) if name in names else len(names) for name in pair.split("~")], pair
