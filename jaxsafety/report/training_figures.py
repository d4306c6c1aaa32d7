"""What changes when along training, and whether the methods make the same change.

Each takes a seed table (``jaxsafety.report.seed_tables``) and returns a picture. What a table lacks is not drawn; a
table with nothing to draw raises ``NothingToDraw``.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from jaxsafety.report import analysis_panels as panels
from jaxsafety.report.plotting import BROWN, GREY, INK, PINK, Picture, model_styles
from jaxsafety.report.seed_tables import features_of, models_of, of_model, pick
from jaxsafety.report.tables import Model, method_label, model_label
from jaxsafety.rundir.results import METHODS


class _Panel(NamedTuple):
    """One row of the dynamics: its title and the labels of its rows; conditions are told apart by dashes."""

    title: str
    labels: dict[str, str]
    conditions: tuple[str, ...] = ("",)
    scale: Literal["linear", "log", "share"] = "linear"


_DYNAMICS = (
    _Panel("Instruct", {"analysis": "verdicts", "metric": "exact_match"}, ("safe",), "share"),
    _Panel("Null", {"analysis": "verdicts", "metric": "refused"}, ("unsafe",), "share"),
    *(
        _Panel(title, {"analysis": "interventions", "metric": "refused", "part": part}, ("unsafe",), "share")
        for title, part in (
            ("Null: null-space part alone", "only_null"),
            ("Null: without the null-space part", "all_but_null"),
        )
    ),
    _Panel("cluster separation (relative gap)", {"analysis": "clusters", "metric": "relative_gap"}),
    _Panel("null-space excess, up matrix", {"analysis": "output_space", "metric": "excess", "part": "up"}),
    _Panel(
        "gain, up matrix (log)", {"analysis": "input_space", "metric": "gain", "part": "up"}, ("safe", "unsafe"), "log"
    ),
    _Panel("sensitivity (log)", {"analysis": "sensitivity", "metric": "gradient_norm"}, ("safe", "unsafe"), "log"),
)
_CONDITION_DASHES = {"safe": "solid", "unsafe": (0, (4, 2))}
_OVERLAPS = {"matrix_cosine": "cosine", "output_overlap": "outputs", "input_overlap": "inputs"}
_PAIR_STYLES = ({"color": PINK, "marker": "o"}, {"color": BROWN, "marker": "s"}, {"color": GREY, "marker": "^"})
_RATE_DASHES = ("solid", (0, (4, 2)), (0, (1.2, 1.2)))
# Letters of a pair that leave room for a second column of the legend.
_SHORT = 20
_START = "gradients, step 0"
_CHANCE = {"color": INK, "linestyle": (0, (1, 1.5)), "linewidth": 1.2}
_ROW = 84
_MOST_POINTS = 100


def dynamics(table: pl.DataFrame) -> Picture:
    """Behaviour, clusters, null space, gain and sensitivity against training step: a column per learning rate.

    Quantities of layers are means over layers.
    """
    features = features_of(pick(table, analysis="clusters"))
    found = [(panel, _panel_rows(table, panel, features)) for panel in _DYNAMICS]
    rows = panels.needed(
        pl.concat([rows for _, rows in found]).filter(pl.col("method") != "pretrained"), "the steps of training"
    )
    models = models_of(rows)
    rates = list(dict.fromkeys(model.lr_name for model in sorted(models, key=lambda model: -model.lr)))
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
        figure.supxlabel("training step (log)", fontsize=12)
        panels.legend(figure, _dynamics_keys(models), columns=3)

    height = 100 + _ROW * len(shown) + panels.legend_height(len(_dynamics_keys(models)), columns=3)
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
            axes.axhline(mean, zorder=0, **_CHANCE)
        for model in models:
            # Step 0 is the pretrained model, and not on a logarithmic axis.
            curve = of_model(shown, model).filter(pl.col("step") > 0)
            dashes = _CONDITION_DASHES.get(condition, "solid") if rows["condition"].n_unique() > 1 else "solid"
            panels.draw_curve(axes, curve, over="step", style=styles[model] | {"linestyle": dashes})
    axes.grid(visible=True, axis="y")


def _dynamics_keys(models: Sequence[Model]) -> list[Any]:
    methods = {method_label(model): style | {"linestyle": "solid"} for model, style in model_styles(models).items()}
    dashes = {name: {"color": INK, "linestyle": dash} for name, dash in _CONDITION_DASHES.items()}
    return [panels.key(name, style) for name, style in (methods | dashes | {"pretrained": _CHANCE}).items()]


def alignment(table: pl.DataFrame) -> Picture:
    """Cosines and overlaps of the methods' updates beside what chance gives, and DPO's slope along training."""
    rows = pick(table, analysis="alignment")
    slope = pick(table, analysis="curves", metric="rewards/slope").filter(pl.col("n") > 0)
    panels.needed(pl.concat([rows, slope]), "alignment")
    pairs = sorted({part.partition(":")[0] for part in rows["part"]}, key=_pair_order)
    styles = {pair: _PAIR_STYLES[place % len(_PAIR_STYLES)] for place, pair in enumerate(pairs)}
    rates = list(dict.fromkeys(model.lr_name for model in sorted(models_of(rows), key=lambda model: -model.lr)))
    dashes = dict(zip([rate for rate in rates if rate], _RATE_DASHES, strict=False))
    columns = 2 if max(map(len, map(_pair_label, pairs)), default=0) <= _SHORT else 1
    overlaps = [metric for metric in _OVERLAPS if metric in rows["metric"]]
    heights = [
        (60 + 34 * len(pairs)) * bool(pairs), (44 + _ROW * len(overlaps)) * bool(overlaps), 130 * (slope.height > 0)
    ]  # fmt: skip

    def draw(figure: Figure) -> None:
        ratios = [height for height in heights if height]
        parts = iter(figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0])
        if pairs:
            _draw_cosines(next(parts), rows, styles, dashes)
        if overlaps:
            _draw_overlaps(next(parts), rows, overlaps, styles, dashes)
        if not slope.is_empty():
            _draw_slope(next(parts), slope)
        keys = [panels.key(_pair_label(pair), style) for pair, style in styles.items()]
        keys += [panels.key(rate, {"color": INK, "linestyle": dash}) for rate, dash in dashes.items()]
        if overlaps:
            keys.append(panels.key("chance", _CHANCE))
        if keys:
            panels.legend(figure, keys, columns=columns)

    entries = len(pairs) + len(dashes) + bool(overlaps)
    return Picture(
        draw, sum(heights) + panels.legend_height(entries, columns=columns), "alignment of the methods' updates"
    )


def _draw_cosines(figure: FigureBase, rows: pl.DataFrame, styles: dict[str, Any], dashes: dict[str, Any]) -> None:
    axes = figure.subplots()
    axes.axvline(0, zorder=0, **_CHANCE)
    kinds = [(rate, pick(rows, metric="cosine", lr_name=rate)) for rate in dashes]
    kinds.append((_START, pick(rows, metric="gradient_cosine", lr_name="")))
    kinds = [(name, shown) for name, shown in kinds if not shown.is_empty()]
    labels = []
    for pair, style in styles.items():
        for name, shown in kinds:
            panels.draw_dot(axes, len(labels), pick(shown, part=pair), style=panels.dot(style))
            labels.append(name)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_title("cosine of whole updates, and of gradients")
    axes.grid(visible=True, axis="y")
    axes.tick_params(axis="y", length=0)


def _draw_overlaps(
    figure: FigureBase, rows: pl.DataFrame, metrics: Sequence[str], styles: dict[str, Any], dashes: dict[str, Any]
) -> None:
    matrices = sorted({part.partition(":")[2] for part in rows["part"]} - {""}, reverse=True)
    grid = figure.subplots(len(metrics), len(matrices), sharex=True, sharey="row", squeeze=False)
    for row, metric in zip(grid, metrics, strict=True):
        for axes, matrix in zip(row, matrices, strict=True):
            for pair, style in styles.items():
                shown = pick(rows, part=f"{pair}:{matrix}")
                for rate, dash in dashes.items():
                    curve = pick(shown, metric=metric, lr_name=rate)
                    panels.draw_curve(axes, curve, over="layer", style=style | {"linestyle": dash})
            _draw_chance(axes, rows.filter(pl.col("part").str.ends_with(f":{matrix}")), metric)
            axes.set_title(f"{_OVERLAPS[metric]}: {matrix}")
            axes.grid(visible=True, axis="y")
    panels.axis_titles(figure, x="layer", y="cosine; mean squared cosine")
    panels.layer_ticks(grid.flat)


def _draw_chance(axes: Axes, rows: pl.DataFrame, metric: str) -> None:
    if metric == "matrix_cosine":
        axes.axhline(0, zorder=4, **_CHANCE)
        return
    chance = pick(rows, metric=metric.replace("overlap", "chance")).drop_nulls("mean")
    levels = chance.group_by("layer").agg(pl.col("mean").mean()).sort("layer")
    axes.plot(levels["layer"], levels["mean"], zorder=4, **_CHANCE)


def _draw_slope(figure: FigureBase, slope: pl.DataFrame) -> None:
    axes = figure.subplots()
    for model, style in model_styles(models_of(slope)).items():
        curve = of_model(slope, model).sort("step")
        # The last point is the finished model, so thinning counts back from it.
        curve = curve.reverse().gather_every(-(-curve.height // _MOST_POINTS)).reverse()
        panels.draw_curve(axes, curve, over="step", style=style | {"label": model_label(model)})
    axes.set_title("slope of DPO's loss: mean σ(−margin)")
    axes.set_xlabel("training step")
    axes.set_ylim(0, 1)
    axes.grid(visible=True, axis="y")
    # It starts at 1/2 and falls: above is room.
    axes.legend(loc="upper right", borderaxespad=0, labelspacing=0.2)


def _pair_label(pair: str) -> str:
    return " ~ ".join(METHODS.get(name, name) for name in pair.split("~"))


def _pair_order(pair: str) -> tuple[list[int], str]:
    names = list(METHODS)
    return [names.index(name) if name in names else len(names) for name in pair.split("~")], pair
