"""The analyze stage: every analysis, attack and edit of a recipe on every model of a study, as tidy rows.

The stage is a list of pieces, each of compiled programs over the lanes ``[h, s]``; a piece that is finished lies in
``results/analyze/`` and is not repeated. Snapshots are measured by the very program that measures the final models.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array

from jaxsafety.engine import hosts, programs
from jaxsafety.recipe.schema import PRETRAINED
from jaxsafety.rundir import results
from jaxsafety.rundir.layout import ANALYSIS_FILE
from jaxsafety.study import evaluate, judged, pipeline, probe
from jaxsafety.study.evaluate import Models
from jaxsafety.study.pipeline import Study
from jaxsafety.study.probe import PerSeed, Subjects, run_each, to_frame, without_base
from jaxsafety.study.view import model_of
from jaxsafety.types import Coordinate, Params, Point, View

# What result rows call the edited models.
EDITED = "interventions"

Piece = Callable[[Subjects], Iterator[pl.DataFrame]]


def pieces(run: Study) -> dict[str, Piece]:
    """Returns the pieces of the stage by name, in the order in which they run."""
    pairs = [label for label, node in run.recipe.analyses.items() if node.load().about == "pair"]
    return {
        "models": partial(_measured, step=run.recipe.tune.steps, label="analyze models"),
        **{f"step_{step:08d}": partial(_snapshot, step=step) for step in run.recipe.tune.snapshot_steps},
        **{f"pairs_{label}": partial(_pairs, label=label) for label in pairs},
        **{f"attack_{label}": partial(_attack, label=label) for label in run.recipe.attacks},
        "edits": _edits,
    }


def write(run: Study) -> None:
    """Writes ``results/analyze.parquet``; finished pieces are kept and not repeated.

    Raises:
        ValueError: a stage before has not been finished.
        Stopped: a signal has asked to stop; the pieces before are saved.
    """
    folder, schema = run.directory / "results", results.ANALYSIS_SCHEMA
    pipeline.check_tuned(run)
    found = pieces(run)
    todo = hosts.decide(lambda: [name for name in found if not _path(folder, name).exists()])
    if todo:
        subjects = probe.gather(run)
        for name in todo:
            hosts.check(f"before the analysis {name}")
            frame = pl.concat([pl.DataFrame(schema=schema), *found[name](subjects)])
            hosts.decide(partial(results.write_results, _path(folder, name), frame, schema=schema))

    def collect() -> None:
        everything = results.read_results([_path(folder, name) for name in found], schema=schema)
        results.write_results(folder / ANALYSIS_FILE, everything, schema=schema)

    hosts.decide(collect)


def _path(folder: Path, piece: str) -> Path:
    return folder / "analyze" / f"{piece}.parquet"


def _snapshot(subjects: Subjects, *, step: int) -> Iterator[pl.DataFrame]:
    models = evaluate.gather_snapshots(subjects.run, subjects.models, step=step)
    # The pretrained row keeps the program's shape, and has been written already.
    for frame in _measured(subjects, step=step, label=f"analyze step {step}", models=models):
        yield frame.filter(pl.col("method") != PRETRAINED)
    for label, node in subjects.run.recipe.edits.items():
        if node.along:
            yield from _edit(subjects, without_base(models), label, step=step, strongest=True)


def _measured(subjects: Subjects, *, step: int, label: str, models: Models | None = None) -> Iterator[pl.DataFrame]:
    models = models or subjects.models
    (by_label,) = run_each(subjects, subjects.measure, models.params, [()], label=label)
    for name, node in subjects.run.recipe.analyses.items():
        if not (found := by_label.get(name)):
            continue
        rows = models
        if node.load().about == "update":
            # A pretrained model has none.
            rows, found = without_base(models), {key: values[1:] for key, values in found.items()}
        found, places = probe.finished(node, found)
        yield to_frame(subjects, name, found, rows, step=step, places=places)


def _pairs(subjects: Subjects, *, label: str) -> Iterator[pl.DataFrame]:
    """An analysis of every two methods at every learning rate."""
    run, tuned, node = subjects.run, without_base(subjects.models), subjects.run.recipe.analyses[label]
    methods, rates = list(run.recipe.tune.methods), len(run.recipe.tune.learning_rates)
    rows = [
        (one * rates + rate, other * rates + rate, f"{methods[one]}~{methods[other]}")
        for one, other in combinations(range(len(methods)), 2)
        for rate in range(rates)
    ]
    if not rows:
        return
    left, right, names = (list(column) for column in zip(*rows, strict=True))

    def lane(pair: tuple[Params, Params], per_seed: PerSeed, _: Array) -> Any:
        with jax.default_matmul_precision("highest"):
            view = View(model_of(run.recipe, run.world), pair[0], per_seed[2], other=pair[1])
            return probe.measured(node, view, key=per_seed[0])

    def sides(params: Params) -> tuple[Params, ...]:
        return tuple(jax.tree.map(lambda leaf, rows=side: leaf[jnp.asarray(rows)], params) for side in (left, right))

    pair = programs.at_once(sides, tuned.params)
    (found,) = run_each(subjects, probe.program(run, lane, rows=len(rows)), pair, [()], label=f"analyze {label}")
    found, axes = probe.finished(node, found)
    finite = tuned.finite[left] & tuned.finite[right]
    for row, name in enumerate(names):
        model = Models((tuned.labels[left[row]],), None, finite[row : row + 1])
        one = {key: value[row : row + 1] for key, value in found.items()}
        places = {
            axis: Coordinate("part", tuple(f"{name}:{part}" for part in names)) if column == "part" else (column, names)
            for axis, (column, names) in axes.items()
        }
        yield to_frame(subjects, label, one, model, step=run.recipe.tune.steps, places=places, part=name)


def _attack(subjects: Subjects, *, label: str) -> Iterator[pl.DataFrame]:
    """An attack at all its strengths on every model."""
    run, models, node = subjects.run, subjects.models, subjects.run.recipe.attacks[label]
    points, every = node.points(), list(run.recipe.conditions)
    conditions = [label] if node.condition else list(node.conditions or every[1:])
    places = tuple(every.index(name) for name in conditions)
    if not points:
        return

    def lane(params: Params, per_seed: PerSeed, _: Array, point: Point) -> Any:
        return judged.attacked_measures(run.recipe, run.world, node, params, per_seed, places=places, point=point)

    attack = probe.program(run, lane, rows=len(models.labels))
    found = run_each(subjects, attack, models.params, [(_scalars(point),) for point in points], label=f"attack {label}")
    axes = {"attacked": Coordinate("condition", tuple(conditions))}
    for point, one in zip(points, found, strict=True):
        part, strength = _named(point)
        yield to_frame(
            subjects, label, one, models, step=run.recipe.tune.steps, places=axes, part=part, strength=strength
        )


def _edits(subjects: Subjects) -> Iterator[pl.DataFrame]:
    tuned, steps = without_base(subjects.models), subjects.run.recipe.tune.steps
    for label in subjects.run.recipe.edits:
        yield from _edit(subjects, tuned, label, step=steps)


def _edit(
    subjects: Subjects, tuned: Models, label: str, *, step: int, strongest: bool = False
) -> Iterator[pl.DataFrame]:
    """An edit at all its strengths, or the strongest alone, on a stack of tuned models."""
    run, node = subjects.run, subjects.run.recipe.edits[label]
    base = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), subjects.base)
    points = node.points(base)[-1:] if strongest else node.points(base)
    if not points:
        return
    roles = node.load().roles
    methods, rates = list(run.recipe.tune.methods), len(run.recipe.tune.learning_rates)
    # Of another method: same learning rate, same seed.
    for offset in range(1, len(methods)) if "other" in roles else [0]:
        finite, trees = tuned.finite & np.roll(tuned.finite, -offset * rates, axis=0), {"target": tuned.params}
        if offset:
            turned = partial(jax.tree.map, partial(jnp.roll, shift=-offset * rates, axis=0))
            trees["other"] = programs.at_once(turned, tuned.params)

        def judged_edit(trees: dict[str, Params], per_seed: PerSeed, zeros: Array, point: Point) -> Any:
            return subjects.judge(subjects.edit[label](trees, per_seed, zeros, point), per_seed, zeros)

        found = run_each(subjects, judged_edit, trees, [(_scalars(point),) for point in points], label=f"edit {label}")
        for point, one in zip(points, found, strict=True):
            part, strength = _named(point)
            part = ",".join(filter(None, [label, part]))
            for rows, other in _rows(methods, rates, offset):
                chosen = Models(tuned.labels[rows], None, finite[rows])
                yield to_frame(
                    subjects, EDITED, {key: values[rows] for key, values in one.items()}, chosen, step=step,
                    part=f"{part}{other}", strength=1.0 if strength is None else strength,
                )  # fmt: skip


def _rows(methods: list[str], rates: int, offset: int) -> Iterator[tuple[slice, str]]:
    """The rows h that one edit's rows are of: all, or a method's, with the name of the other one."""
    if not offset:
        yield slice(None), ""
        return
    for place in range(len(methods)):
        other = methods[(place + offset) % len(methods)]
        yield slice(place * rates, (place + 1) * rates), f":{other}"


def _scalars(point: Point) -> Point:
    return {name: np.int32(value) if isinstance(value, int) else np.float32(value) for name, value in point.items()}


def _named(point: Point) -> tuple[str, float | None]:
    """What rows call a point: the value of its last field is their strength, the others make their part."""
    if not point:
        return "", None
    *others, (_, strength) = point.items()
    return ",".join(f"{name}={value}" for name, value in others), float(strength)
