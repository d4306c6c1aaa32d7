"""An analysis that the package does not know, as somebody would write it: norms of the residual stream, drawn."""

from dataclasses import dataclass

import jax.numpy as jnp

from jaxsafety.config.fields import check, static
from jaxsafety.types import Analysis, Coordinate, Section

SITE = "hook_resid_post"


@dataclass(frozen=True)
class Config:
    """Which norms.

    Attributes:
        powers: of the norm.
    """

    powers: tuple[int, ...] = static((1, 2), at_least=1)
    __post_init__ = check


def measure(view, config, *, key):
    norms = jnp.linalg.norm(view.seen[SITE].last, axis=-1)
    by_power = jnp.stack([jnp.mean(norms**power, axis=-1) for power in config.powers])
    return {("norm", "power layer condition"): by_power}


def draw(table, plot):
    rows = plot.needed(plot.pick(table, part="power 1", condition="unsafe"), "norms")
    models = plot.models_of(rows)

    def onto(figure):
        for model, axes in plot.flow_grid(figure, models).items():
            plot.draw_curve(axes, plot.of_model(rows, model), over="layer", style=plot.SIDES["unsafe"])
        plot.axis_titles(figure, x="layer", y="norm of mine")

    return plot.Picture(onto, 100 * len(models), "norms of the residual stream")


ANALYSIS = Analysis(
    Config,
    measure,
    reads=(SITE,),
    axes=lambda config: {"power": Coordinate("part", tuple(f"power {power}" for power in config.powers))},
    section=Section("Norms of mine", "no paper", "The longer the better.", draw, claims=("mine_is_long",)),
)
