"""``analyze activations``: what two models represent of labelled prompts, layer by layer, and how the update acts.

A layer that is measured lies as rows in ``results/analyze/activations/``. Means are over all prompts of a label, each
with its interval over them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from jaxsafety.claims.intervals import welch_half_width
from jaxsafety.config.fields import check, static
from jaxsafety.engine import programs
from jaxsafety.formats import prompts
from jaxsafety.formats.hf_tokenizer import Tokenizer
from jaxsafety.formats.prompts import LABELS, Prompt
from jaxsafety.models.layers import ComputeDtype
from jaxsafety.rundir import atomic, progress, signals
from jaxsafety.study.pairs import answers, features, rows, stream
from jaxsafety.study.pairs.batches import Encoded, bucketed, encode
from jaxsafety.study.pairs.opened import BASE, TUNED, Pair

FOLDER = "activations"

_KINDS = ("last", "response")
_SUFFIX = {"mlp.hook_in": "", "mlp.hook_post": "_post"}
# What each matrix is multiplied with.
_INPUTS = {"gate": "mlp.hook_in", "up": "mlp.hook_in", "down": "mlp.hook_post"}
_PER_PROMPT = ("tau", "relative_tau", "cosine_tau")
_PER_LAYER = ("effect_size", "distance")


@dataclass(frozen=True)
class ActivationsConfig:
    """What is measured of the activations, and how.

    Attributes:
        template: ``chat``, the tuned model's template for both models, or ``raw``, prompts as they are.
        answers: tokens that each model writes after each prompt, greedily, at most; 0 for none. With answers, their
            mean activations are measured, too, and jailbreaks by whether they succeeded; the whole models are loaded.
        max_tokens: the longest prompt; of a longer one the first token and the end are kept.
        batch_tokens: places of a batch, padding included.
        dtype: what products are rounded to, and what the weights are held in.
        directions: of an update, the strongest, on which inputs are projected.
    """

    template: Literal["chat", "raw"] = "chat"
    answers: int = static(0, at_least=0)
    max_tokens: int = static(512, at_least=2)
    batch_tokens: int = static(4096, at_least=1)
    dtype: ComputeDtype = "float32"
    directions: int = static(16, at_least=1)
    __post_init__ = check


@dataclass(frozen=True)
class _Subjects:
    """What is measured: the prompts, what the models answered (None without answers), and how the layers are read."""

    encoded: Encoded
    complied: dict[str, np.ndarray] | None
    sides: tuple[stream.Side, stream.Side]


def write(
    pair: Pair, directory: Path, config: ActivationsConfig, given: Sequence[Prompt], tokenizer: Tokenizer
) -> Encoded:
    """Measures every layer that is not measured yet, writes its rows and returns the prompts as they were read.

    ``directory`` is held by :func:`jaxsafety.study.pairs.opened.enter`, ``config`` recorded there, and the tokenizer
    the tuned model's.

    Raises:
        ValueError: too few prompts, a tokenizer of another vocabulary, a tensor that is not finite, or something that
            does not fit into memory; what is finished is kept.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; what is finished is kept.
    """
    longest = min(config.max_tokens, pair.base.config.max_tokens, pair.tuned.config.max_tokens)
    encoded = encode(given, tokenizer, max_tokens=longest, vocab_size=pair.config.vocab_size)
    if encoded.truncated:
        progress.say(
            f"{encoded.truncated} of {len(given)} prompts have more than {longest} tokens: "
            "their first token and their end are kept"
        )
    subjects = _subjects(pair, directory, config, encoded, tokenizer)
    folder, depth = rows.piece(directory, FOLDER, "x").parent, pair.config.layers
    files = [rows.piece(directory, FOLDER, f"{layer:03d}") for layer in range(depth)]
    if not all(file.exists() for file in files):
        measure, shared = _measurer(pair, config, subjects), rows.labels(directory)
        with progress.track(depth, label="analyze activations") as update:
            for layer, seen in stream.layers(subjects.sides, state=folder / "streams.npz"):
                rows.write(files[layer], pl.concat(measure(layer, seen, shared | {"layer": layer})))
                update(layer + 1, {})
                signals.check(f"after layer {layer} of {depth}")
    rows.write(rows.piece(directory, FOLDER, "verdicts"), _verdict_rows(subjects, rows.labels(directory)))
    rows.collect(directory)
    return encoded


def _subjects(
    pair: Pair, directory: Path, config: ActivationsConfig, encoded: Encoded, tokenizer: Tokenizer
) -> _Subjects:
    asked = bucketed(encoded.ids, batch_tokens=config.batch_tokens)
    if not config.answers:
        sides = (stream.Side(side, tuple(asked), config.dtype) for side in (pair.base, pair.tuned))
        return _Subjects(encoded, None, tuple(sides))
    sides, complied, texts = [], {}, {}
    for name, side in ((BASE, pair.base), (TUNED, pair.tuned)):
        written = answers.write(
            side, asked, directory / "results" / f"answers-{name}.json", max_new=config.answers, stop=tokenizer.stop,
            compute_dtype=config.dtype, label=f"answers of {side.directory.name}",
        )  # fmt: skip
        texts[name] = [tokenizer.text(ids) for ids in written]
        complied[name] = np.array([not prompts.is_refusal(text) for text in texts[name]])
        batches = bucketed(encoded.ids, answers=written, batch_tokens=config.batch_tokens)
        sides.append(stream.Side(side, tuple(batches), config.dtype))
    atomic.atomic_write(directory / "results" / "answers.jsonl", prompts.answers_to_jsonl(encoded.prompts, texts))
    return _Subjects(encoded, complied, tuple(sides))


def _measurer(
    pair: Pair, config: ActivationsConfig, subjects: _Subjects
) -> Callable[[int, stream.Seen, dict[str, Any]], Iterator[pl.DataFrame]]:
    """Returns what measures one layer; compiled once for every shape."""

    @cache
    def program(function: Callable[..., Any], *shapes: tuple[tuple[int, ...], Any]) -> Callable[..., Any]:
        given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        with jax.default_matmul_precision("highest"):
            return programs.fitted(function, *given, what="measuring the prompts of a layer")

    def call(function: Callable[..., Any], *given: np.ndarray) -> dict[str, np.ndarray]:
        shapes = [(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in given]
        return jax.device_get(program(function, *shapes)(*given))

    encoded = subjects.encoded
    classes, second = np.stack([encoded.of(label) for label in LABELS]), encoded.folds == 1
    directions = min(config.directions, pair.config.width, pair.config.mlp_width)
    act = partial(features.action_measures, directions=directions)

    def measure(layer: int, seen: stream.Seen, labels: dict[str, Any]) -> Iterator[pl.DataFrame]:
        for method, own in zip((BASE, TUNED), seen, strict=True):
            for site, values in own.items():
                for kind, activations in zip(_KINDS, values, strict=False):
                    found = call(features.cluster_measures, activations, classes, second)
                    yield from _cluster_rows(method, found, subjects, labels | {"part": kind + _SUFFIX[site]})
        for name, site in _INPUTS.items():
            one, other = (side.matrix(layer, f"mlp/{name}") for side in (pair.base, pair.tuned))
            found = call(act, one, other, seen[1][site][0])
            yield from _action_rows(found, subjects, labels | {"part": name})
            chance = {("input_space", "energy_chance"): directions / len(one)}
            yield rows.frame(TUNED, chance, labels=labels | {"part": name})

    return measure


def _cluster_rows(
    method: str, found: dict[str, np.ndarray], subjects: _Subjects, labels: dict[str, Any]
) -> Iterator[pl.DataFrame]:
    yield rows.frame(method, {("clusters", name): found[name] for name in _PER_LAYER}, labels=labels)
    yield _apart_rows(method, found, subjects, labels)
    for condition, subset, own in _groups(method, subjects):
        where = labels | {"condition": condition, "subset": subset}
        taus = {("clusters", name): found[name][own] for name in _PER_PROMPT}
        shares = {("clusters", "nearest_safe"): found["tau"][own] > 0}
        yield rows.means(method, taus | shares, labels=where)
        if condition in LABELS and subset == "all":
            place = LABELS.index(condition)
            spectra = {("clusters", name): found[name][place] for name in ("leading_share", "leading_energy")}
            yield rows.frame(method, spectra | {("clusters", "tau_std"): np.std(found["tau"][own])}, labels=where)


def _apart_rows(method: str, found: dict[str, np.ndarray], subjects: _Subjects, labels: dict[str, Any]) -> pl.DataFrame:
    """The measures of separation that are differences or sums of the two classes' means, with their intervals."""
    taus = [np.asarray(found["tau"][subjects.encoded.of(label)], float) for label in LABELS]
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
    return rows.compared(method, values, sum(map(len, taus)), labels=labels)


