"""What a probe returns: named arrays whose axes have names, and what the places on those axes are called."""

from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array

from jaxsafety import keys
from jaxsafety.models import gpt
from jaxsafety.recipe import Recipe
from jaxsafety.types import Key, Model
from jaxsafety.world import World


class Quantity(NamedTuple):
    """One measured quantity.

    Attributes:
        analysis: which analysis it belongs to.
        metric: its name.
        axes: names of its axes in order, separated by spaces; see :func:`coordinates`.
    """

    analysis: str
    metric: str
    axes: str = ""


Quantities = dict[Quantity, Any]

# Append only: a position is part of the key.
Purpose = Literal["subspaces", "baseline", "jacobian"]
_FIRST_PURPOSE = 1 << 20

# All prompts of a condition, or those that this model complied with.
SUBSETS = ("all", "successful")
# MLP activations: at the last prompt token; averaged over the first response positions; the same, first d neurons only.
VECTORS = ("last", "response", "response_d")
MATRICES = ("up", "down")


class Coordinate(NamedTuple):
    """The places along an axis: the result column that names them, and their names."""

    column: str
    names: tuple[Any, ...]


def model_of(recipe: Recipe, world: World) -> Model:
    """Returns the model with its layers as a loop, which compiles fastest: a probe runs a few times."""
    return gpt.model(replace(recipe.model.build(world), unroll=1))


def conditions(recipe: Recipe) -> tuple[str, ...]:
    """Conditions that the analyses look at: safe, unsafe, then the others that the recipe evaluates."""
    others = tuple(name for name in recipe.evaluate.conditions if name not in ("safe", "unsafe"))
    return ("safe", "unsafe", *others)


def coordinates(recipe: Recipe, *, layers: int, places: int) -> dict[str, Coordinate]:
    """Names the places along every axis that a probe may return.

    Args:
        recipe: the study.
        layers: of its model.
        places: judged tokens of the longest answer block.
    """
    config = recipe.analyze
    return {
        "condition": Coordinate("condition", conditions(recipe)),
        "class": Coordinate("condition", ("safe", "unsafe")),
        "subset": Coordinate("subset", SUBSETS),
        "layer": Coordinate("layer", tuple(range(layers))),
        "vector": Coordinate("part", VECTORS),
        "matrix": Coordinate("part", MATRICES),
        "direction": Coordinate("strength", tuple(map(float, range(config.directions)))),
        # A safe prompt has nothing to refuse.
        "asked": Coordinate("condition", conditions(recipe)[1:]),
        "depth": Coordinate("strength", tuple(map(float, config.prefill_depths))),
        "place": Coordinate("strength", tuple(map(float, range(places)))),
    }


def purpose_key(key: Key, purpose: Purpose) -> Key:
    """Returns the key of one use of randomness in the analyses, from a seed's root key.

    Prompts come from steps of the analysis stream; these lie where no step does.
    """
    return keys.at_step(keys.stream(key, "analysis"), _FIRST_PURPOSE + get_args(Purpose).index(purpose))


def averaged(values: Array, weights: Array) -> Array:
    """Mean of ``values[..., b]`` over the samples that ``weights[..., b]`` keeps; NaN where it keeps none."""
    kept = jnp.sum(weights, axis=-1)
    total = jnp.sum(jnp.where(weights, values, 0.0), axis=-1)
    return jnp.where(kept > 0, total / jnp.maximum(kept, 1), jnp.nan)
