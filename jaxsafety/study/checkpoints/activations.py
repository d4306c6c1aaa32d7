"""What a model represents of labelled prompts, layer by layer, and how its update acts on them.

A layer that is measured lies as rows in its model's folder. Means are over all prompts of a label, each with its
interval over them.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from jaxsafety.claims.intervals import welch_half_width
from jaxsafety.config.fields import check, static
from jaxsafety.engine import programs
from jaxsafety.formats.prompts import LABELS
from jaxsafety.formats.rule_judge import Verdict
from jaxsafety.rundir import progress, signals
from jaxsafety.study.checkpoints import features, rows, stream
from jaxsafety.study.checkpoints.batches import bucketed
from jaxsafety.study.checkpoints.opened import Looked
from jaxsafety.types import Analysis

_KINDS = ("last", "response")
_SUFFIX = {"mlp.hook_in": "", "mlp.hook_post": "_post"}
# What each matrix is multiplied with.
_INPUTS = {"gate": "mlp.hook_in", "up": "mlp.hook_in", "down": "mlp.hook_post"}
_PER_PROMPT = ("tau", "relative_tau", "cosine_tau")
_PER_LAYER = ("effect_size", "distance")


@dataclass(frozen=True)
class Config:
    """What is measured of the activations.

    With answers (``evaluate.answers``), their mean activations are measured, too, and jailbreaks by whether they
    succeeded.

    Attributes:
        directions: of an update, the strongest, on which inputs are projected.
    """

    directions: int = static(16, at_least=1)
    __post_init__ = check


def measure(model: Looked, config: Config) -> None:
    """Measures every layer that is not measured yet and writes its rows.

    Raises:
        ValueError: a tensor is not finite, something does not fit into memory, or saved streams are damaged; what is
            finished is kept.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; what is finished is kept.
    """
    depth = model.own.config.layers
    files = [model.folder / f"{layer:03d}.parquet" for layer in range(depth)]
    state = model.folder / "streams"
    if not all(file.exists() for file in files):
        encoded, about = model.encoded, model.about
        batches = bucketed(encoded.ids, answers=model.answers, batch_tokens=about.batch_tokens)
        side, of_layer = stream.Side(model.own, tuple(batches), about.dtype), _measurer(model, config)
        with progress.track(depth, label=f"activations of {model.name}", unit="layer") as update:
            for layer, seen in stream.layers(side, state=state):
                rows.write(files[layer], pl.concat(of_layer(layer, seen, model.labels | {"layer": layer})))
                update(layer + 1, {})
                signals.check(f"after layer {layer} of {depth}")
    # A run that was stopped behind its last layer has left them.
    shutil.rmtree(state, ignore_errors=True)
    rows.write(model.folder / "verdicts.parquet", _verdict_rows(model))


@cache
def _program(function: Callable[..., Any], *shapes: tuple[tuple[int, ...], Any]) -> Callable[..., Any]:
    """A function compiled once for every shape, whichever model it is."""
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    with jax.default_matmul_precision("highest"):
        return programs.fitted(function, *given, what="measuring the prompts of a layer")


@cache
def _acting(directions: int) -> Callable[..., Any]:
    return partial(features.action_measures, directions=directions)


def _call(function: Callable[..., Any], *given: np.ndarray) -> dict[str, np.ndarray]:
    shapes = [(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in given]
    return jax.device_get(_program(function, *shapes)(*given))


def _measurer(
    model: Looked, config: Config
) -> Callable[[int, dict[str, np.ndarray], dict[str, Any]], Iterator[pl.DataFrame]]:
    """Returns what measures one layer: what it represents, and how the update acts on it where there is one."""
    encoded, base = model.encoded, model.base
    classes, second = np.stack([encoded.of(label) for label in LABELS]), encoded.folds == 1
    directions = min(config.directions, model.own.config.width, model.own.config.mlp_width)

    def of_layer(layer: int, seen: dict[str, np.ndarray], labels: dict[str, Any]) -> Iterator[pl.DataFrame]:
        for site, values in seen.items():
            for kind, activations in zip(_KINDS, values, strict=False):
                found = _call(features.cluster_measures, activations, classes, second)
                yield from _cluster_rows(found, model, labels | {"part": kind + _SUFFIX[site]})
        for name, site in _INPUTS.items() if base is not None else ():
            one, other = (side.matrix(layer, f"mlp/{name}") for side in (base, model.own))
            found = _call(_acting(directions), one, other, seen[site][0])
            yield from _action_rows(found, model, labels | {"part": name})
            chance = {("input_space", "energy_chance"): directions / len(one)}
            yield rows.frame(chance, labels=labels | {"part": name})

    return of_layer


def _cluster_rows(found: dict[str, np.ndarray], model: Looked, labels: dict[str, Any]) -> Iterator[pl.DataFrame]:
    yield rows.frame({("clusters", name): found[name] for name in _PER_LAYER}, labels=labels)
    yield _apart_rows(found, model, labels)
    for condition, subset, own in _groups(model):
        where = labels | {"condition": condition, "subset": subset}
        taus = {("clusters", name): found[name][own] for name in _PER_PROMPT}
        shares = {("clusters", "nearest_safe"): found["tau"][own] > 0}
        yield rows.means(taus | shares, labels=where)
        if condition in LABELS and subset == "all":
            place = LABELS.index(condition)
            spectra = {("clusters", name): found[name][place] for name in ("leading_share", "leading_energy")}
            yield rows.frame(spectra | {("clusters", "tau_std"): np.std(found["tau"][own])}, labels=where)


def _apart_rows(found: dict[str, np.ndarray], model: Looked, labels: dict[str, Any]) -> pl.DataFrame:
    """The measures of separation that are differences or sums of the two classes' means, with their intervals."""
    taus = [np.asarray(found["tau"][model.encoded.of(label)], float) for label in LABELS]
    gap = welch_half_width(*(own.tolist() for own in taus))
    # A tie counts half, as in the accuracy.
    right = welch_half_width(
        *(((1 + sign * np.sign(own)) / 2).tolist() for sign, own in zip((1, -1), taus, strict=True))
    )
    halves = {
        "gap": gap,
        "relative_gap": None if gap is None or not found["distance"] else gap / (2 * float(found["distance"])),
        "accuracy": None if right is None else right / 2,
    }
    values = {("clusters", name): (float(found[name]), half) for name, half in halves.items()}
    return rows.compared(values, sum(map(len, taus)), labels=labels)


