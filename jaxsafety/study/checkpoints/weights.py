"""Every update of a matrix beside the matrix that it is an update of, one pair at a time.

A pair that is measured lies as rows in its model's folder and is not measured again. Memory is that of one pair and its
decompositions, however large the model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array, Float

from jaxsafety.config.fields import check, static
from jaxsafety.engine import programs
from jaxsafety.formats import hf
from jaxsafety.linalg import subspace, update_spaces
from jaxsafety.linalg.update_spaces import DeltaMethod, NullSpace, Spaces
from jaxsafety.rundir import progress, signals
from jaxsafety.study.checkpoints import pairs, rows
from jaxsafety.study.checkpoints.opened import Looked, Model
from jaxsafety.types import Analysis

MATRICES = {"mlp": ("mlp/gate", "mlp/up", "mlp/down"), "attention": ("attn/q", "attn/k", "attn/v", "attn/o")}
# Leading directions whose norms are written, evenly spaced from the strongest to the weakest.
_DIRECTIONS = 64
# What a decomposition that refuses an update, or its base, is followed by.
_THEN: dict[str, DeltaMethod] = {"randomized": "gram", "gram": "full"}


@dataclass(frozen=True)
class Config:
    """What is measured of the weights, and how.

    Attributes:
        attention: whether the attention's matrices are measured, too.
        energy: share of the squared spectrum that leading directions hold, in (0, 1].
        method: of the decompositions: ``gram``, ``full`` or ``randomized``, see
            :func:`jaxsafety.linalg.update_spaces.both_spaces`. A matrix that it does not resolve is measured again,
            with ``gram`` after ``randomized`` and with ``full`` after ``gram``.
        rank: triplets that ``randomized`` computes, at least 1; no more than a matrix has.
        include: a regular expression; with it matrices go by the names in the files, and those are measured in whose
            names it is found, whatever the model is.
        exclude: another, of those that are not.
    """

    attention: bool = False
    energy: float = static(0.9, above=0, at_most=1)
    method: DeltaMethod = "gram"
    rank: int = static(256, at_least=1)
    include: str = ""
    exclude: str = ""

    def __post_init__(self) -> None:
        check(self)
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected a regular expression ({error})"
                ) from error

    @property
    def is_by_name(self) -> bool:
        """Whether matrices are chosen by the names in the files."""
        return bool(self.include or self.exclude)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Paths of the matrices below ``blocks``."""
        return MATRICES["mlp"] + MATRICES["attention"] * self.attention


def measure(model: Looked, config: Config) -> None:
    """Measures every matrix that is not measured yet and writes its rows; a model that begins with none has no update.

    Raises:
        ValueError: a matrix is not finite, or does not fit into memory; those before it are kept.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; the matrices before are kept.
    """
    if model.base is None:
        return
    pieces = list(_pieces(model, config))
    todo = [piece for piece in pieces if not piece.file.exists()]
    # What is measured is no part of how: all that go the same way share their programs.
    measure_ = measurer(replace(config, attention=False, include="", exclude=""))
    there = len(pieces) - len(todo)
    with progress.track(len(pieces), label=f"weights of {model.name}", start=there, unit="tensor") as update:
        for done, piece in enumerate(todo, start=there + 1):
            found = measure_(*piece.read())
            rows.write(piece.file, pl.concat(_frames(found, labels=model.labels, layer=piece.layer, part=piece.part)))
            place = {} if piece.layer is None else {"layer": float(piece.layer)}
            update(done, place | {"error": float(found["spaces"].output.errors[0])})
            signals.check(f"after {piece.name}")


class _Piece(NamedTuple):
    """One pair of matrices: where it is, how it is read, and the file of its rows."""

    name: str
    layer: int | None
    part: str
    file: Path
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


def _pieces(model: Looked, config: Config) -> Iterator[_Piece]:
    base, own = model.base, model.own
    if _is_by_name(base, own, config):
        yield from _by_name(model, config)
        return
    for layer, name in itertools.product(range(own.config.layers), config.matrices):
        file = model.folder / f"{layer:03d}-{name.replace('/', '-')}.parquet"
        read = partial(lambda *place: (base.matrix(*place), own.matrix(*place)), layer, name)
        yield _Piece(f"{name} of layer {layer}", layer, name.partition("/")[2], file, read)


def _is_by_name(base: Model, own: Model, config: Config) -> bool:
    return config.is_by_name or not (isinstance(base, hf.Checkpoint) and isinstance(own, hf.Checkpoint))


def _pairs(base: Model, own: Model, config: Config) -> list[pairs.Pair]:
    sides = [hf.open_tensors(one.directory) for one in (base, own)]
    return pairs.find(*sides, include=config.include, exclude=config.exclude)


def _by_name(model: Looked, config: Config) -> Iterator[_Piece]:
    sides = [hf.open_tensors(one.directory) for one in (model.base, model.own)]
    found = _pairs(model.base, model.own, config)
    if all(pair.left_out for pair in found):
        such = f", such as {found[0].name}" if found else ""
        raise ValueError(f"weights of {model.name}: {pairs.told(found)}: expected other names or patterns{such}")
    progress.say(f"weights of {model.name}: {pairs.told(found)}")
    for pair in found:
        if not pair.left_out:
            read = partial(lambda pair: tuple(side.matrix(pair.name, rows=pair.rows) for side in sides), pair)
            yield _Piece(pair.name, pair.layer, pair.part, model.folder / f"{quote(pair.name, '')}.parquet", read)


