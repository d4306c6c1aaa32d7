"""A run's rows, indexed for the claims: one look-up gives a quantity as an array of layers by seeds.

Only the finished models are kept: of every analysis and model, the rows of the last tuning step. NaN stands for a seed
without a value: its lane diverged (a row of None), or the quantity is undefined there (None, or no row). What no seed
has is :class:`Unmeasured`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

PRETRAINED = "pretrained"
# The accuracy table of ``evaluate.parquet``, whose prompts are not those of the analyses, enters as one more analysis.
TABLE = "evaluate"

_METHODS = {"sft": "SFT", "dpo": "DPO", "unlearn": "unlearning"}
# Multiples of an update such as 1.1 reach the rows through float32.
_STRENGTH_DIGITS = 5
# Columns of a row that are fields of a key, behind the first four.
_NAMES = ("condition", "subset", "part", "strength")


class Unmeasured(Exception):
    """A statistic cannot be had from this evidence; the message says why, in a few words."""


class Model(NamedTuple):
    """A lane of a study: its model's name, what tells it from the others of that model, its learning rate."""

    method: str
    lr_name: str
    lr: float


class Key(NamedTuple):
    """What is measured, of which model, at all layers and seeds."""

    analysis: str
    metric: str
    method: str
    lr_name: str
    condition: str = ""
    subset: str = "all"
    part: str = ""
    strength: float | None = None


@dataclass(frozen=True)
class Evidence:
    """The finished models of one run and everything measured of them.

    Attributes:
        seeds: ascending; the axis s of every look-up.
        models: every tuned model that claims are about, by method and then from the highest learning rate down.
        others: the other ones, such as attacks on these and edited ones, in the same order.
        series: ``[s]`` values by key and layer, None being the layer of what has none.
        layers: every layer that a quantity (analysis, metric) has in any model, ascending.
    """

    seeds: tuple[int, ...]
    models: tuple[Model, ...]
    series: Mapping[Key, Mapping[int | None, np.ndarray]]
    layers: Mapping[tuple[str, str], tuple[int | None, ...]]
    others: tuple[Model, ...] = ()

    @property
    def pretrained(self) -> Model:
        """The untuned model."""
        return Model(PRETRAINED, "", 0.0)

    @property
    def strong(self) -> tuple[Model, ...]:
        """The model of every method at its highest learning rate, the paper's eta_M."""
        highest: dict[str, Model] = {}
        for model in self.models:
            highest.setdefault(model.method, model)
        return tuple(highest.values())

    @property
    def weak(self) -> tuple[Model, ...]:
        """The model of every method at its lowest learning rate, the paper's eta_S, where it has several."""
        lowest = {model.method: model for model in self.models}
        return tuple(model for model in lowest.values() if model not in self.strong)

    def strongest(self, method: str) -> Model:
        """Returns a method's model at the highest learning rate. Raises Unmeasured: the run has no such method."""
        for model in self.strong:
            if model.method == method:
                return model
        raise Unmeasured(f"no {_METHODS.get(method, method)} in this run")

    def find(
        self, analysis: str, metric: str, *, model: Model, condition: str = "", subset: str = "all", part: str = "",
        strength: float | None = None,
    ) -> Float[np.ndarray, "l s"]:  # fmt: skip
        """Returns a quantity by layer and seed, ``l = 1`` where it has no layers.

        All models have all layers, so that they can be compared; of a subset that no seed has a prompt in, all is NaN.

        Raises:
            Unmeasured: there is no row of it, nor (of a subset) of all prompts.
        """
        key = _normal(Key(analysis, metric, model.method, model.lr_name, condition, subset, part, strength))
        if key not in self.series and key._replace(subset="all") not in self.series:
            raise Unmeasured(self._missing(key, model))
        return self._stacked(key)

    def parts(self, analysis: str, *, model: Model) -> tuple[str, ...]:
        """Returns the parts that an analysis of a model has rows of."""
        keys = (key for key in self.series if key[0] == analysis and (key.method, key.lr_name) == model[:2])
        return tuple(dict.fromkeys(key.part for key in keys))

    def by_strength(
        self, analysis: str, metric: str, *, model: Model, condition: str = "", part: str | None = None
    ) -> dict[float, Float[np.ndarray, "l s"]]:
        """Returns a quantity by strength, ascending; of one part, or (None) the mean over parts of equal strength.

        Raises:
            Unmeasured: there is no row of it.
        """
        wanted = Key(analysis, metric, model.method, model.lr_name, condition, part=part or "")
        found: dict[float, list[np.ndarray]] = {}
        for key in self._of_models.get((analysis, metric, model.method, model.lr_name), ()):
            shared = key._replace(strength=None, part="" if part is None else key.part)
            if key.strength is not None and shared == wanted:
                found.setdefault(key.strength, []).append(self._stacked(key))
        if not found:
            raise Unmeasured(self._missing(wanted, model))
        return {strength: np.mean(found[strength], axis=0) for strength in sorted(found)}

    @cached_property
    def _of_models(self) -> dict[tuple[str, str, str, str], list[Key]]:
        """The keys by their first four parts: some runs have tens of thousands."""
        found: dict[tuple[str, str, str, str], list[Key]] = {}
        for key in self.series:
            found.setdefault(key[:4], []).append(key)
        return found

    def _stacked(self, key: Key) -> np.ndarray:
        found, absent = self.series.get(key, {}), np.full(len(self.seeds), np.nan)
        return np.stack([found.get(layer, absent) for layer in self.layers[key.analysis, key.metric]])

    def _missing(self, key: Key, model: Model) -> str:
        if not any(key.analysis == other.analysis for other in self.series):
            return "no accuracy table in this run" if key.analysis == TABLE else f"no {key.analysis} in this run"
        subset = "" if key.subset == "all" else key.subset
        strength = "" if key.strength is None else f"at {key.strength:g}"
        where = " ".join(word for word in (subset, key.condition, key.part, strength) if word)
        return f"no {key.metric} in {key.analysis} of {label(model)}" + (f" ({where})" if where else "")