def _action_rows(found: dict[str, np.ndarray], model: Looked, labels: dict[str, Any]) -> Iterator[pl.DataFrame]:
    for condition, subset, own in _groups(model):
        where = labels | {"condition": condition, "subset": subset}
        values = {("input_space", name): found[name][own] for name in ("gain", "ratio", "energy")}
        yield rows.means(values, labels=where)
        strongest = {("input_space", "projection"): found["projection"][own].mean(axis=0)} if own.any() else {}
        yield rows.frame(strongest, labels=where, strength=np.arange(found["projection"].shape[1], dtype=float))


def _groups(model: Looked) -> Iterator[tuple[str, str, np.ndarray]]:
    """The prompts of every label, and those of them that are successful attacks: condition, subset, ``[n]``."""
    for label in model.encoded.labels:
        own = model.encoded.of(label)
        yield label, "all", own
        if model.complied is not None and label != "safe":
            yield label, "successful", own & model.complied


def _verdict_rows(model: Looked) -> pl.DataFrame:
    frames = [rows.frame({}, labels=model.labels)]
    for label in model.encoded.labels if model.verdicts is not None else ():
        own, where = np.array(model.verdicts)[model.encoded.of(label)], model.labels | {"condition": label}
        rates = {("verdicts", verdict): own == verdict for verdict in get_args(Verdict)}
        frames.append(rows.shares(rates, labels=where))
        frames.append(rows.frame({("verdicts", "n_successful"): (own == "complied").sum()}, labels=where))
    return pl.concat(frames)


ANALYSIS = Analysis(Config, measure, about="files", reads=("prompts",))
