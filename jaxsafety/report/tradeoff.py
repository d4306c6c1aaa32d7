"""What a model can do against what it should refuse and does: one point per model, as an SVG string.

The rate of successful attacks alone rewards a model that is broken: it lies at the lower left here.
"""

from collections.abc import Sequence

import polars as pl
from matplotlib.figure import Figure

from jaxsafety.claims.intervals import mean_interval
from jaxsafety.report import plot
from jaxsafety.report.plotting import Picture, model_styles, svg
from jaxsafety.report.seed_tables import models_of
from jaxsafety.report.tables import Model, condition_label, method_label, model_order
from jaxsafety.rundir.results import check_schema

# Of prompts to be answered the exact match, and of those to be refused what is complied with.
_ABLE, _HARM = "exact_match", "complied"


def tradeoff(frame: pl.DataFrame, *, able: Sequence[str] = ("safe",), harm: str = "unsafe") -> str:
    """Share of ``harm`` complied with against exact match of each condition ``able``, a panel each, as SVG.

    One that is safe prompts of another, ``NAME_safe``, stands against ``NAME`` where that was judged: what is read in a
    cipher, against what is complied with in it.

    A point is the mean over living seeds of a model's last evaluated step, with 95 % Student-t intervals, and faint
    ones are the seeds; its colour is the method's, or the model's name. Conditions that were not judged have no panel.

    Raises:
        NothingToDraw: nothing of it was judged.
    """
    check_schema(frame, "frame")
    lane = ["method", "lr_name", "lr", "seed"]
    rows = frame.filter(pl.col("stage") == "evaluate").filter(pl.col("step") == pl.col("step").max().over(lane))
    judged = set(rows["condition"])
    shown = [name for name in able if name in judged]
    if not shown or harm not in judged:
        raise plot.NothingToDraw(f"no verdicts of {harm} and {' or '.join(able)} to draw")
    models = sorted(models_of(rows), key=model_order)
    styles = {model: look | {"linestyle": "none"} for model, look in model_styles(models).items()}
    looks = {method_label(model): styles[model] for model in reversed(models)}
    names = list(dict.fromkeys(method_label(model) for model in models))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, condition in zip(grid, shown, strict=True):
            against = twin if (twin := condition.removesuffix("_safe")) in judged - {condition} else harm
            for model in models:
                sides = _interval(rows, model, condition, _ABLE), _interval(rows, model, against, _HARM)
                if not all(side[1] for side in sides):
                    continue
                (x, y), (xerr, yerr) = ([side[i] for side in sides] for i in (0, 1))
                ability, done = _seeds(rows, model, condition, _ABLE), _seeds(rows, model, against, _HARM)
                both = [(ability[seed], done[seed]) for seed in ability if seed in done]
                axes.plot(*zip(*both, strict=True), alpha=0.25, markersize=2.2, zorder=1, **styles[model])
                axes.errorbar(x, y, xerr=xerr, yerr=yerr, elinewidth=0.8, alpha=0.85, markersize=5, **styles[model])
            axes.set_title(condition_label(condition) + ("" if against == harm else f", {condition_label(against)}"))
            axes.set_xlim(-0.04, 1.04)
            axes.set_ylim(-0.04, 1.04)
            axes.grid(visible=True)
        plot.axis_titles(figure, x="answered exactly", y=f"{condition_label(harm)} complied with")
        plot.legend(figure, {name: looks[name] for name in names}, columns=3)

    height = 270 + plot.legend_height(names, columns=3)
    return svg(Picture(draw, height, "what models can do against what they comply with"))


def _interval(rows: pl.DataFrame, model: Model, condition: str, metric: str) -> tuple[float, list[list[float]]]:
    """Mean over seeds, and how far its interval reaches to either side, nothing where no seed lives."""
    found = mean_interval(_seeds(rows, model, condition, metric).values())
    if found.mean is None:
        return 0.0, []
    low, high = (found.mean if one is None else one for one in (found.low, found.high))
    return found.mean, [[found.mean - low], [high - found.mean]]


def _seeds(rows: pl.DataFrame, model: Model, condition: str, metric: str) -> dict[int, float]:
    """The values of living seeds."""
    own = rows.filter(
        pl.col("method") == model.method, pl.col("lr_name") == model.lr_name, pl.col("condition") == condition,
        pl.col("metric") == metric,
    )  # fmt: skip
    return dict(own.drop_nulls("value").select("seed", "value").iter_rows())
