"""What scaling, cutting and lending the update does: interventions on the weights, judged by behaviour.

Each takes a seed table (``jaxsafety.report.seed_tables``) and returns a picture. What a table lacks is not drawn; a
table with nothing to draw raises ``NothingToDraw``.

References:
    Jain et al. (2024), arXiv 2407.10264, section 4.2 (interventions along the update).
"""

import math
from collections.abc import Mapping
from itertools import cycle

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from jaxsafety.report import plot as panels
from jaxsafety.report.plot import SIDES
from jaxsafety.report.plotting import CONDITION_STYLES, Picture
from jaxsafety.report.seed_tables import models_of, of_model, pick
from jaxsafety.report.tables import COLUMNS, Model
from jaxsafety.rundir.results import METHODS

SCALED = {"whole": "whole", "mlp": "MLP", "up": "up", "down": "down"}
# What is kept of the update, in the order of the rows; rank, layer and other edits have a row per strength.
_SPACES = [f"{keep} {space}" for keep in ("only", "all but") for space in ("null", "range", "random")]
KEPT = {"whole": "whole update", "mlp_matrices": "MLP matrices"} | {name.replace(" ", "_"): name for name in _SPACES}
KEPT |= {"attention": "attention", "rank": "rank {}", "layer": "layer {}"}
# What the labels of edits by `directions` begin with, which have a figure of their own.
DIRECTIONS = "directions_"
_CHOICES = (panels.PINK, panels.GREY, panels.BROWN)
_RATES = ("Instruct", "Null", "JB-CO-Task", "JB-CO-Text", "JB-MisGen")
_DOT_ROW = 15


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
    columns = {head: {"metric": metric} for metric, head in heads.items() if metric in rows["metric"]}

    def finish(grid: dict[tuple[Model, str], Axes]) -> None:
        for (_, head), axes in grid.items():
            if head == heads["gradient_norm"]:
                panels.log_range(axes, pick(rows, **columns[head]))
                panels.log_ticks(axes.yaxis, most=3)
            panels.few_ticks(axes)

    return panels.model_curves(
        rows, columns, finish, over="strength", condition=SIDES, x="factor α on the whole update",
        shared={"sharey": "col"}, across={heads["relative_tau"]: 0.0},
        name="relative tau and sensitivity against the factor on the whole update",
    )  # fmt: skip


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
    """Null and Instruct when one part of the update is kept or left out: a panel per model, a row per part.

    A model of which the whole update alone was tried has no panel beside models of which parts were.
    """
    rows = panels.needed(_judged(table, ("Instruct", "Null")), "interventions")
    others = {part: f"{part} {{}}" for part in sorted(set(rows["part"]) - set(KEPT))}
    kept = [
        (part, strength, label.format(f"{strength:g}" if strength is not None else ""))
        for part, label in (KEPT | others).items()
        for strength in sorted(pick(rows, part=part)["strength"].unique(), key=lambda value: value or 0)
    ]
    parted = rows.filter(pl.col("part") != "whole")
    models, styles = models_of(rows if parted.is_empty() else parted), _styles(("Instruct", "Null"))

    def draw(figure: FigureBase) -> None:
        grid = panels.flow_grid(figure, models)
        for model, axes in grid.items():
            for side, (name, style) in enumerate(styles.items()):
                for place, (part, strength, _) in enumerate(kept):
                    shown = pick(of_model(rows, model), rate=name, part=part, strength=strength)
                    panels.draw_dot(axes, panels.dodged(place, side), shown, style=panels.dot(style))
            _kept_rows(axes, kept)
        panels.axis_titles(figure, x="share of prompts")
        panels.legend(figure, {name: panels.dot(style) for name, style in styles.items()}, columns=2)

    height = 60 + (26 + _DOT_ROW * len(kept)) * math.ceil(len(panels.flow_slots(models)) / 2)
    return Picture(draw, height, "what survives when part of the update is kept or left out")


def directions(table: pl.DataFrame) -> Picture:
    """Null and Instruct against the number of directions kept, a panel per model and rate, a curve per choice."""
    rows = panels.needed(_judged(table, ("Null", "Instruct")), "interventions: directions")
    ranks = sorted(rows["strength"].unique())
    # Ranks are doubled from one to the next: evenly spaced, none at the left end.
    rows = rows.with_columns(pl.col("strength").replace_strict(ranks, list(range(len(ranks)))).alias("strength"))
    styles = {
        part: {"color": colour, "marker": marker}
        for part, colour, marker in zip(sorted(rows["part"].unique()), cycle(_CHOICES), cycle("osD^vP"), strict=False)
    }
    keys = {part.removeprefix(DIRECTIONS): style for part, style in styles.items()}

    def finish(grid: dict[tuple[Model, str], Axes]) -> None:
        for axes in grid.values():
            axes.set_ylim(-0.04, 1.04)
            axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.set_xticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])

    return panels.model_curves(
        rows, {name: {"rate": name} for name in ("Null", "Instruct")}, finish, over="strength", part=styles, keys=keys,
        key_columns=3, x="output directions of the MLP's update that are kept", y="share of prompts", margin=66,
        shared={"sharey": True}, name="what a few directions of the update carry",
    )  # fmt: skip


def _kept_rows(axes: Axes, kept: list[tuple[str, float | None, str]]) -> None:
    panels.dot_rows(axes, [label for _, _, label in kept])
    axes.set_xlim(-0.05, 1.05)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    # Ranks and layers are rows of one kind each: a line sets them apart.
    for place in range(1, len(kept)):
        part = kept[place][0]
        if part != kept[place - 1][0] and (part in ("all_but_null", "attention", "rank", "layer") or part not in KEPT):
            panels.reference(axes, place - 0.5)


def _against_alpha(rows: pl.DataFrame, heads: Mapping[str, str], start: pl.DataFrame, name: str) -> Picture:
    """Panels of rates against alpha; ``start`` has the rows of alpha 0 of every part."""
    models = models_of(rows)
    styles = {rate: style for rate, style in _styles(_RATES).items() if rate in rows["rate"]}
    beyond = [rows.filter(pl.col("strength") > 0)]
    for model, part in rows.select(pl.struct("method", "lr_name", "lr"), "part").unique().iter_rows():
        beyond.append(of_model(start, Model(**model)).with_columns(pl.lit(part).alias("part")))

    def finish(grid: dict[tuple[Model, str], Axes]) -> None:
        for axes in grid.values():
            if not axes.lines:
                panels.blank(axes)
            axes.set_ylim(-0.04, 1.04)
            axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
            panels.few_ticks(axes)

    columns = {head: {"part": part} for part, head in heads.items()}
    return panels.model_curves(
        pl.concat(beyond), columns, finish, over="strength", name=name, x="factor α", y="share of prompts",
        keys=styles, key_columns=3, models=models, margin=66, shared={"sharey": True}, rate=styles,
    )  # fmt: skip


def _judged(rows: pl.DataFrame, names: tuple[str, ...] = _RATES) -> pl.DataFrame:
    """The rows of the study table's columns ``names``, each with its column's name in a column ``rate``."""
    rows = pick(rows, analysis="interventions")
    return pl.concat([pick(rows, **COLUMNS[name]._asdict()).with_columns(pl.lit(name).alias("rate")) for name in names])


def _styles(names: tuple[str, ...]) -> dict[str, dict]:
    return {name: CONDITION_STYLES[COLUMNS[name].condition] for name in names}
