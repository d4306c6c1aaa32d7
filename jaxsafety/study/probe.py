"""What the analyses of a run work on, and how one runs over all of it: one program over the lanes ``[h, s]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array

from jaxsafety import keys
from jaxsafety.engine import hosts, programs
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.nodes import AnalysisConfig
from jaxsafety.rundir import progress
from jaxsafety.rundir.results import SUBSETS
from jaxsafety.study import evaluate, frames, judged, pipeline
from jaxsafety.study.evaluate import Models
from jaxsafety.study.frames import Arrays
from jaxsafety.study.pipeline import Study
from jaxsafety.study.view import Prompts, view
from jaxsafety.types import Coordinate, Key, Measured, Params, View

PerSeed = tuple[Key, Prompts]


@dataclass(frozen=True)
class Subjects:
    """What the analyses of a run work on.

    Attributes:
        run: the study.
        models: all models, parents first.
        prompts: ``[s, ...]`` what they are measured on.
        measure: by labels of analyses, the program that measures a stack of models, the final ones and every snapshot;
            compiled once.
        judge: by number of rows, the program that judges a stack of edited models; compiled once.
        edit: by label, the program that makes one edit of a stack of tuned models; compiled once for all of them.
    """

    run: Study
    models: Models
    prompts: Prompts
    measure: Mapping[tuple[str, ...], Callable[..., dict[str, Measured]]]
    judge: Mapping[int, Callable[..., Measured]]
    edit: Mapping[str, Callable[..., Params]]

    @property
    def per_seed(self) -> PerSeed:
        """Root keys and prompts of every seed."""
        return self.run.roots, self.prompts


def gather(run: Study) -> Subjects:
    """Loads the models of a finished run and draws the prompts of its analyses; raises as :func:`evaluate.gather`."""
    models = evaluate.gather(run)
    edited = {label: len(chosen(models, node.on, tuned=True)) for label, node in run.recipe.edits.items()}
    return Subjects(
        run,
        models,
        _prompts(run),
        measure={
            labels: program(run, partial(_measure, run, labels), rows=len(rows))
            for of, labels in measured_together(run).items()
            if (rows := measured_rows(models, *of))
        },
        judge={
            rows: program(run, partial(judged.edited_measures, run.recipe, run.subject), rows=rows)
            for rows in set(edited.values())
        },
        edit={
            label: program(
                run, partial(judged.edited_lane, run.recipe, run.subject, node), rows=edited[label], quick=True
            )
            for label, node in run.recipe.edits.items()
        },
    )


def measured_together(run: Study) -> dict[tuple[tuple[str, ...], bool], tuple[str, ...]]:
    """Returns the labels of the analyses of single models, by the models that they are of (none is all), and whether
    they are about further updates."""
    found: dict[tuple[tuple[str, ...], bool], tuple[str, ...]] = {}
    for label, node in run.recipe.analyses.items():
        if (about := node.load().about) != "pair":
            of = node.on, about == "further"
            found[of] = (*found.get(of, ()), label)
    return found


def measured_rows(models: Models, on: Sequence[str], further: bool) -> list[int]:
    """Returns the rows of the models that analyses are of; see :func:`measured_together`."""
    rows = chosen(models, on, tuned=further)
    return [row for row in rows if not further or models.lanes[row].parent.parent is not None]


def with_parents(subjects: Subjects, models: Models, rows: Sequence[int]) -> tuple[Params, Params, Params]:
    """Returns the parameters of some rows, of what the tuned models that they are from are compared with, and of these;
    see :func:`with_bases`."""
    names = [lane.name for lane in models.lanes]
    parents = [names.index(models.lanes[row].parent.name) for row in rows]
    now, _ = with_bases(subjects, models, rows)
    tuned, base = with_bases(subjects, subjects.models, parents)
    return now, base, tuned


def program(run: Study, lane: Callable[..., Any], *, rows: int, quick: bool = False) -> Callable[..., Any]:
    """Compiles what runs on one lane for a grid of ``rows`` models times the seeds."""
    return programs.program(lane, grid=run.grid(rows), quick=quick)


def chosen(models: Models, on: Sequence[str], *, tuned: bool = False) -> list[int]:
    """Returns the rows of the models of some names, all where there are none; the ``tuned`` ones begin with another."""
    return [
        row for row, lane in enumerate(models.lanes) if lane.is_among(on) and (lane.parent is not None or not tuned)
    ]


def with_bases(subjects: Subjects, models: Models, rows: Sequence[int]) -> tuple[Params, Params]:
    """Returns the parameters of some rows, and of what they are compared with: a finished ancestor, or a root itself.

    ``models`` are those of the run at any step of their training.
    """
    finished = subjects.models
    names = [lane.name for lane in finished.lanes]
    bases = [names.index(base_of(subjects.run, models.lanes[row]).name) for row in rows]
    return programs.at_once(lambda now, end: (taken(now, rows), taken(end, bases)), models.params, finished.params)


def base_of(run: Study, lane: Lane) -> Lane:
    """The lane whose parameters a lane's update is taken from."""
    return lane if lane.parent is None else lane.ancestor(run.recipe.analyze.base)


def taken(params: Params, rows: Sequence[int]) -> Params:
    """Returns rows h of a stack."""
    return jax.tree.map(lambda leaf: leaf[np.asarray(rows)], params)


