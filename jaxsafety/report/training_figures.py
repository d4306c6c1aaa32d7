"""What changes when along training.

It takes a seed table (``jaxsafety.report.seed_tables``) and returns a picture. What a table lacks is not drawn; a table
with nothing to draw raises ``NothingToDraw``.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsafety.report import plot as panels
from jaxsafety.report.plot import CHANCE, ROW
from jaxsafety.report.plotting import INK, Picture, model_styles
from jaxsafety.report.seed_tables import features_of, models_of, pick
from jaxsafety.report.tables import Model, method_label


class _Panel(NamedTuple):
    """One row of the dynamics: its title and the labels of its rows; conditions are told apart by dashes."""

    title: str
    labels: dict[str, str]
    conditions: tuple[str, ...] = ("",)
    scale: Literal["linear", "log", "share"] = "linear"


_EDITED = {"analysis": "interventions", "metric": "refused"}
_DYNAMICS = (
    _Panel("Instruct", {"analysis": "verdicts", "metric": "exact_match"}, ("safe",), "share"),
    _Panel("Null", {"analysis": "verdicts", "metric": "refused"}, ("unsafe",), "share"),
    _Panel("Null: null-space part alone", _EDITED | {"part": "only_null"}, ("unsafe",), "share"),
    _Panel("Null: without the null-space part", _EDITED | {"part": "all_but_null"}, ("unsafe",), "share"),
    _Panel("cluster separation (relative gap)", {"analysis": "clusters", "metric": "relative_gap"}),
    _Panel("null-space excess, up matrix", {"analysis": "output_space", "metric": "excess", "part": "up"}),
    _Panel(
        "gain, up matrix (log)", {"analysis": "input_space", "metric": "gain", "part": "up"}, ("safe", "unsafe"), "log"
    ),
    _Panel("sensitivity (log)", {"analysis": "sensitivity", "metric": "gradient_norm"}, ("safe", "unsafe"), "log"),
)
_CONDITION_DASHES = {"safe": "solid", "unsafe": (0, (4, 2))}


def dynamics(table: pl.DataFrame) -> Picture:
    """Behaviour, clusters, null space, gain and sensitivity against training step: a column per learning rate.

    Quantities of layers are means over layers.
    """
    features = features_of(pick(table, analysis="clusters"))
    found = [(panel, _panel_rows(table, panel, features)) for panel in _DYNAMICS]
    tuned = pl.concat([rows for _, rows in found]).filter(pl.col("method") != "pretrained")
    # A model of the last step alone has no way there to show.
    lane = ["method", "lr_name", "lr"]
    rows = panels.needed(tuned.filter(pl.col("step").n_unique().over(lane) > 1), "the steps of training")
    models = models_of(rows)
    rates = panels.rates_of(models)
    shown = [(panel, rows) for panel, rows in found if (rows["n"] > 0).any()]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(shown), len(rates), sharex=True, sharey="row", squeeze=False)
        for row, (panel, values) in zip(grid, shown, strict=True):
            for axes, rate in zip(row, rates, strict=True):
                _draw_dynamics(axes, values, [model for model in models if model.lr_name == rate])
            row[0].set_title(panel.title)
            if panel.scale == "share":
                row[0].set_ylim(-0.04, 1.04)
            elif panel.scale == "log":
                row[0].set_yscale("log")
                panels.log_ticks(row[0].yaxis, most=4)
        for axes, rate in zip(grid[0], rates, strict=True):
            panels.head(axes, rate)
        grid[-1, 0].set_xscale("log")
        panels.log_ticks(grid[-1, 0].xaxis, most=4)
        panels.axis_titles(figure, x="training step (log)")
        panels.legend(figure, _dynamics_keys(models), columns=3)

    height = 100 + ROW * len(shown) + panels.legend_height(_dynamics_keys(models), columns=3)
    return Picture(draw, height, "what changes when, along training")


def _panel_rows(table: pl.DataFrame, panel: _Panel, features: str) -> pl.DataFrame:
    labels: dict[str, Any] = {"subset": "all", "layer": None, "condition": panel.conditions, **panel.labels}
    if panel.labels["analysis"] == "clusters":
        labels["part"] = features
    return pick(table, **labels)


def _draw_dynamics(axes: Axes, rows: pl.DataFrame, models: Sequence[Model]) -> None:
    styles = model_styles(models)
    for condition in rows["condition"].unique(maintain_order=True):
        shown = pick(rows, condition=condition)
        for mean in pick(shown, method="pretrained")["mean"].drop_nulls():
            axes.axhline(mean, zorder=0, **CHANCE)
        dashes = _CONDITION_DASHES.get(condition, "solid") if rows["condition"].n_unique() > 1 else "solid"
        dashed = {model: style | {"linestyle": dashes} for model, style in styles.items()}
        # Step 0 is the pretrained model, and not on a logarithmic axis.
        panels.draw_curves(axes, shown.filter(pl.col("step") > 0), over="step", model=dashed)
    axes.grid(visible=True, axis="y")


def _dynamics_keys(models: Sequence[Model]) -> dict[str, Any]:
    methods = {method_label(model): style | {"linestyle": "solid"} for model, style in model_styles(models).items()}
    dashes = {name: {"color": INK, "linestyle": dash} for name, dash in _CONDITION_DASHES.items()}
    return methods | dashes | {"pretrained": CHANCE}
