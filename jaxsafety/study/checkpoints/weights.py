"""Every update of a matrix beside the matrix that it is an update of, one pair at a time.

A pair that is measured lies as rows in its model's folder and is not measured again. Memory is that of one pair and its
decompositions, however large the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array, Float

from jaxsafety.config.fields import check, static
from jaxsafety.engine import programs
from jaxsafety.linalg import subspace, update_spaces
from jaxsafety.linalg.update_spaces import DeltaMethod, NullSpace, Spaces
from jaxsafety.rundir import progress, signals
from jaxsafety.study.checkpoints import rows
from jaxsafety.study.checkpoints.opened import Looked
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
    """

    attention: bool = False
    energy: float = static(0.9, above=0, at_most=1)
    method: DeltaMethod = "gram"
    rank: int = static(256, at_least=1)
    __post_init__ = check

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
    places = [(layer, name) for layer in range(model.own.config.layers) for name in config.matrices]
    files = {place: model.folder / f"{place[0]:03d}-{place[1].replace('/', '-')}.parquet" for place in places}
    todo = [place for place in places if not files[place].exists()]
    measure_ = measurer(config)
    there = len(places) - len(todo)
    with progress.track(len(places), label=f"weights of {model.name}", start=there, unit="tensor") as update:
        for done, (layer, name) in enumerate(todo, start=there + 1):
            found = measure_(model.base.matrix(layer, name), model.own.matrix(layer, name))
            frame = pl.concat(_frames(found, labels=model.labels, layer=layer, part=name.partition("/")[2]))
            rows.write(files[layer, name], frame)
            update(done, {"layer": float(layer), "error": float(found["spaces"].output.errors[0])})
            signals.check(f"after {name} of layer {layer}")


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


def _frames(found: dict[str, Any], *, labels: dict[str, Any], layer: int, part: str) -> Iterator[pl.DataFrame]:
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
