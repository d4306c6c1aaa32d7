"""What scaling, cutting and lending the update does: interventions on the weights, judged by behaviour.

Each takes a seed table (``jaxsafety.report.seed_tables``) and returns a picture. What a table lacks is not drawn; a
table with nothing to draw raises ``NothingToDraw``.

References:
    Jain et al. (2024), arXiv 2407.10264, section 4.2 (interventions along the update).
"""

import itertools
import math
from collections.abc import Mapping

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from jaxsafety.report import plot as panels
from jaxsafety.report.plot import SIDES
from jaxsafety.report.plotting import CONDITION_STYLES, Picture
from jaxsafety.report.seed_tables import models_of, of_model, pick
from jaxsafety.report.tables import COLUMNS
from jaxsafety.rundir.results import METHODS

SCALED = {"whole": "whole", "mlp": "MLP", "up": "up", "down": "down"}
# What is kept of the update, in the order of the rows; rank, layer and other edits have a row per strength.
KEPT = {
    "whole": "whole update",
    "mlp_matrices": "MLP matrices",
    "only_null": "only null",
    "only_range": "only range",
    "only_random": "only random",
    "all_but_null": "all but null",
    "all_but_range": "all but range",
    "all_but_random": "all but random",
    "attention": "attention",
    "rank": "rank {}",
    "layer": "layer {}",
}
_RATES = ("Instruct", "Null", "JB-CO-Task", "JB-CO-Text", "JB-MisGen")
_ROW, _DOT_ROW = 84, 15


def interventions(table: pl.DataFrame) -> Picture:
    """Instruct, Null and jailbreaks, then relative tau and sensitivity, against the factor on the update."""
    inside = pick(table, analysis="interventions", part="whole", subset="all", condition=tuple(SIDES))
    taus = pick(inside, metric="relative_tau")
    deepest = pick(taus, layer=taus["layer"].max())
    return panels.stacked(
        [
            (_scaled, _judged(pick(table, part=tuple(SCALED)))),
            (_inside, pl.concat([deepest, pick(inside, metric="gradient_norm")])),
        ],
        what="interventions",
        name="scaling the update: behaviour, clusters and sensitivity against the factor",
    )


def _scaled(rows: pl.DataFrame) -> Picture:
    """A row per model, a column per part of the update."""
    heads = {part: head for part, head in SCALED.items() if part in rows["part"]}
    # None of any part of the update is the pretrained model, measured once.
    start = pick(rows, part="whole", strength=0.0)
    return _against_alpha(rows, heads, start, "scaling the update: behaviour against the factor")


def _inside(rows: pl.DataFrame) -> Picture:
    """A row per model, a column for relative tau (of one layer) and one for sensitivity; of the whole update."""
    heads = {"relative_tau": f"relative τ, layer {rows['layer'].max()}", "gradient_norm": "sensitivity (log)"}
    models, heads = models_of(rows), {metric: head for metric, head in heads.items() if metric in rows["metric"]}

    def draw(figure: FigureBase) -> None:
        grid = panels.model_grid(figure, models, list(heads.values()), sharey="col")
        for model, (metric, head) in itertools.product(models, heads.items()):
            for condition, style in SIDES.items():
                shown = pick(of_model(rows, model), metric=metric, condition=condition)
                panels.draw_curve(grid[model, head], shown, over="strength", style=style)
            if metric == "relative_tau":
                panels.reference(grid[model, head], 0.0)
            else:
                panels.log_range(grid[model, head], pick(rows, metric=metric))
                panels.log_ticks(grid[model, head].yaxis, most=3)
            panels.few_ticks(grid[model, head])
        figure.supxlabel("factor α on the whole update", fontsize=12)
        panels.side_legend(figure)

    return Picture(draw, 82 + _ROW * len(models), "relative tau and sensitivity against the factor on the whole update")


def transfer(table: pl.DataFrame) -> Picture:
    """Instruct, Null and jailbreaks against the factor on another method's update, added to the tuned model."""
    lent = table.filter(pl.col("part").str.starts_with("transfer:"))
    rows = panels.needed(_judged(lent), "interventions: transfer")
    # None of another's update is the tuned model.
    start = _judged(pick(table, part="whole", strength=1.0)).with_columns(pl.lit(0.0).alias("strength"))
    donors = [*METHODS, *sorted({part.split(":")[1] for part in rows["part"].unique()} - set(METHODS))]
    heads = {f"transfer:{name}": f"+ α {METHODS.get(name, name)}" for name in donors}
    heads = {part: head for part, head in heads.items() if part in rows["part"]}
    return _against_alpha(rows, heads, start, "adding another method's update: behaviour against the factor")


