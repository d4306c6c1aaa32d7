"""What the analyses of a run work on, and how a probe runs over all of it: one program over the lanes ``[h, s]``.

A probe maps the parameters of one lane, ``per_seed`` of its seed and shared arguments to named arrays.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import polars as pl
from jaxtyping import Array

from jaxsafety import tree
from jaxsafety.analysis.quantities import Coordinate, Quantities
from jaxsafety.engine import hosts, programs
from jaxsafety.engine.programs import Grid
from jaxsafety.recipe.schema import PRETRAINED
from jaxsafety.rundir import progress
from jaxsafety.study import evaluate, frames, pipeline
from jaxsafety.study.evaluate import Models
from jaxsafety.study.frames import Lanes
from jaxsafety.study.pipeline import Study
from jaxsafety.study.probes import features, gradients, quantities, slopes, variants, weights
from jaxsafety.study.probes.features import Prompts
from jaxsafety.types import Key, Params


@dataclass(frozen=True)
class Subjects:
    """What the analyses of a run work on.

    Attributes:
        run: the study.
        models: the pretrained model, then the finished tuned ones.
        prompts: ``[s, ...]`` what they are measured on.
        measure: the program that measures a stack of models, the final ones and every snapshot; compiled once.
        intervene: the program that builds an intervention on a stack of tuned models and judges it; compiled once.
    """

    run: Study
    models: Models
    prompts: Prompts
    measure: Callable[..., Quantities]
    intervene: Callable[..., Quantities]

    @property
    def base(self) -> Params:
        """The pretrained parameters, ``[s, ...]``."""
        return tree.lane(self.models.params, 0)

    @property
    def per_seed(self) -> tuple[Key, Prompts, Params]:
        """Root keys, prompts and base of every seed."""
        return self.run.roots, self.prompts, self.base

    @property
    def layers(self) -> int:
        """Number of layers of the models."""
        return self.base["blocks"]["mlp"]["up"].shape[1]


def gather(run: Study) -> Subjects:
    """Loads the models of a finished run and draws the prompts of its analyses.

    Raises:
        ValueError: a stage has not been finished.
    """
    models = evaluate.gather(run)
    rows = len(models.labels)
    return Subjects(
        run,
        models,
        _prompts(run),
        measure=program(run, partial(_measure, run), rows=rows),
        intervene=program(run, partial(_intervened, run), rows=rows - 1),
    )


def program(run: Study, lane: Callable[..., Quantities], *, rows: int) -> Callable[..., Quantities]:
    """Compiles the probe of one lane for a grid of ``rows`` models times the seeds."""
    return programs.program(lane, grid=Grid(run.recipe.seeds, (("", 0.0),) * rows, run.strategy))


def without_base(models: Models) -> Models:
    """The tuned models: all but the pretrained one, which comes first."""
    return Models(models.labels[1:], jax.tree.map(lambda leaf: leaf[1:], models.params), models.finite[1:])


def run_once(subjects: Subjects, program: Callable[..., Quantities], lanes: Any, *, label: str) -> Quantities:
    """Runs a probe once over a grid; returns host arrays ``[h, s, ...]``."""
    (found,) = run_each(subjects, program, lanes, [()], label=label)
    return found


def run_each(
    subjects: Subjects, program: Callable[..., Quantities], lanes: Any, shared: list[tuple[Any, ...]], *, label: str
) -> Iterator[Quantities]:
    """Runs a probe over the lanes once for each tuple of shared arguments."""
    points = jnp.zeros(jax.tree.leaves(lanes)[0].shape[0])
    with progress.track(len(shared), label=label, seeds=len(subjects.run.recipe.seeds)) as update:
        for i, arguments in enumerate(shared):
            yield hosts.fetch(program(lanes, subjects.per_seed, points, *arguments))
            update(i + 1, {})


def coordinates(subjects: Subjects) -> dict[str, Coordinate]:
    """Names the places along every axis that a probe of this study may return."""
    longest = subjects.run.world.spec.max_text + 1
    return quantities.coordinates(subjects.run.recipe, layers=subjects.layers, places=longest)


def to_frame(
    subjects: Subjects,
    found: Quantities,
    models: Models,
    *,
    step: int,
    places: Mapping[str, Coordinate] | None = None,
    **columns: Any,
) -> pl.DataFrame:
    """Returns the rows of quantities ``[h, s, ...]`` of models at a tuning step, axes named by ``places``."""
    rows = [(*label, 0 if label.method == PRETRAINED else step) for label in models.labels]
    lanes = Lanes(rows, subjects.run.recipe.seeds, models.finite)
    labels = evaluate.run_labels(subjects.run) | columns
    return frames.to_frame(found, places or coordinates(subjects), lanes, labels=labels)


def _prompts(run: Study) -> Prompts:
    count = run.recipe.analyze.prompts
    # Activations are read where the first block begins; a prompt that turns unsafe later would say nothing there.
    draw = partial(pipeline.draw_prompts, run, stream="analysis", late_probability=0.0)
    # [s, n, b, ...] to [s, n * b, ...]
    drawn = [
        jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:]), draw(name))
        for name in quantities.conditions(run.recipe)
    ]

    def part(trials: list[Any], chosen: slice) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack([leaf[:, chosen] for leaf in leaves], axis=1), *trials)

    # Held out: of the first two conditions, safe and unsafe, the prompts that come next.
    return Prompts(trials=part(drawn, slice(count)), held_out=part(drawn[:2], slice(count, 2 * count)))


def _measure(run: Study, params: Params, per_seed: tuple[Key, Prompts, Params], _: Array) -> Quantities:
    """Everything that one model is measured by: what it does, represents, reacts to, and where its update lies."""
    key, prompts, base = per_seed
    recipe, world = run.recipe, run.world
    with jax.default_matmul_precision("highest"):
        seen = features.features(recipe, world, params, prompts.trials)
        held = features.features(recipe, world, params, prompts.held_out)
        found = features.verdicts(recipe, world, params, prompts.trials, seen.predicted)
        some = jax.tree.map(lambda leaf: leaf[:, : recipe.analyze.sensitivity_prompts], prompts.trials)
        subsets = found.subsets[..., : recipe.analyze.sensitivity_prompts]
        return (
            features.verdict_quantities(found)
            | features.cluster_quantities(seen, found, held, prompts.held_out)
            | features.input_quantities(recipe, params, base, seen, found)
            | slopes.sensitivity_quantities(recipe, world, params, some, subsets, key=key)
            | weights.output_quantities(recipe, params, base, key=key)
            | gradients.gradient_quantities(recipe, world, params, base, prompts.trials, key=key)
        )


def _intervened(
    run: Study,
    pair: tuple[Params, Params],
    per_seed: tuple[Key, Prompts, Params],
    _: Array,
    branch: Array,
    strength: Array,
) -> Quantities:
    key, prompts, base = per_seed
    with jax.default_matmul_precision("highest"):
        params = variants.intervened(run.recipe, *pair, base, branch=branch, strength=strength, key=key)
        return variants.variant_quantities(run.recipe, run.world, params, prompts)