def gather(rows: Iterable[Mapping[str, Any]], *, others: Collection[str] = ()) -> Evidence:
    """Indexes rows of analyses, keeping of every analysis and model the last step that a seed has.

    Models of the names ``others`` are none that claims are about. A value of None is not finite. Rows of the accuracy
    table have the analysis ``TABLE``.

    Raises:
        ValueError: two values for one seed of one quantity (rows of several runs).
    """
    newest: dict[tuple[str, str, str, int], int] = {}
    models: set[Model] = set()
    seeds: set[int] = set()
    found: dict[Key, dict[int | None, dict[int, tuple[int, float]]]] = {}
    keys: dict[tuple[Any, ...], Key] = {}
    for row in rows:
        analysis, method, lr_name = row["analysis"], row["method"], row["lr_name"]
        seed, step = row["seed"], row["step"]
        lane = (analysis, method, lr_name, seed)
        newest[lane] = max(step, newest.get(lane, step))
        seeds.add(seed)
        if method != PRETRAINED:
            models.add(Model(method, lr_name, row["lr"]))
        written = (analysis, row["metric"], method, lr_name, *(row[name] for name in _NAMES))
        # Rows of one quantity differ in layer and seed alone.
        if (key := keys.get(written)) is None:
            key = keys[written] = _normal(Key(*written))
        values = found.setdefault(key, {}).setdefault(row["layer"], {})
        if seed in values and values[seed][0] == step:
            raise ValueError(
                f"two values of {analysis}/{row['metric']} for {method} {lr_name} seed {seed} at step {step}: "
                "expected one; give the rows of one run"
            )
        if seed not in values or values[seed][0] < step:
            values[seed] = (step, np.nan if row["value"] is None else float(row["value"]))
    ordered = tuple(sorted(seeds))
    last = {key: _finished(key, layers, newest, ordered) for key, layers in found.items()}
    series = {key: layers for key, layers in last.items() if layers}
    every = sorted(models, key=_order)
    own, rest = (tuple(one for one in every if (one.method in others) == is_one) for is_one in (False, True))
    return Evidence(ordered, own, series, _layers(series), rest)


def label(model: Model) -> str:
    """Name of a model for people, such as ``DPO eta_M``."""
    return f"{_METHODS.get(model.method, model.method)} {model.lr_name}".rstrip()


def _finished(
    key: Key, layers: Mapping[int | None, Mapping[int, tuple[int, float]]],
    newest: Mapping[tuple[str, str, str, int], int], seeds: tuple[int, ...],
) -> dict[int | None, np.ndarray]:  # fmt: skip
    """One key's ``[s]`` values by layer, of the lanes' last steps; layers that only earlier steps have are left out."""
    lane, kept = (key.analysis, key.method, key.lr_name), {}
    for layer, values in layers.items():
        current = {seed: value for seed, (step, value) in values.items() if step == newest[*lane, seed]}
        if current:
            kept[layer] = np.array([current.get(seed, np.nan) for seed in seeds])
    return kept


def _layers(series: Mapping[Key, Mapping[int | None, np.ndarray]]) -> dict[tuple[str, str], tuple[int | None, ...]]:
    found: dict[tuple[str, str], set[int | None]] = {}
    for key, layers in series.items():
        found.setdefault((key.analysis, key.metric), set()).update(layers)
    return {name: tuple(sorted(some, key=lambda layer: -1 if layer is None else layer)) for name, some in found.items()}


def _normal(key: Key) -> Key:
    """The key that equal quantities share, however their strength was written."""
    strength = key.strength
    if key.analysis == "interventions" and strength is None:
        strength = 1.0  # a part of the update taken as it is
    return key._replace(strength=None if strength is None else round(strength, _STRENGTH_DIGITS))


def _order(model: Model) -> tuple[int, str, float, str]:
    names = list(_METHODS)
    return names.index(model.method) if model.method in names else len(names), model.method, -model.lr, model.lr_name