def causal(table: pl.DataFrame) -> Picture:
    """Null and Instruct when one part of the update is kept or left out: a panel per model, a row per part."""
    rows = panels.needed(_judged(table, ("Instruct", "Null")), "interventions")
    others = {part: f"{part} {{}}" for part in sorted(set(rows["part"]) - set(KEPT))}
    kept = [
        (part, strength, label.format(f"{strength:g}" if strength is not None else ""))
        for part, label in (KEPT | others).items()
        for strength in sorted(pick(rows, part=part)["strength"].unique(), key=lambda value: value or 0)
    ]
    models, styles = models_of(rows), _styles(("Instruct", "Null"))

    def draw(figure: FigureBase) -> None:
        grid = panels.flow_grid(figure, models)
        for model, axes in grid.items():
            for side, (name, style) in enumerate(styles.items()):
                for place, (part, strength, _) in enumerate(kept):
                    shown = pick(of_model(rows, model), name=name, part=part, strength=strength)
                    panels.draw_dot(axes, panels.dodged(place, side), shown, style=panels.dot(style))
            _kept_rows(axes, kept)
        figure.supxlabel("share of prompts", fontsize=12)
        panels.legend(figure, [panels.key(name, panels.dot(style)) for name, style in styles.items()], columns=2)

    height = 60 + (26 + _DOT_ROW * len(kept)) * math.ceil(len(panels.flow_slots(models)) / 2)
    return Picture(draw, height, "what survives when part of the update is kept or left out")


def _kept_rows(axes: Axes, kept: list[tuple[str, float | None, str]]) -> None:
    axes.set_yticks(range(len(kept)), [label for _, _, label in kept])
    axes.set_ylim(len(kept) - 0.4, -0.6)
    axes.set_xlim(-0.05, 1.05)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.tick_params(axis="y", length=0)
    # Ranks and layers are rows of one kind each: a line sets them apart.
    for place in range(1, len(kept)):
        part = kept[place][0]
        if part != kept[place - 1][0] and (part in ("all_but_null", "attention", "rank", "layer") or part not in KEPT):
            panels.reference(axes, place - 0.5)


def _against_alpha(rows: pl.DataFrame, heads: Mapping[str, str], start: pl.DataFrame, name: str) -> Picture:
    """Panels of rates against alpha; ``start`` has the rows of alpha 0 of every part."""
    models = models_of(rows)
    styles = {rate: style for rate, style in _styles(_RATES).items() if rate in rows["name"]}

    def draw(figure: FigureBase) -> None:
        grid = panels.model_grid(figure, models, list(heads.values()), sharey=True)
        for model in models:
            for part, head in heads.items():
                axes = grid[model, head]
                shown = pick(of_model(rows, model), part=part)
                if not shown.is_empty():
                    shown = pl.concat([of_model(start, model), shown.filter(pl.col("strength") > 0)])
                for rate, style in styles.items():
                    panels.draw_curve(axes, pick(shown, name=rate), over="strength", style=style)
                if not axes.lines:
                    panels.blank(axes)
                axes.set_ylim(-0.04, 1.04)
                axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
                panels.few_ticks(axes)
        panels.axis_titles(figure, x="factor α", y="share of prompts")
        panels.legend(figure, [panels.key(rate, style) for rate, style in styles.items()], columns=3)

    height = 66 + _ROW * len(models) + panels.legend_height(len(styles), columns=3)
    return Picture(draw, height, name)


def _judged(rows: pl.DataFrame, names: tuple[str, ...] = _RATES) -> pl.DataFrame:
    """The rows of the study table's columns ``names``, each with its column's name in a column ``name``."""
    rows = pick(rows, analysis="interventions")
    return pl.concat([pick(rows, **COLUMNS[name]._asdict()).with_columns(pl.lit(name).alias("name")) for name in names])


def _styles(names: tuple[str, ...]) -> dict[str, dict]:
    return {name: CONDITION_STYLES[COLUMNS[name].condition] for name in names}
