"""What the places on the axes of a probe's quantities are called, and what probes of a study share."""

from dataclasses import replace
from typing import Literal, get_args

from jaxsafety import keys
from jaxsafety.analysis.quantities import MATRICES, SUBSETS, VECTORS, Coordinate
from jaxsafety.models import gpt
from jaxsafety.recipe.schema import Recipe
from jaxsafety.types import Key, Model
from jaxsafety.world import World

# Append only: a position is part of the key.
Purpose = Literal["subspaces", "baseline", "jacobian"]
_FIRST_PURPOSE = 1 << 20


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
