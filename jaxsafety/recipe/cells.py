"""The cells of a grid: every combination of the values that a recipe's ``grid`` gives to its fields, a study each.

Which cells go together follows from their fields alone. Cells that agree in all that pretraining depends on share one
pretraining; cells of one pretraining that differ only in traced scalars of tuning train as one program. Seeds are an
axis of every program already, so a grid does not run over them.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import traverse_util

from jaxsafety.config import fields as fields_
from jaxsafety.config.names import nearest
from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.schema import Recipe, as_dict

_PRETRAINING_RATE = "pretrain.learning_rate"
_MOST_BYTES = 255  # of a file name
# Each is read, checked and planned, some hundredths of a second long.
_MOST_CELLS = 10_000
_REFUSED = {
    "seeds": "seeds are an axis of every program already, list them all under `seeds`",
    "name": "a cell is named after its values",
    "grid": "a grid has no grids",
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


def pretraining(recipe: Recipe, cells: Sequence[Cell]) -> dict[str, Cell]:
    """Returns what each of all cells, by its name, has for a pretraining: the recipe with only those fields changed."""
    paths, texts = _paths(recipe), _texts([cell.values for cell in cells])
    found: dict[str, Cell] = {}
    by_cell: dict[str, Cell] = {}
    for cell in cells:
        values = {field: value for field, value in cell.values.items() if _of_pretraining(field)}
        name = _name(values, texts) or "base"
        if name not in found:
            found[name] = Cell(name, replace(_at(recipe, values, paths), name=f"{recipe.name}-{name}"), values)
        by_cell[cell.name] = found[name]
    return by_cell


def shard(cells: Sequence[Cell], part: str) -> tuple[Cell, ...]:
    """Returns every n-th cell from the i-th on, for ``part`` "i/n" counted from 1: the n parts hold each cell once.

    Raises:
        ValueError: not i/n with 1 <= i <= n.
    """
    numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise ValueError(f"--shard must be i/n with 1 <= i <= n, such as 1/4, got {part!r}")
    return tuple(cells[int(numbers[1]) - 1 :: int(numbers[2])])


def families(cells: Iterable[Cell]) -> list[tuple[Cell, ...]]:
    """Groups cells whose pretraining differs in its learning rate at most: one program pretrains for all of them."""
    return _grouped(cells, _of_pretraining_program)


def groups(cells: Iterable[Cell]) -> list[tuple[Cell, ...]]:
    """Groups cells that one program per method tunes: one pretraining, and only traced scalars of tuning differ."""
    return _grouped(cells, lambda cell, field: _of_pretraining(field) or _of_tuning_program(cell, field))


def pretraining_program(cell: Cell) -> str:
    """Returns what cells of one family have in common."""
    return _key(cell, _of_pretraining_program)


def tuning_program(cell: Cell) -> str:
    """Returns what two groups of as many cells must have in common for one compiled program to tune both."""
    return _key(cell, lambda cell, field: _of_pretraining_program(cell, field) or _of_tuning_program(cell, field))


def _of_pretraining(field: str) -> bool:
    section = field.partition(".")[0]
    return section in ("world", "grammars", "strategy", "model", "pretrain") or field == "evaluate.probe_prompts"


def _of_pretraining_program(cell: Cell, field: str) -> bool:
    return _of_pretraining(field) and field != _PRETRAINING_RATE


def _of_tuning_program(cell: Cell, field: str) -> bool:
    if field.startswith("tune.methods."):
        label, _, name = field.removeprefix("tune.methods.").rpartition(".")
        traced = fields_.traced_names(cell.recipe.tune.methods[label].options)
        return name not in (*traced, "p_unsafe")
    return field.startswith("tune.") and not field.startswith("tune.learning_rates.")


def _grouped(cells: Iterable[Cell], matters: Callable[[Cell, str], bool]) -> list[tuple[Cell, ...]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(_key(cell, matters), []).append(cell)
    return [tuple(members) for members in found.values()]


def _key(cell: Cell, matters: Callable[[Cell, str], bool]) -> str:
    return repr([value for field, value in cell.values.items() if matters(cell, field)])


def _paths(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """The path of every field that holds a value, by its dotted name."""
    return {".".join(path): path for path in traverse_util.flatten_dict(as_dict(replace(recipe, grid={})))}


def _check_field(field: str, values: Sequence[Any], paths: dict[str, tuple[str, ...]]) -> None:
    if field in _REFUSED:
        raise ValueError(f"a grid cannot run over {field!r}: {_REFUSED[field]}")
    if field not in paths:
        if below := [name for name in paths if name.startswith(f"{field}.")]:
            raise ValueError(f"grid field {field!r} is a section: expected one of its fields, such as {below[0]!r}")
        raise ValueError(f"unknown grid field {field!r}: expected a field of this recipe{nearest(field, paths)}")
    if not values:
        raise ValueError(f"grid.{field} must have at least one value, got none")


def _at(recipe: Recipe, values: dict[str, Any], paths: dict[str, tuple[str, ...]]) -> Recipe:
    content = as_dict(replace(recipe, grid={}))
    for field, value in values.items():
        *above, last = paths[field]
        _value(content, above)[last] = value
    where = "grid at " + ", ".join(f"{field}={value}" for field, value in values.items())
    try:
        return yaml_file.parse(as_dict(content), where=where)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error


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