def planned(base: Model, own: Model, config: Config) -> list[dict[str, Any]]:
    """Returns a record of every tensor of two checkpoints: its name, place and shapes, and whether it is measured."""
    if _is_by_name(base, own, config):
        found = _pairs(base, own, config)
    else:
        found = [
            pairs.Pair(
                tensor.name, layer, path.rpartition("/")[2], (base.tensors[path, layer].shape, tensor.shape),
                left_out="" if path.removeprefix("blocks/") in config.matrices else "no matrix that is asked for",
            )
            for (path, layer), tensor in own.tensors.items()
        ]  # fmt: skip
    return [
        {
            "name": pair.name, "layer": pair.layer, "part": pair.part,
            **{side: None if shape is None else " x ".join(map(str, shape))
               for side, shape in zip(("base", "tuned"), pair.shapes, strict=True)},
            "measured": not pair.left_out,
            "note": pair.left_out or (f"the first {pair.rows} rows" if pair.is_common else ""),
        }
        for pair in found
    ]  # fmt: skip


@cache
def measurer(config: Config) -> Callable[[np.ndarray, np.ndarray], dict[str, Any]]:
    """Returns what measures pairs of matrices, compiled once for every shape and method that comes.

    It takes two arrays ``[m, n]``, before and after, and returns what :func:`measure_matrix` does, as host arrays, of
    the first method that resolves both.
    """

    @cache
    def program(shape: tuple[int, int], method: DeltaMethod) -> Callable[..., Any]:
        given = jax.ShapeDtypeStruct(shape, jnp.float32)
        run = partial(measure_matrix, energy=config.energy, method=method, rank=min(config.rank, *shape))
        return programs.fitted(run, given, given, what=f"the analysis of a matrix of {shape[0]} x {shape[1]}")

    def measure(base: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
        method = config.method
        while True:
            found = jax.device_get(program(base.shape, method)(base, tuned))
            ranks = found["spaces"].output.rank_base, found["spaces"].output.rank_delta
            if method not in _THEN or min(ranks) >= 0:
                return found
            method = _THEN[method]

    return measure


def measure_matrix(
    base: Float[Array, "m n"], tuned: Float[Array, "m n"], *, energy: float, method: DeltaMethod, rank: int
) -> dict[str, Any]:
    """Measures one update: where it lies, how large and of what rank it is.

    For ``energy``, ``method`` and ``rank`` see :class:`Config`.

    Returns:
        ``spaces``, ``changed_norm`` ``|dW|_F / |W|_F``, ``stable_rank`` and ``effective_rank`` of the update; the last
        one is NaN where values were refused or not computed.
    """
    with jax.default_matmul_precision("highest"):
        before, delta = base[None], (tuned - base)[None]
        # One subspace for all: what is drawn must not depend on where a run was resumed.
        key = jax.random.key(0) if method == "randomized" else None
        spaces = update_spaces.both_spaces(before, delta, energy=energy, method=method, rank=rank, key=key)
        values = spaces.delta_values
        whole = values.shape[-1] == min(base.shape)
        return {
            "spaces": spaces,
            "changed_norm": update_spaces.changed_norm(before, delta),
            "stable_rank": (jnp.linalg.norm(delta, axis=(1, 2)) / values[:, 0]) ** 2,
            "effective_rank": subspace.effective_rank(values) if whole else jnp.full(1, jnp.nan),
        }


def _frames(found: dict[str, Any], *, labels: dict[str, Any], layer: int | None, part: str) -> Iterator[pl.DataFrame]:
    spaces: Spaces = found["spaces"]
    own = {name: found[name][0] for name in ("changed_norm", "stable_rank", "effective_rank")}
    sides = {"output_space": _side(spaces.output) | own, "input_alignment": _side(spaces.input)}
    spectra = {"value_base": spaces.base_values[0], "value_delta": spaces.delta_values[0]}
    where = labels | {"layer": layer, "part": part}
    yield rows.frame({(name, metric): value for name, side in sides.items() for metric, value in side.items()},
                     labels=where)  # fmt: skip
    for metric, values in spectra.items():
        index = np.arange(len(values), dtype=float)
        yield rows.frame({("spectrum", metric): values}, labels=where, strength=index)
    for name, side in (("output_space", spaces.output), ("input_alignment", spaces.input)):
        count = max(int(side.rank_delta[0]), 1)
        chosen = np.unique(np.linspace(0, count - 1, min(_DIRECTIONS, count)).round().astype(int))
        norms = side.null_norm[0][chosen]
        yield rows.frame({(name, "null_norm"): norms}, labels=where, strength=chosen.astype(float))


def _side(side: NullSpace) -> dict[str, Any]:
    norms = side.null_norm[0]
    mean = norms[np.isfinite(norms)].mean() if np.isfinite(norms).any() else np.nan
    return {
        "null_norm_mean": mean,
        "null_energy": side.null_energy[0],
        "total_null_energy": side.total_null_energy[0],
        "baseline_norm": side.baseline_norm[0],
        "baseline_energy": side.baseline_energy[0],
        "excess": mean - side.baseline_norm[0],
        "excess_energy": side.null_energy[0] - side.baseline_energy[0],
        "rank_base": side.rank_base[0],
        "rank_delta": side.rank_delta[0],
        "error": side.errors[0],
    }


ANALYSIS = Analysis(Config, measure, about="files")
