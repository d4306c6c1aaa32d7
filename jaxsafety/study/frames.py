"""Labelled arrays of the analyses as tidy rows, column by column: a study has too many for a dict each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from jaxsafety.config.names import check_name
from jaxsafety.rundir.results import ANALYSIS_SCHEMA
from jaxsafety.types import Coordinate

# (metric, axes) to [h, s, *axes].
Arrays = Mapping[tuple[str, str], np.ndarray]

_MODEL = ("method", "lr_name", "lr", "step")
_ABSENT = {"condition": "", "subset": "all", "layer": None, "part": "", "strength": None}


def to_frame(
    arrays: Arrays, coordinates: Mapping[str, Coordinate], *, models: Sequence[tuple[str, str, float, int]],
    seeds: Sequence[int], finite: np.ndarray, labels: Mapping[str, Any],
) -> pl.DataFrame:  # fmt: skip
    """Returns one row per entry of every array; entries of living lanes that are NaN are undefined and left out.

    ``models`` are (method, lr_name, lr, step) of each row h, ``seeds`` the numbers along s, and ``finite [h, s]`` is
    False for a lane that diverged, whose values are null. ``labels``, the same for all rows, win over the defaults of
    absent axes.

    Raises:
        ValueError: an axis without coordinates, with too few names or another axis' column, or an array of other
            dimensions than its axes.
    """
    frames = [pl.DataFrame(schema=ANALYSIS_SCHEMA)]
    for (metric, axes), values in arrays.items():
        frames.append(_one(metric, axes.split(), np.asarray(values, float), coordinates, models, seeds, finite, labels))
    return pl.concat(frames)


def _one(metric, axes, values, coordinates, models, seeds, finite, labels):
    if values.ndim != 2 + len(axes):
        raise ValueError(f"{metric} has shape {values.shape[2:]}, expected an axis for each of {axes}")
    dead = np.broadcast_to(~finite.reshape(finite.shape + (1,) * len(axes)), values.shape)
    kept = np.nonzero(dead | np.isfinite(values))
    row, seed, *places = kept
    columns = {name: np.asarray(own)[row] for name, own in zip(_MODEL, zip(*models, strict=True), strict=True)}
    columns |= {"seed": np.asarray(seeds)[seed], "metric": metric}
    columns |= _ABSENT | dict(labels)
    filled = []
    for axis, place, size in zip(axes, places, values.shape[2:], strict=True):
        check_name(f"axis of {metric}", axis, coordinates)
        column, names = coordinates[axis]
        check_name(f"column of the axis {axis} of {metric}", column, [name for name in _ABSENT if name not in filled])
        if names is not None and len(names) < size:
            raise ValueError(f"axis {axis} of {metric} has {size} places, and names for {len(names)} of them")
        filled.append(column)
        columns[column] = place if names is None else np.asarray(names)[place]
    columns["value"] = pl.Series(np.where(dead, np.nan, values)[kept]).fill_nan(None)
    height = len(row)
    complete = {
        name: columns[name] if isinstance(columns[name], np.ndarray | pl.Series) else [columns[name]] * height
        for name in ANALYSIS_SCHEMA
    }
    return pl.DataFrame(complete, schema=ANALYSIS_SCHEMA)