def run_each(
    subjects: Subjects, program: Callable[..., Any], lanes: Any, shared: list[tuple[Any, ...]], *, label: str
) -> Iterator[Any]:
    """Runs a program over the lanes once for each tuple of shared arguments; yields host arrays ``[h, s, ...]``."""
    points = jnp.zeros(jax.tree.leaves(lanes)[0].shape[0])
    with progress.track(len(shared), label=label, seeds=len(subjects.run.recipe.seeds)) as update:
        for i, arguments in enumerate(shared):
            yield hosts.fetch(program(lanes, subjects.per_seed, points, *arguments))
            update(i + 1, {})


def coordinates(run: Study) -> dict[str, Coordinate]:
    """Names the places along the axes that a study knows."""
    conditions = tuple(run.recipe.conditions)
    return {
        "condition": Coordinate("condition", conditions),
        "class": Coordinate("condition", conditions[:2]),
        # A safe prompt has nothing to refuse.
        "asked": Coordinate("condition", conditions[1:]),
        "subset": Coordinate("subset", SUBSETS),
        "layer": Coordinate("layer"),
        "pair": Coordinate("part", tuple("~".join(pair) for pair in combinations(run.recipe.compared, 2))),
    }


def to_frame(
    subjects: Subjects, name: str, found: Arrays, models: Models, rows: Sequence[int], *, kept: Sequence[int] = (),
    finite: np.ndarray | None = None, step: int | None = None, places: Mapping[str, Coordinate] | None = None,
    **columns: Any,
) -> pl.DataFrame:  # fmt: skip
    """Returns the rows of arrays ``[h, s, ...]``, where h are some ``rows`` of ``models``.

    Args:
        subjects: what was analysed.
        name: that of the analysis, the attack, or ``interventions``.
        found: the arrays.
        models: the models.
        rows: whose arrays they are.
        kept: places along h to write, in this order; none is all.
        finite: ``[h, s]``, where it is not that of the models.
        step: the training step that all are at; None is each model's last, and 0 stands for one that begins fresh.
        places: those of the arrays' own axes.
        columns: what is the same in all rows.
    """
    picked = list(kept or range(len(rows)))
    alive = models.finite[list(rows)] if finite is None else finite
    labelled = []
    for place in picked:
        lane, label = models.lanes[rows[place]], models.labels[rows[place]]
        last = 0 if lane.parent is None else lane.steps
        labelled.append((*label, last if step is None else step))
    labels = evaluate.run_labels(subjects.run) | {"analysis": name} | columns
    own = {key: values[picked] for key, values in found.items()}
    return frames.to_frame(own, coordinates(subjects.run) | dict(places or {}), models=labelled,
                           seeds=subjects.run.recipe.seeds, finite=alive[picked], labels=labels)  # fmt: skip


def finished(node: AnalysisConfig, found: Measured) -> tuple[Measured, dict[str, Coordinate]]:
    """Returns what an analysis makes of its arrays of all lanes, and the places along its own axes."""
    analysis = node.load()
    axes = dict(analysis.axes(node.options)) if analysis.axes else {}
    if analysis.finish:
        found, more = analysis.finish(dict(found))
        axes |= more
    return found, axes


def measured(node: AnalysisConfig, seen: View, *, key: Key) -> Measured:
    """Returns what an analysis measures, with the key of its own; ``key`` is the seed's root key."""
    own, reads = keys.named(keys.stream(key, "analysis"), node.analysis), node.load().reads
    # Another analysis may read other sites.
    seen = seen._replace(**{side: {s: getattr(seen, side)[s] for s in reads} for side in ("seen", "held") if seen.seen})
    return node.load().measure(seen, node.options, key=own)


def _prompts(run: Study) -> Prompts:
    count = run.recipe.analyze.prompts
    # Activations are read where the first block begins; a prompt that turns unsafe later would say nothing there.
    draw = partial(pipeline.draw_prompts, run, stream="analysis", late_probability=0.0)
    drawn = [draw(condition) for condition in run.recipe.conditions.values()]

    def part(chosen: slice, *leaves: Array) -> Array:
        # [s, n, b, ...] to [s, n * b, ...]
        flat = [leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:]) for leaf in leaves]
        return jnp.stack([leaf[:, chosen] for leaf in flat], axis=1)

    def parts(*drawn: Any) -> Prompts:
        # Held out: of the first two conditions, safe and unsafe, the prompts that come next.
        return Prompts(
            trials=jax.tree.map(partial(part, slice(count)), *drawn),
            held_out=jax.tree.map(partial(part, slice(count, 2 * count)), *drawn[:2]),
        )

    return programs.at_once(parts, *drawn)


def _measure(
    run: Study, labels: Sequence[str], lane: tuple[Params, ...], per_seed: PerSeed, _: Array
) -> dict[str, Measured]:
    """Analyses of one model, by label: what it does, represents, reacts to, and where its update lies.

    A lane is the model and its base; and of a further update what it was made to.
    """
    (params, base, *parent), (key, prompts) = lane, per_seed
    nodes = {label: run.recipe.analyses[label] for label in labels}
    sites = dict.fromkeys(site for node in nodes.values() for site in node.load().reads)
    with jax.default_matmul_precision("highest"):
        seen = view(run.recipe, run.subject, params, base, prompts, sites=tuple(sites), key=key)
        seen = seen._replace(parent=parent[0]) if parent else seen
        return {label: measured(node, seen, key=key) for label, node in nodes.items()}