def _action_rows(found: dict[str, np.ndarray], subjects: _Subjects, labels: dict[str, Any]) -> Iterator[pl.DataFrame]:
    for condition, subset, own in _groups(TUNED, subjects):
        where = labels | {"condition": condition, "subset": subset}
        values = {("input_space", name): found[name][own] for name in ("gain", "ratio", "energy")}
        yield rows.means(TUNED, values, labels=where)
        strongest = {("input_space", "projection"): found["projection"][own].mean(axis=0)} if own.any() else {}
        yield rows.frame(TUNED, strongest, labels=where, strength=np.arange(found["projection"].shape[1], dtype=float))


def _groups(method: str, subjects: _Subjects) -> Iterator[tuple[str, str, np.ndarray]]:
    """The prompts of every label, and those of them that are successful attacks: condition, subset, ``[n]``."""
    for label in subjects.encoded.labels:
        own = subjects.encoded.of(label)
        yield label, "all", own
        if subjects.complied is not None and label != "safe":
            yield label, "successful", own & subjects.complied[method]


def _verdict_rows(subjects: _Subjects, labels: dict[str, Any]) -> pl.DataFrame:
    frames = [rows.frame(BASE, {}, labels=labels)]
    for method, complied in (subjects.complied or {}).items():
        for label in subjects.encoded.labels:
            own, where = complied[subjects.encoded.of(label)], labels | {"condition": label}
            rates = {("verdicts", "complied"): own, ("verdicts", "refused"): ~own}
            frames.append(rows.means(method, rates, labels=where))
            frames.append(rows.frame(method, {("verdicts", "n_successful"): own.sum()}, labels=where))
    return pl.concat(frames)
