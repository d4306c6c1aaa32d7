"""The analyze stage: every analysis, attack and edit of a recipe on every model of a study, as tidy rows.

The stage is a list of pieces, each of compiled programs over the lanes ``[h, s]``; a piece that is finished lies in
``results/analyze/`` and is not repeated. Snapshots are measured by the very program that measures the final models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
from jaxtyping import Array

from jaxsafety.engine import hosts, programs
from jaxsafety.recipe import graph
from jaxsafety.recipe.nodes import EditConfig
from jaxsafety.rundir import results
from jaxsafety.rundir.layout import ANALYSIS_FILE
from jaxsafety.study import judged, pipeline, probe
from jaxsafety.study.evaluate import Models
from jaxsafety.study.pipeline import Study
from jaxsafety.study.probe import PerSeed, Subjects, run_each, to_frame
from jaxsafety.types import Coordinate, Params, Point, View

# What result rows call the edited models.
EDITED = "interventions"

Piece = Callable[[Subjects], Iterator[pl.DataFrame]]


def pieces(run: Study) -> dict[str, Piece]:
    """Returns the pieces of the stage by name, in the order in which they run."""
    pairs = [label for label, node in run.recipe.analyses.items() if node.load().about == "pair"]
    steps = sorted({step for lane in run.recipe.tuned for step in lane.snapshot_steps})
    return {
        "models": partial(_measured, label="analyze models"),
        **{f"step_{step:08d}": partial(_snapshot, step=step) for step in steps},
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
    pipeline.check_trained(run)
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
    """Analyses, and the strongest point of the edits that go along, of the models that have a snapshot of this step.

    The others keep their rows, and so the program its shape; what it says of them is dropped.
    """
    run, models = subjects.run, subjects.models
    rows = [row for row, lane in enumerate(models.lanes) if lane.parent and step in lane.snapshot_steps]
    found = pipeline.load(run, [models.lanes[row] for row in rows], step=step)

    def replaced(now: Params, then: Params) -> Params:
        return jax.tree.map(lambda old, new: old.at[np.asarray(rows)].set(new), now, then)

    finite = models.finite.copy()
    finite[rows] = hosts.fetch(found.finite)
    then = models._replace(params=programs.at_once(replaced, models.params, found.params), finite=finite)
    yield from _measured(subjects, models=then, step=step, only=rows, label=f"analyze step {step}")
    for label, node in run.recipe.edits.items():
        if node.along:
            yield from _edit(subjects, then, label, step=step, only=rows)


def _measured(
    subjects: Subjects, *, label: str, models: Models | None = None, step: int | None = None,
    only: Sequence[int] | None = None,
) -> Iterator[pl.DataFrame]:  # fmt: skip
    """The analyses of single models; of a ``step`` of training, of ``only`` those rows."""
    models = models or subjects.models
    for (on, further), labels in probe.measured_together(subjects.run).items():
        rows = probe.measured_rows(models, on, further)
        if not rows:
            continue
        lanes = (probe.with_parents if further else probe.with_bases)(subjects, models, rows)
        (by_label,) = run_each(subjects, subjects.measure[labels], lanes, [()], label=label)
        for name in labels:
            node, found = subjects.run.recipe.analyses[name], by_label[name]
            # A model that begins fresh has no update.
            tuned = node.load().about == "update"
            kept = [
                place
                for place, row in enumerate(rows)
                if (only is None or row in only) and (models.lanes[row].parent is not None or not tuned)
            ]
            if found and kept:
                found, places = probe.finished(node, {key: values[kept] for key, values in found.items()})
                of = [rows[place] for place in kept]
                yield to_frame(subjects, name, found, models, of, step=step, places=places)


def _pairs(subjects: Subjects, *, label: str) -> Iterator[pl.DataFrame]:
    """An analysis of every two models that differ in nothing but their method: of one parent, at the same point."""
    run, models, node = subjects.run, subjects.models, subjects.run.recipe.analyses[label]
    by_name = {lane.name: row for row, lane in enumerate(models.lanes)}
    chosen = probe.chosen(models, node.on, tuned=True)
    rows = [
        (one, other)
        for first, second in combinations(dict.fromkeys(models.lanes[row].label for row in chosen), 2)
        for one in chosen
        for other in chosen
        if (models.lanes[one].label, models.lanes[other].label) == (first, second)
        and graph.twins(models.lanes[one], models.lanes[other])
    ]
    if not rows:
        return
    left, right = (list(column) for column in zip(*rows, strict=True))
    # Twins are compared from where they parted.
    bases = [by_name[models.lanes[row].parent.name] for row in left]

    def lane(trees: tuple[Params, Params, Params], per_seed: PerSeed, _: Array) -> Any:
        with jax.default_matmul_precision("highest"):
            params, other, base = trees
            return probe.measured(node, View(run.subject.analysed, params, base, other=other), key=per_seed[0])

    def sides(params: Params) -> tuple[Params, ...]:
        return tuple(probe.taken(params, side) for side in (left, right, bases))

    trees = programs.at_once(sides, models.params)
    (found,) = run_each(subjects, probe.program(run, lane, rows=len(rows)), trees, [()], label=f"analyze {label}")
    found, axes = probe.finished(node, found)
    finite = models.finite[left] & models.finite[right]
    for place, pair in enumerate(rows):
        name = "~".join(models.lanes[row].label for row in pair)
        places = {
            axis: Coordinate("part", tuple(f"{name}:{part}" for part in names)) if column == "part" else (column, names)
            for axis, (column, names) in axes.items()
        }
        yield to_frame(subjects, label, found, models, left, kept=[place], finite=finite, places=places, part=name)


def _attack(subjects: Subjects, *, label: str) -> Iterator[pl.DataFrame]:
    """An attack at all its strengths on every model."""
    run, models, node = subjects.run, subjects.models, subjects.run.recipe.attacks[label]
    points, every = node.points(), list(run.recipe.conditions)
    conditions = [label] if node.condition else list(node.conditions or every[1:])
    places = tuple(every.index(name) for name in conditions)
    if not points:
        return

    def lane(trees: tuple[Params, Params], per_seed: PerSeed, _: Array, point: Point) -> Any:
        return judged.attacked_measures(run.recipe, run.subject, node, trees, per_seed, places=places, point=point)

    rows = probe.chosen(models, node.on)
    attack, lanes = probe.program(run, lane, rows=len(rows)), probe.with_bases(subjects, models, rows)
    found = run_each(subjects, attack, lanes, [(_scalars(point),) for point in points], label=f"attack {label}")
    axes = {"attacked": Coordinate("condition", tuple(conditions))}
    for point, one in zip(points, found, strict=True):
        part, strength = named(point)
        yield to_frame(subjects, label, one, models, rows, places=axes, part=part, strength=strength)


def _edits(subjects: Subjects) -> Iterator[pl.DataFrame]:
    for label in subjects.run.recipe.edits:
        yield from _edit(subjects, subjects.models, label)


def _edit(
    subjects: Subjects, models: Models, label: str, *, step: int | None = None, only: Sequence[int] | None = None
) -> Iterator[pl.DataFrame]:
    """An edit at all its strengths on tuned models; of a ``step`` of training the strongest alone, on ``only`` rows."""
    node = subjects.run.recipe.edits[label]
    rows = probe.chosen(models, node.on, tuned=True)
    points = _edit_points(subjects, node, strongest=only is not None)
    if not points or not rows:
        return
    params, base = probe.with_bases(subjects, models, rows)
    for others in _others(models, rows) if "other" in node.load().roles else [rows]:
        trees = {"target": params, "base": base}
        if others != rows:
            # What another model has learned since the two parted.
            names = [lane.name for lane in models.lanes]
            parents = [names.index(models.lanes[row].parent.name) for row in rows]
            trees["other"] = programs.at_once(partial(probe.taken, rows=others), models.params)
            trees["base"] = programs.at_once(partial(probe.taken, rows=parents), subjects.models.params)

        def judged_edit(trees: dict[str, Params], per_seed: PerSeed, zeros: Array, point: Point) -> Any:
            edited = subjects.edit[label](trees, per_seed, zeros, point)
            return subjects.judge[len(rows)]((edited, base), per_seed, zeros)

        finite = models.finite[rows] & models.finite[others]
        found = run_each(subjects, judged_edit, trees, [(_scalars(point),) for point in points], label=f"edit {label}")
        for point, one in zip(points, found, strict=True):
            part, strength = named(point)
            part = ",".join(filter(None, [label, part]))
            for other, kept in _by_other(models, rows, others, only).items():
                yield to_frame(
                    subjects, EDITED, one, models, rows, kept=kept, finite=finite, step=step, part=f"{part}{other}",
                    strength=1.0 if strength is None else strength,
                )  # fmt: skip


def _edit_points(subjects: Subjects, node: EditConfig, *, strongest: bool) -> tuple[Point, ...]:
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), subjects.models.params)
    points = node.points(one)
    return points[-1:] if strongest else points


def _others(models: Models, rows: Sequence[int]) -> Iterator[list[int]]:
    """For every row another model that differs from it in nothing but its method, one after the other; or the row."""
    twins = [[other for other in rows if other == row or graph.twins(models.lanes[row], models.lanes[other])]
             for row in rows]  # fmt: skip
    for offset in range(1, max(map(len, twins))):
        yield [
            own[(own.index(row) + offset) % len(own)] if offset < len(own) else row
            for row, own in zip(rows, twins, strict=True)
        ]


def _by_other(
    models: Models, rows: Sequence[int], others: Sequence[int], only: Sequence[int] | None
) -> dict[str, list[int]]:
    """What names the other model of an edit, to the places along h that have it; nothing names none."""
    found: dict[str, list[int]] = {}
    for place, (row, other) in enumerate(zip(rows, others, strict=True)):
        if only is not None and (row not in only or other not in only):
            continue
        if others == rows:
            found.setdefault("", []).append(place)
        elif other != row:
            found.setdefault(f":{models.lanes[other].label}", []).append(place)
    return found


def _scalars(point: Point) -> Point:
    return {name: np.int32(value) if isinstance(value, int) else np.float32(value) for name, value in point.items()}


def named(point: Point) -> tuple[str, float | None]:
    """Returns what rows call a point: the value of its last field is their strength, the others make their part."""
    if not point:
        return "", None
    *others, (_, strength) = point.items()
    return ",".join(f"{name}={value}" for name, value in others), float(strength)
