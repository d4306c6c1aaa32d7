"""The cells of a grid: every combination of the values that a recipe's ``grid`` gives to its fields, a study each.

A grid is for what all models of a study have in common: the world, the model's sizes, what is judged. Fields of single
models take lists of values themselves (:mod:`jaxsafety.recipe.graph`), and train as one program. Seeds are an axis of
every program already.
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import traverse_util

from jaxsafety.config.names import nearest
from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.schema import Recipe, as_dict

_MOST_BYTES = 255  # of a file name
# Each is read, checked and planned, some hundredths of a second long.
_MOST_CELLS = 10_000
_REFUSED = {
    "seeds": "seeds are an axis of every program already, list them all under `seeds`",
    "name": "a cell is named after its values",
    "grid": "a grid has no grids",
    "models": "list the values where the field is, and every one of them is a lane of that model",
}


@dataclass(frozen=True)
class Cell:
    """One combination: its name, a plain file name (empty for a recipe without a grid), its study, without a grid, and
    dotted field to value, in the order of the grid."""

    name: str
    recipe: Recipe
    values: dict[str, Any]


def expand(recipe: Recipe) -> tuple[Cell, ...]:
    """Returns the cells of a recipe, the last field of its grid running fastest; a recipe without a grid is one cell.

    Raises:
        ValueError: an unknown field (the nearest is named), a section, a field that a grid cannot run over; no values
            or a value twice; a value, or a combination of values, that is no recipe.
    """
    if not recipe.grid:
        return (Cell("", recipe, {}),)
    paths = _paths(recipe)
    for field, values in recipe.grid.items():
        _check_field(field, values, paths)
    if (count := math.prod(map(len, recipe.grid.values()))) > _MOST_CELLS:
        raise ValueError(f"grid must have at most {_MOST_CELLS} cells, got {count}: split it into several recipes")
    combinations = itertools.product(*recipe.grid.values())
    recipes = [_at(recipe, dict(zip(recipe.grid, combination, strict=True)), paths) for combination in combinations]
    typed = [{field: _value(as_dict(one), paths[field]) for field in recipe.grid} for one in recipes]
    for field in recipe.grid:
        if len({repr(values[field]) for values in typed}) < len(recipe.grid[field]):
            raise ValueError(f"grid.{field} must have distinct values, got {list(recipe.grid[field])}")
    texts = _texts(typed)
    names = [_name(values, texts) for values in typed]
    if longest := next((name for name in names if len(name.encode()) > _MOST_BYTES), None):
        raise ValueError(
            f"a cell is a directory named after its values, of at most {_MOST_BYTES} bytes, got "
            f"{len(longest.encode())}: make the grid's lists shorter or its fields fewer ({longest[:40]}...)"
        )
    named = zip(names, recipes, typed, strict=True)
    return tuple(Cell(name, replace(one, name=f"{recipe.name}-{name}"), values) for name, one, values in named)


def shard(cells: Sequence[Cell], part: str) -> tuple[Cell, ...]:
    """Returns every n-th cell from the i-th on, for ``part`` "i/n" counted from 1: the n parts hold each cell once.

    Raises:
        ValueError: not i/n with 1 <= i <= n.
    """
    numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise ValueError(f"--shard must be i/n with 1 <= i <= n, such as 1/4, got {part!r}")
    return tuple(cells[int(numbers[1]) - 1 :: int(numbers[2])])


def _paths(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """The path of every field that holds a value, by its dotted name."""
    return {".".join(path): path for path in traverse_util.flatten_dict(as_dict(replace(recipe, grid={})))}


def _check_field(field: str, values: Sequence[Any], paths: dict[str, tuple[str, ...]]) -> None:
    if why := _REFUSED.get(field.partition(".")[0]):
        raise ValueError(f"a grid cannot run over {field!r}: {why}")
    if field not in paths:
        if below := [name for name in paths if name.startswith(f"{field}.")]:
            raise ValueError(f"grid field {field!r} is a section: expected one of its fields, such as {below[0]!r}")
        raise ValueError(f"unknown grid field {field!r}: expected a field of this recipe{nearest(field, paths)}")
    if not values:
        raise ValueError(f"grid.{field} must have at least one value, got none")


def _at(recipe: Recipe, values: dict[str, Any], paths: dict[str, tuple[str, ...]]) -> Recipe:
    content = as_dict(replace(recipe, grid={}))
    if (now := values.get("subject.checkpoint")) is not None:
        # The model that others begin with is the subject's.
        for model in content["models"].values():
            if model.get("checkpoint") == content["subject"]["checkpoint"]:
                model["checkpoint"] = now
    for field, value in values.items():
        *above, last = paths[field]
        _value(content, above)[last] = value
    where = "grid at " + ", ".join(f"{field}={value}" for field, value in values.items())
    return yaml_file.parse(as_dict(content), where=where)


def _value(content: Any, path: Iterable[str]) -> Any:
    for name in path:
        content = content[name]
    return content


def _name(values: dict[str, Any], texts: dict[tuple[str, str], str]) -> str:
    return ",".join(texts[field, repr(value)] for field, value in values.items())


def _texts(cells: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """What names call a value of a field: the shortest tail of the field that no other has, and the value."""
    every = {field: list({repr(cell[field]): cell[field] for cell in cells}.values()) for field in cells[0]}
    tails = {field: [".", *field.split(".")] for field in every}
    texts = {}
    for field, values in every.items():
        others = [other for other in every if other != field]
        lengths = range(1, len(tails[field]))
        length = next(n for n in lengths if all(tails[other][-n:] != tails[field][-n:] for other in others))
        tail = ".".join(tails[field][-length:])
        shown = [_shown(value) for value in values]
        if len(set(shown)) < len(shown):
            shown = [f"{number}-{text}" for number, text in enumerate(shown, 1)]
        texts |= {(field, repr(value)): f"{tail}={text}" for value, text in zip(values, shown, strict=True)}
    return texts


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_shown, value))
    text = Path(value).stem if isinstance(value, str) and "/" in value else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)
