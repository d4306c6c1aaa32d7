"""The analyze stage: every analysis of every model of a study, as tidy rows.

The stage is a list of pieces, each a compiled program over the lanes ``[h, s]``; a piece that is finished lies in
``results/analyze/`` and is not repeated. Snapshots are measured by the very program that measures the final models.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array

from jaxsafety.analysis import quantities
from jaxsafety.analysis.quantities import Coordinate, Quantities, Quantity
from jaxsafety.engine import hosts
from jaxsafety.recipe.schema import PRETRAINED
from jaxsafety.rundir import results
from jaxsafety.rundir.layout import ANALYSIS_FILE
from jaxsafety.study import evaluate, pipeline
from jaxsafety.study.evaluate import Models
from jaxsafety.study.pipeline import Study
from jaxsafety.study.probe import Subjects, coordinates, gather, program, run_each, run_once, to_frame, without_base
from jaxsafety.study.probes import attacked, gradients, variants, weights
from jaxsafety.study.probes.features import Prompts
from jaxsafety.types import Key, Params

# Histograms of the sensitivities: decades a bin.
_BIN = 0.2
# About an update, of which a pretrained model has none.
_OF_UPDATES = ("input_space", "output_space")

Piece = Callable[[Subjects], Iterator[pl.DataFrame]]


def pieces(run: Study) -> dict[str, Piece]:
    """Returns the pieces of the stage by name, in the order in which they run."""
    return {
        "models": _final_models,
        **{f"step_{step:08d}": partial(_snapshot, step=step) for step in run.recipe.tune.snapshot_steps},
        "alignment": _alignment,
        "prefill": _prefill,
        "soft_tokens": _soft_tokens,
        "interventions": _interventions,
    }


def write(run: Study) -> None:
    """Writes ``results/analyze.parquet``; finished pieces are kept and not repeated.

    Raises:
        ValueError: a stage before has not been finished.
        Stopped: a signal has asked to stop; the pieces before are saved.
    """
    folder = run.directory / "results"
    pipeline.check_tuned(run)
    found = pieces(run)
    todo = hosts.decide(lambda: [name for name in found if not _path(folder, name).exists()])
    if todo:
        subjects = gather(run)
        for name in todo:
            hosts.check(f"before the analysis {name}")
            _write(_path(folder, name), pl.concat(found[name](subjects)))
    hosts.decide(lambda: _collect(folder, tuple(found)))


def _write(path: Path, frame: pl.DataFrame) -> None:
    hosts.decide(lambda: results.write_results(path, frame, schema=results.ANALYSIS_SCHEMA))


def _collect(folder: Path, names: Sequence[str]) -> None:
    schema = results.ANALYSIS_SCHEMA
    everything = results.read_results([_path(folder, name) for name in names], schema=schema)
    results.write_results(folder / ANALYSIS_FILE, everything, schema=schema)


def _path(folder: Path, piece: str) -> Path:
    return folder / "analyze" / f"{piece}.parquet"


def _final_models(subjects: Subjects) -> Iterator[pl.DataFrame]:
    run = subjects.run
    yield from _measured(subjects, subjects.models, step=run.recipe.tune.steps, label="analyze models")


def _snapshot(subjects: Subjects, *, step: int) -> Iterator[pl.DataFrame]:
    models = evaluate.gather_snapshots(subjects.run, subjects.models, step=step)
    # The pretrained row keeps the program's shape, and has been written already.
    for frame in _measured(subjects, models, step=step, label=f"analyze step {step}"):
        yield frame.filter(pl.col("method") != PRETRAINED)
    points = variants.along_training(subjects.run.recipe)
    yield from _points(subjects, without_base(models), points, step=step, label=f"analyze step {step}, interventions")


def _measured(subjects: Subjects, models: Models, *, step: int, label: str) -> Iterator[pl.DataFrame]:
    run = subjects.run
    found = run_once(subjects, subjects.measure, models.params, label=label)
    shares, bins = _histogram(found.pop(Quantity("sensitivity", "prompt_norms", "condition prompt")))
    found[Quantity("sensitivity", "histogram", "condition bin")] = shares
    places = coordinates(subjects) | {
        "bin": Coordinate("strength", bins),
        "pair": Coordinate("part", tuple(map("~".join, gradients.pairs(run.recipe)))),
    }
    of_updates = {key: found.pop(key) for key in list(found) if key.analysis in _OF_UPDATES}
    yield to_frame(subjects, found, models, step=step, places=places)
    updates = {key: value[1:] for key, value in of_updates.items()}
    yield to_frame(subjects, updates, without_base(models), step=step, places=places)


def _histogram(norms: np.ndarray) -> tuple[np.ndarray, tuple[float, ...]]:
    """Shares ``[h, s, c, bin]`` of gradient norms in bins of their decimal logarithm, and the bins' centres."""
    logs = np.log10(np.where(norms > 0, norms, np.nan))
    alive = logs[np.isfinite(logs)]
    if not alive.size:
        return np.zeros((*norms.shape[:-1], 0)), ()
    low, high = int(np.floor(alive.min() / _BIN)), int(np.floor(alive.max() / _BIN)) + 1
    edges = np.arange(low, high + 1) * _BIN
    inside = (logs[..., None] >= edges[:-1]) & (logs[..., None] < edges[1:])
    counts = np.isfinite(norms).sum(-1)[..., None]
    shares = np.divide(inside.sum(-2), counts, out=np.full((*norms.shape[:-1], high - low), np.nan), where=counts > 0)
    return shares, tuple(np.round((edges[:-1] + edges[1:]) / 2, 6).tolist())


