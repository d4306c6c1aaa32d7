"""What is special about an update: its energy in the leading spaces of the weights and of what prompts bring.

The maths is :mod:`jaxsafety.linalg.kept`; beside every share stands that of a random space as large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsafety.config.fields import check
from jaxsafety.linalg import kept, svd
from jaxsafety.linalg.directions import INPUTS
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Analysis, Coordinate, Key, Measured, Section, View

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
# What the pretrained matrix reads and writes most; what prompts bring to it.
SPACES = ("reads", "writes", "unsafe", "safe")


@dataclass(frozen=True)
class Config:
    """How spaces are found.

    Attributes:
        method: of the decompositions; ``gram`` is faster, and refuses directions that it does not resolve.
    """

    method: Method = "full"
    __post_init__ = check


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns the shares of the update's energy in the first directions of every space, for :data:`SHARES` of that
    side's dimensions, and beside them what as many random ones hold. NaN where a space has fewer directions.

    Activations are the model's own on held-out safe and unsafe prompts at their last token, not centred.
    """
    rows, chance = [], []
    for name, site in INPUTS.items():
        before, after = (side["blocks"]["mlp"][name] for side in (view.base, view.params))
        for shares, expected in _shares(before, after - before, view.held[site].last, config.method):
            rows.append(shares)
            chance.append(expected)
    stacked = jnp.stack(rows)
    return {
        ("kept", "space layer share"): stacked,
        ("kept_mean", "space share"): jnp.mean(stacked, axis=1),
        ("chance", "space share"): jnp.asarray(chance),
    }


def _shares(
    before: Float[Array, "l m n"], delta: Float[Array, "l m n"], inputs: Float[Array, "l 2 b m"], method: Method
) -> Iterator[tuple[Float[Array, "l k"], list[float]]]:
    """Yields of every space the shares, and what is expected of a random one."""
    weights = svd.decompose(before, method=method)
    safe, unsafe = (svd.decompose(inputs[:, side], method=method).outputs for side in (0, 1))
    bases = {"reads": weights.inputs, "writes": weights.outputs, "unsafe": unsafe, "safe": safe}
    for space in SPACES:
        yield by_share(delta, bases[space], side="outputs" if space == "writes" else "inputs")


def by_share(
    delta: Float[Array, "l m n"], basis: Float[Array, "l d r"], *, side: kept.Side
) -> tuple[Float[Array, "l k"], list[float]]:
    """Returns the shares of an update's energy in the first directions of a basis, for :data:`SHARES` of its side's d
    dimensions (NaN where it has fewer directions), and what is expected of random ones."""
    size = basis.shape[-2]
    counts = [max(1, round(share * size)) for share in SHARES]
    return kept.energy_kept(delta, basis, side=side, counts=jnp.asarray(counts)), [count / size for count in counts]


def draw(table: Any, plot: Any) -> Any:
    """See :func:`panels`."""
    return panels(table, plot, analysis="kept_energy", spaces={space: space for space in SPACES}, of="four spaces")


def panels(table: Any, plot: Any, *, analysis: str, spaces: Mapping[str, str], of: str) -> Any:
    """The update's energy against the share of a space's directions; a column per matrix, a row per space.

    ``spaces`` are what follows the matrix in a row's part, and what the panel calls it.
    """
    every = plot.pick(table, analysis=analysis)
    rows = plot.needed(plot.pick(every, metric="kept_mean"), analysis)
    # The same of every model.
    chance = plot.of_model(plot.pick(every, metric="chance"), plot.models_of(rows)[0])
    styles = plot.model_styles(plot.models_of(rows))
    keys = plot.model_keys(styles) | {"random space": plot.CHANCE}

    def finish(grid: np.ndarray) -> None:
        for axes in grid.flat:
            axes.set_ylim(0, 1)
            axes.grid(visible=True, axis="y")

    def draw_on(figure: Any) -> None:
        grid = figure.subplots(len(spaces), len(INPUTS), sharex=True, sharey=True, squeeze=False)
        for row, (space, name) in zip(grid, spaces.items(), strict=True):
            for axes, matrix in zip(row, INPUTS, strict=True):
                plot.draw_curves(axes, plot.pick(rows, part=f"{matrix}:{space}"), over="strength", model=styles)
                expected = plot.pick(chance, part=f"{matrix}:{space}").sort("strength")
                axes.plot(expected["strength"], expected["mean"], zorder=4, **plot.CHANCE)
                axes.set_title(f"{matrix}: {name}")
        finish(grid)
        plot.axis_titles(figure, x="share of the directions, the leading ones first", y="energy of the update in them")
        plot.legend(figure, keys, columns=2)

    height = 60 + plot.ROW * len(spaces) + plot.legend_height(keys, columns=2)
    return plot.Picture(draw_on, height, f"energy of the update in the leading directions of {of}")


SECTION = Section(
    "What the update has to do with weights and activations",
    "beyond the paper",
    "The share of the update's energy in the leading directions of a space, mean over layers: of the inputs that the "
    "pretrained matrix reads and the outputs that it writes, and of the activations that held-out unsafe and safe "
    "prompts bring to it at their last token; on the dotted line it is what a random space as large holds.",
    draw,
    claims=("reads_unsafe", "reads_unsafe_beyond_safe", "reads_weights", "writes_weights"),
)
ANALYSIS = Analysis(
    Config, measure, about="update", reads=tuple(INPUTS.values()), section=SECTION,
    axes=lambda config: {
        "space": Coordinate("part", tuple(f"{matrix}:{space}" for matrix in INPUTS for space in SPACES)),
        "share": Coordinate("strength", SHARES),
    },
)  # fmt: skip
