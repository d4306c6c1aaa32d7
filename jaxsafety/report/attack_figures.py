"""What breaks safety fine-tuning: jailbreaks, and attacks of growing strength (Figure 7 of the paper).

Each takes a seed table (``jaxsafety.report.seed_tables``) and returns a picture, a row of panels per model. What a
table lacks is not drawn; a table with nothing to draw raises ``NothingToDraw``.

References:
    Jain et al. (2024), arXiv 2407.10264, Figure 7.
"""

import itertools

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsafety.report import plot as panels
from jaxsafety.report.plotting import INK, Picture, condition_styles
from jaxsafety.report.seed_tables import conditions_of, features_of, models_of, of_model, pick
from jaxsafety.report.tables import Model, condition_label


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
                if metric == "relative_tau":
                    grid[model, heads[metric]].axvline(0, color=INK, linewidth=0.7, linestyle=(0, (1, 2)), zorder=0)
                else:
                    grid[model, heads[metric]].set_xscale("log")
            if metric != "relative_tau":
                panels.log_ticks(grid[models[-1], heads[metric]].xaxis, most=3)
                grid[models[-1], heads[metric]].set_xlabel("log scale")
        marks = {"color": INK, "marker": "o", "linestyle": "none"}
        panels.legend(figure, {"all prompts": marks, "successful attacks": panels.hollow(marks)}, columns=2)

    height = 84 + (30 + 15 * len(conditions)) * len(models)
    return Picture(draw, height, "jailbreaks beside safe and unsafe prompts")


def _condition_dots(axes: Axes, rows: pl.DataFrame, conditions: list[str]) -> None:
    for place, (condition, look) in enumerate(condition_styles(conditions).items()):
        style = panels.dot(look)
        shown = pick(rows, condition=condition)
        panels.draw_dot(axes, panels.dodged(place, 0), pick(shown, subset="all"), style=style)
        panels.draw_dot(axes, panels.dodged(place, 1), pick(shown, subset="successful"), style=panels.hollow(style))
    panels.dot_rows(axes, [condition_label(name) for name in conditions])
    if rows.is_empty():
        # The pretrained model has no update, and so no gain.
        panels.blank(axes)


def _without_strength(rows: pl.DataFrame, label: str) -> Picture:
    """Of an attack that has one point, compliance and refusals: a row per model."""
    models = models_of(rows)
    styles = {
        name: {"color": panels.VERDICT_COLOURS[name], "marker": marker, "linestyle": "none"}
        for name, marker in (("complied", "o"), ("refused", "s"))
    }

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, model in enumerate(models):
            for side, (name, style) in enumerate(styles.items()):
                panels.draw_dot(axes, panels.dodged(place, side), pick(of_model(rows, model), metric=name), style=style)
        panels.dot_rows(axes, [panels.model_label(model) for model in models])
        axes.set_xlim(-0.05, 1.05)
        axes.grid(visible=True, axis="y")
        panels.axis_titles(figure, x=f"share of the {condition_label(rows['condition'][0])} prompts")
        panels.legend(figure, styles, columns=2)

    return Picture(draw, 70 + 24 * len(models), f"the attack {label}: complied with and refused")


def attack(table: pl.DataFrame, *, label: str, over: str = "strength") -> Picture:
    """How an attack fares against its strength, the field ``over``: compliance and refusals of unsafe prompts, or of
    its own, and where they are measured relative tau and gain, which are means over layers."""
    heads = {"complied": "complied", "refused": "refused", "relative_tau": "relative τ", "gain": "gain"}
    rows = panels.needed(
        pick(table, layer=None, analysis=label, subset="all", metric=tuple(heads)), f"the attack {label}"
    )
    condition = "unsafe" if "unsafe" in rows["condition"] else rows["condition"][0]
    rows = pick(rows, condition=condition)
    if not over:
        return _without_strength(rows, label)
    rows = rows.with_columns(pl.col("strength").fill_null(0.0))
    columns = {head: {"metric": metric} for metric, head in heads.items() if metric in rows["metric"]}
    parts = sorted(rows["part"].unique(), key=lambda part: (len(part), part))
    styles = dict(zip(parts, itertools.cycle(panels.CURVES), strict=False))

    strength = f"{over} ({condition_label(condition)} prompts)".lstrip()

    def finish(grid: dict[tuple[Model, str], Axes]) -> None:
        for (_, head), axes in grid.items():
            if not axes.lines:
                panels.blank(axes)
            panels.few_ticks(axes)
            if head in ("complied", "refused"):
                axes.set_ylim(-0.04, 1.04)
            elif head == heads["relative_tau"]:
                panels.reference(axes, 0.0)

    return panels.model_curves(
        rows, columns, finish, over="strength", part=styles, x=strength, keys=styles if any(parts) else {},
        key_columns=3, margin=66, shared={"sharey": "col"}, name=f"the attack {label} against its strength",
    )  # fmt: skip