def _prefill(subjects: Subjects) -> Iterator[pl.DataFrame]:
    run, models = subjects.run, subjects.models

    def lane(params: Params, per_seed: tuple[Key, Prompts, Params], _: Array) -> Quantities:
        return attacked.prefill_quantities(run.recipe, run.world, params, per_seed[1])

    found = run_once(subjects, program(run, lane, rows=len(models.labels)), models.params, label="analyze prefill")
    yield to_frame(subjects, found, models, step=run.recipe.tune.steps)


def _soft_tokens(subjects: Subjects) -> Iterator[pl.DataFrame]:
    run, models = subjects.run, subjects.models
    analyze = run.recipe.analyze

    def lane(params: Params, per_seed: tuple[Key, Prompts, Params], _: Array, count: Array) -> Quantities:
        key, prompts, base = per_seed
        return attacked.soft_token_quantities(run.recipe, run.world, params, base, prompts, count=count, key=key)

    attack = program(run, lane, rows=len(models.labels))
    counts = [(np.int32(count),) for count in analyze.soft_tokens]
    runs = run_each(subjects, attack, models.params, counts, label="analyze soft tokens")
    for count, found in zip(analyze.soft_tokens, runs, strict=True):
        strengths = tuple(float(count * steps) for steps in analyze.soft_steps)
        if count == 0:
            # The prompt as it is, however many steps.
            found = {key: values[:, :, :1] for key, values in found.items()}
        places = coordinates(subjects) | {"steps": Coordinate("strength", strengths)}
        part = f"{count} token{'s' * (count != 1)}"
        yield to_frame(
            subjects, found, models, step=run.recipe.tune.steps, places=places, condition="unsafe", part=part
        )


def _interventions(subjects: Subjects) -> Iterator[pl.DataFrame]:
    """The grid of interventions, then every other method's update added to a tuned model."""
    run, tuned = subjects.run, without_base(subjects.models)
    points = variants.grid(run.recipe, layers=subjects.layers)
    yield from _points(subjects, tuned, points, step=run.recipe.tune.steps, label="analyze interventions")
    methods, rates = list(run.recipe.tune.methods), len(run.recipe.tune.learning_rates)
    for offset in range(1, len(methods)):
        # Same learning rate, same seed, another method.
        rolled = jax.tree.map(partial(jnp.roll, shift=-offset * rates, axis=0), tuned.params)
        finite = tuned.finite & np.roll(tuned.finite, -offset * rates, axis=0)
        points, label = variants.transfers(run.recipe), f"analyze transfers {offset}/{len(methods) - 1}"
        shared = _shared(subjects, points)
        runs = run_each(subjects, subjects.intervene, (tuned.params, rolled), shared, label=label)
        for point, found in zip(points, runs, strict=True):
            for row in range(len(tuned.labels)):
                one = {key: value[row : row + 1] for key, value in found.items()}
                model = Models(tuned.labels[row : row + 1], None, finite[row : row + 1])
                part = f"transfer:{methods[(row // rates + offset) % len(methods)]}"
                yield to_frame(subjects, one, model, step=run.recipe.tune.steps, part=part, strength=point.strength)


def _points(
    subjects: Subjects, tuned: Models, points: tuple[variants.Intervention, ...], *, step: int, label: str
) -> Iterator[pl.DataFrame]:
    """Interventions on a stack of tuned models."""
    pair = (tuned.params, tuned.params)
    runs = run_each(subjects, subjects.intervene, pair, _shared(subjects, points), label=label)
    for point, found in zip(points, runs, strict=True):
        yield to_frame(subjects, found, tuned, step=step, part=point.part, strength=point.strength)


def _shared(subjects: Subjects, points: tuple[variants.Intervention, ...]) -> list[tuple[Any, ...]]:
    parts = variants.parts(subjects.run.recipe, layers=subjects.layers)
    return [(np.int32(parts.index(point.part)), np.float32(point.strength)) for point in points]


def _alignment(subjects: Subjects) -> Iterator[pl.DataFrame]:
    run, tuned = subjects.run, without_base(subjects.models)
    methods, rates = list(run.recipe.tune.methods), len(run.recipe.tune.learning_rates)
    yield pl.DataFrame(schema=results.ANALYSIS_SCHEMA)
    rows = [
        (one * rates + rate, other * rates + rate, f"{methods[one]}~{methods[other]}")
        for one, other in ((methods.index(a), methods.index(b)) for a, b in gradients.pairs(run.recipe))
        for rate in range(rates)
    ]
    if not rows:
        return
    left, right, names = (list(column) for column in zip(*rows, strict=True))

    def lane(pair: tuple[Params, Params], per_seed: tuple[Key, Prompts, Params], _: Array) -> Quantities:
        return weights.alignment_quantities(run.recipe, *pair, per_seed[2])

    pair = tuple(jax.tree.map(lambda leaf, i=index: leaf[jnp.asarray(i)], tuned.params) for index in (left, right))
    found = run_once(subjects, program(run, lane, rows=len(rows)), pair, label="analyze alignment")
    finite = tuned.finite[left] & tuned.finite[right]
    for row, name in enumerate(names):
        model = Models((tuned.labels[left[row]],), None, finite[row : row + 1])
        one = {key: value[row : row + 1] for key, value in found.items()}
        matrices = tuple(f"{name}:{matrix}" for matrix in quantities.MATRICES)
        places = coordinates(subjects) | {"matrix": Coordinate("part", matrices)}
        yield to_frame(subjects, one, model, step=run.recipe.tune.steps, places=places, part=name)
