"""What breaks safety fine-tuning: jailbreaks, and attacks of growing strength (Figure 7 of the paper).

Each takes a seed table (``jaxsafety.report.seed_tables``) and returns a picture, a row of panels per model. What a
table lacks is not drawn; a table with nothing to draw raises ``NothingToDraw``.

References:
    Jain et al. (2024), arXiv 2407.10264, Figure 7.
"""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsafety.report import plot as panels
from jaxsafety.report.plotting import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PINK,
    Picture,
    condition_styles,
)
from jaxsafety.report.seed_tables import conditions_of, features_of, models_of, of_model, pick
from jaxsafety.report.tables import condition_label

_ROW = 84
_PART_STYLES = (
    {"color": BLUE, "linestyle": "solid", "marker": "o"},
    {"color": ORANGE, "linestyle": (0, (4, 1.6)), "marker": "s"},
    {"color": GREEN, "linestyle": (0, (1.2, 1.2)), "marker": "^"},
    {"color": PINK, "linestyle": (0, (5, 1.4, 1.2, 1.4)), "marker": "D"},
)


def jailbreaks(table: pl.DataFrame) -> Picture:
    """Relative tau, gain and sensitivity of every condition, of all prompts and of successful attacks (Figure 7).

    Relative tau and gain are means over layers.
    """
    heads = {"relative_tau": "relative τ", "gain": "gain", "gradient_norm": "sensitivity"}
    means = pick(table, layer=None)
    features = features_of(pick(means, analysis="clusters"))
    rows = panels.needed(
        pl.concat(
            [
                pick(means, analysis="clusters", metric="relative_tau", part=features),
                pick(means, analysis="input_space", metric="gain", part="up"),
                pick(means, analysis="sensitivity", metric="gradient_norm"),
            ]
        ).filter(pl.col("condition") != ""),
        "clusters, input_space or sensitivity",
    )
    models, metrics = models_of(rows), [metric for metric in heads if metric in rows["metric"]]
    conditions = conditions_of(rows)

    def draw(figure: Figure) -> None:
        grid = panels.model_grid(figure, models, [heads[metric] for metric in metrics], sharey=True)
        for metric in metrics:
            for model in models:
                _condition_dots(grid[model, heads[metric]], pick(of_model(rows, model), metric=metric), conditions)
            column = [grid[model, heads[metric]] for model in models]
            _condition_scale(column, zero=metric == "relative_tau")
        marks = {"color": INK, "marker": "o", "linestyle": "none"}
        keys = [panels.key("all prompts", marks), panels.key("successful attacks", panels.hollow(marks))]
        panels.legend(figure, keys, columns=2)

    height = 84 + (30 + 15 * len(conditions)) * len(models)
    return Picture(draw, height, "jailbreaks beside safe and unsafe prompts")


def _condition_dots(axes: Axes, rows: pl.DataFrame, conditions: list[str]) -> None:
    for place, (condition, look) in enumerate(condition_styles(conditions).items()):
        style = panels.dot(look)
        shown = pick(rows, condition=condition)
        panels.draw_dot(axes, panels.dodged(place, 0), pick(shown, subset="all"), style=style)
        panels.draw_dot(axes, panels.dodged(place, 1), pick(shown, subset="successful"), style=panels.hollow(style))
    axes.set_yticks(range(len(conditions)), [condition_label(name) for name in conditions])
    axes.set_ylim(len(conditions) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    if rows.is_empty():
        # The pretrained model has no update, and so no gain.
        panels.blank(axes)


def _condition_scale(column: list[Axes], *, zero: bool) -> None:
    """A scale for a column of panels: linear around zero, or logarithmic."""
    for axes in column:
        if zero:
            axes.axvline(0, color=INK, linewidth=0.7, linestyle=(0, (1, 2)), zorder=0)
        else:
            axes.set_xscale("log")
    if not zero:
        panels.log_ticks(column[-1].xaxis, most=3)
        column[-1].set_xlabel("log scale")


def attack(table: pl.DataFrame, *, label: str, over: str = "strength") -> Picture:
    """How an attack fares against its strength, the field ``over``: compliance and refusals of unsafe prompts, or of
    its own, and where they are measured relative tau and gain, which are means over layers."""
    heads = {"complied": "complied", "refused": "refused", "relative_tau": "relative τ", "gain": "gain"}
    rows = panels.needed(
        pick(table, layer=None, analysis=label, subset="all", metric=tuple(heads)), f"the attack {label}"
    )
    rows = pick(rows, condition="unsafe" if "unsafe" in rows["condition"] else rows["condition"][0])
    # An attack without a strength has one point.
    rows = rows.with_columns(pl.col("strength").fill_null(0.0))
    models, metrics = models_of(rows), [metric for metric in heads if metric in rows["metric"]]
    parts = sorted(rows["part"].unique(), key=lambda part: (len(part), part))
    styles = {part: _PART_STYLES[place % len(_PART_STYLES)] for place, part in enumerate(parts)}

    def draw(figure: Figure) -> None:
        grid = panels.model_grid(figure, models, [heads[metric] for metric in metrics], sharey="col")
        for model in models:
            for metric in metrics:
                axes = grid[model, heads[metric]]
                for part, style in styles.items():
                    shown = pick(of_model(rows, model), metric=metric, part=part)
                    panels.draw_curve(axes, shown, over="strength", style=style)
                if not axes.lines:
                    panels.blank(axes)
                panels.few_ticks(axes)
                if metric in ("complied", "refused"):
                    axes.set_ylim(-0.04, 1.04)
                elif metric == "relative_tau":
                    panels.reference(axes, 0.0)
        figure.supxlabel(over, fontsize=12)
        if any(parts):
            panels.legend(figure, [panels.key(part, style) for part, style in styles.items()], columns=3)

    height = 66 + _ROW * len(models) + panels.legend_height(len(parts), columns=3) * any(parts)
    return Picture(draw, height, f"the attack {label} against its strength")
