"""What the analyses of a run work on, and how one runs over all of it: one program over the lanes ``[h, s]``."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import polars as pl
from jaxtyping import Array

from jaxsafety import keys, tree
from jaxsafety.engine import hosts, programs
from jaxsafety.engine.programs import Grid
from jaxsafety.recipe.nodes import AnalysisConfig
from jaxsafety.recipe.schema import PRETRAINED
from jaxsafety.rundir import progress
from jaxsafety.rundir.results import SUBSETS
from jaxsafety.study import evaluate, frames, judged, pipeline
from jaxsafety.study.evaluate import Models
from jaxsafety.study.frames import Arrays
from jaxsafety.study.pipeline import Study
from jaxsafety.study.view import Prompts, view
from jaxsafety.types import Coordinate, Key, Measured, Params, Trial, View

PerSeed = tuple[Key, Prompts, Params]


@dataclass(frozen=True)
class Subjects:
    """What the analyses of a run work on.

    Attributes:
        run: the study.
        models: the pretrained model, then the finished tuned ones.
        prompts: ``[s, ...]`` what they are measured on.
        measure: the program that measures a stack of models, the final ones and every snapshot; compiled once.
        judge: the program that judges a stack of edited models; compiled once.
        edit: by label, the program that makes one edit of a stack of tuned models; compiled once for all of them.
    """

    run: Study
    models: Models
    prompts: Prompts
    measure: Callable[..., dict[str, Measured]]
    judge: Callable[..., Measured]
    edit: Mapping[str, Callable[..., Params]]

    @cached_property
    def base(self) -> Params:
        """The pretrained parameters, ``[s, ...]``."""
        return programs.at_once(lambda params: tree.lane(params, 0), self.models.params)

    @property
    def per_seed(self) -> PerSeed:
        """Root keys, prompts and base of every seed."""
        return self.run.roots, self.prompts, self.base


def gather(run: Study) -> Subjects:
    """Loads the models of a finished run and draws the prompts of its analyses; raises as :func:`evaluate.gather`."""
    models = evaluate.gather(run)
    rows = len(models.labels)
    return Subjects(
        run,
        models,
        _prompts(run),
        measure=program(run, partial(_measure, run), rows=rows),
        judge=program(run, partial(judged.edited_measures, run.recipe, run.world), rows=rows - 1),
        edit={
            label: program(run, partial(judged.edited_lane, node), rows=rows - 1)
            for label, node in run.recipe.edits.items()
        },
    )


def program(run: Study, lane: Callable[..., Any], *, rows: int) -> Callable[..., Any]:
    """Compiles what runs on one lane for a grid of ``rows`` models times the seeds."""
    return programs.program(lane, grid=Grid(run.recipe.seeds, (("", 0.0),) * rows, run.strategy))


def without_base(models: Models) -> Models:
    """The tuned models: all but the pretrained one, which comes first."""
    params = programs.at_once(lambda params: jax.tree.map(lambda leaf: leaf[1:], params), models.params)
    return Models(models.labels[1:], params, models.finite[1:])


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
        "pair": Coordinate("part", tuple("~".join(pair) for pair in combinations(run.recipe.tune.methods, 2))),
    }


def to_frame(
    subjects: Subjects, name: str, found: Arrays, models: Models, *, step: int,
    places: Mapping[str, Coordinate] | None = None, **columns: Any,
) -> pl.DataFrame:  # fmt: skip
    """Returns the rows of arrays ``[h, s, ...]`` of ``models`` at a step; ``places`` are those of their own axes.

    ``name`` is that of the analysis, the attack, or ``interventions``; ``columns`` are the same in all rows.
    """
    rows = [(*label, 0 if label.method == PRETRAINED else step) for label in models.labels]
    labels = evaluate.run_labels(subjects.run) | {"analysis": name} | columns
    return frames.to_frame(found, coordinates(subjects.run) | dict(places or {}), models=rows,
                           seeds=subjects.run.recipe.seeds, finite=models.finite, labels=labels)  # fmt: skip


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

    def parts(*drawn: Trial) -> Prompts:
        # Held out: of the first two conditions, safe and unsafe, the prompts that come next.
        return Prompts(
            trials=jax.tree.map(partial(part, slice(count)), *drawn),
            held_out=jax.tree.map(partial(part, slice(count, 2 * count)), *drawn[:2]),
        )

    return programs.at_once(parts, *drawn)


def _measure(run: Study, params: Params, per_seed: PerSeed, _: Array) -> dict[str, Measured]:
    """Every analysis of one model, by label: what it does, represents, reacts to, and where its update lies."""
    key, prompts, base = per_seed
    nodes = {label: node for label, node in run.recipe.analyses.items() if node.load().about != "pair"}
    sites = dict.fromkeys(site for node in nodes.values() for site in node.load().reads)
    with jax.default_matmul_precision("highest"):
        seen = view(run.recipe, run.world, params, base, prompts, sites=tuple(sites), key=key)
        return {label: measured(node, seen, key=key) for label, node in nodes.items()}
