"""The analyze stage: every analysis of every model of a study, as tidy rows.

The stage is a list of pieces, each a compiled program over the lanes ``[h, s]``; a piece that is finished lies in
``results/analyze/`` and is not repeated. Snapshots are measured by the very program that measures the final models.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array

from jaxsafety import evaluation, loop, progress, study, tree
from jaxsafety.evaluation import Models
from jaxsafety.loop import Grid
from jaxsafety.probes import attacked, features, gradients, quantities, slopes, variants, weights
from jaxsafety.probes.features import Prompts
from jaxsafety.probes.quantities import Coordinate, Quantities, Quantity
from jaxsafety.recipe import PRETRAINED
from jaxsafety.report import analysis_frame, results
from jaxsafety.report.analysis_frame import Lanes
from jaxsafety.study import Study
from jaxsafety.types import Key, Params

# Histograms of the sensitivities: decades a bin.
_BIN = 0.2
# About an update, of which a pretrained model has none.
_OF_UPDATES = ("input_space", "output_space")

Piece = Callable[["Subjects"], Iterator[pl.DataFrame]]


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
    models = evaluation.gather(run)
    rows = len(models.labels)
    return Subjects(
        run,
        models,
        _prompts(run),
        measure=_program(run, partial(_measure, run), rows=rows),
        intervene=_program(run, partial(_intervened, run), rows=rows - 1),
    )


def _program(run: Study, lane: Callable[..., Quantities], *, rows: int) -> Callable[..., Quantities]:
    return loop.program(lane, grid=Grid(run.recipe.seeds, (("", 0.0),) * rows, run.strategy))


def _prompts(run: Study) -> Prompts:
    count = run.recipe.analyze.prompts
    # Activations are read where the first block begins; a prompt that turns unsafe later would say nothing there.
    draw = partial(study.draw_prompts, run, stream="analysis", late_probability=0.0)
    # [s, n, b, ...] to [s, n * b, ...]
    drawn = [
        jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:]), draw(name))
        for name in quantities.conditions(run.recipe)
    ]

    def part(trials: list[Any], chosen: slice) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack([leaf[:, chosen] for leaf in leaves], axis=1), *trials)

    # Held out: of the first two conditions, safe and unsafe, the prompts that come next.
    return Prompts(trials=part(drawn, slice(count)), held_out=part(drawn[:2], slice(count, 2 * count)))


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
    """
    folder = run.directory / "results"
    study.check_tuned(run)
    todo = {name: piece for name, piece in pieces(run).items() if not _path(folder, name).exists()}
    if todo:
        subjects = gather(run)
        for name, piece in todo.items():
            frame = pl.concat(piece(subjects))
            results.write_results(_path(folder, name), frame, schema=results.ANALYSIS_SCHEMA)
    found = [_path(folder, name) for name in pieces(run)]
    everything = results.read_results(found, schema=results.ANALYSIS_SCHEMA)
    results.write_results(folder / study.ANALYSIS_FILE, everything, schema=results.ANALYSIS_SCHEMA)


def _path(folder: Path, piece: str) -> Path:
    return folder / "analyze" / f"{piece}.parquet"


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
            | gradients.gradient_quantities(recipe, world, params, base, key=key)
        )


def _final_models(subjects: Subjects) -> Iterator[pl.DataFrame]:
    run = subjects.run
    yield from _measured(subjects, subjects.models, step=run.recipe.tune.steps, label="analyze models")


def _snapshot(subjects: Subjects, *, step: int) -> Iterator[pl.DataFrame]:
    models = evaluation.gather_snapshots(subjects.run, subjects.models, step=step)
    # The pretrained row keeps the program's shape, and has been written already.
    for frame in _measured(subjects, models, step=step, label=f"analyze step {step}"):
        yield frame.filter(pl.col("method") != PRETRAINED)
    points = variants.along_training(subjects.run.recipe)
    yield from _points(subjects, _tuned(models), points, step=step, label=f"analyze step {step}, interventions")


def _measured(subjects: Subjects, models: Models, *, step: int, label: str) -> Iterator[pl.DataFrame]:
    run = subjects.run
    found = _run(subjects, subjects.measure, models.params, label=label)
    shares, bins = _histogram(found.pop(Quantity("sensitivity", "prompt_norms", "condition prompt")))
    found[Quantity("sensitivity", "histogram", "condition bin")] = shares
    places = _coordinates(subjects) | {
        "bin": Coordinate("strength", bins),
        "pair": Coordinate("part", tuple(map("~".join, gradients.pairs(run.recipe)))),
    }
    of_updates = {key: found.pop(key) for key in list(found) if key.analysis in _OF_UPDATES}
    yield _frame(subjects, found, models, step=step, coordinates=places)
    tuned = Models(models.labels[1:], None, models.finite[1:])
    yield _frame(subjects, {key: value[1:] for key, value in of_updates.items()}, tuned, step=step, coordinates=places)


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

    found = _run(subjects, _program(run, lane, rows=len(models.labels)), models.params, label="analyze prefill")
    yield _frame(subjects, found, models, step=run.recipe.tune.steps)


def _soft_tokens(subjects: Subjects) -> Iterator[pl.DataFrame]:
    run, models = subjects.run, subjects.models
    analyze = run.recipe.analyze

    def lane(params: Params, per_seed: tuple[Key, Prompts, Params], _: Array, count: Array) -> Quantities:
        key, prompts, base = per_seed
        return attacked.soft_token_quantities(run.recipe, run.world, params, base, prompts, count=count, key=key)

    program = _program(run, lane, rows=len(models.labels))
    counts = [(np.int32(count),) for count in analyze.soft_tokens]
    for count, found in zip(
        analyze.soft_tokens, _runs(subjects, program, models.params, counts, label="analyze soft tokens"), strict=True
    ):
        strengths = tuple(float(count * steps) for steps in analyze.soft_steps)
        if count == 0:
            # The prompt as it is, however many steps.
            found = {key: values[:, :, :1] for key, values in found.items()}
        places = _coordinates(subjects) | {"steps": Coordinate("strength", strengths)}
        part = f"{count} token{'s' * (count != 1)}"
        yield _frame(
            subjects, found, models, step=run.recipe.tune.steps, coordinates=places, condition="unsafe", part=part
        )


def _interventions(subjects: Subjects) -> Iterator[pl.DataFrame]:
    """The grid of interventions, then every other method's update added to a tuned model."""
    run, tuned = subjects.run, _tuned(subjects.models)
    points = variants.grid(run.recipe, layers=subjects.layers)
    yield from _points(subjects, tuned, points, step=run.recipe.tune.steps, label="analyze interventions")
    methods, rates = list(run.recipe.tune.methods), len(run.recipe.tune.learning_rates)
    for offset in range(1, len(methods)):
        # Same learning rate, same seed, another method.
        rolled = jax.tree.map(partial(jnp.roll, shift=-offset * rates, axis=0), tuned.params)
        finite = tuned.finite & np.roll(tuned.finite, -offset * rates, axis=0)
        points, label = variants.transfers(run.recipe), f"analyze transfers {offset}/{len(methods) - 1}"
        shared = _shared(subjects, points)
        runs = _runs(subjects, subjects.intervene, (tuned.params, rolled), shared, label=label)
        for point, found in zip(points, runs, strict=True):
            for row in range(len(tuned.labels)):
                one = {key: value[row : row + 1] for key, value in found.items()}
                model = Models(tuned.labels[row : row + 1], None, finite[row : row + 1])
                part = f"transfer:{methods[(row // rates + offset) % len(methods)]}"
                yield _frame(subjects, one, model, step=run.recipe.tune.steps, part=part, strength=point.strength)


def _points(
    subjects: Subjects, tuned: Models, points: tuple[variants.Intervention, ...], *, step: int, label: str
) -> Iterator[pl.DataFrame]:
    """Interventions on a stack of tuned models."""
    pair = (tuned.params, tuned.params)
    runs = _runs(subjects, subjects.intervene, pair, _shared(subjects, points), label=label)
    for point, found in zip(points, runs, strict=True):
        yield _frame(subjects, found, tuned, step=step, part=point.part, strength=point.strength)


def _shared(subjects: Subjects, points: tuple[variants.Intervention, ...]) -> list[tuple[Any, ...]]:
    parts = variants.parts(subjects.run.recipe, layers=subjects.layers)
    return [(np.int32(parts.index(point.part)), np.float32(point.strength)) for point in points]


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


def _alignment(subjects: Subjects) -> Iterator[pl.DataFrame]:
    run, tuned = subjects.run, _tuned(subjects.models)
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
    found = _run(subjects, _program(run, lane, rows=len(rows)), pair, label="analyze alignment")
    finite = tuned.finite[left] & tuned.finite[right]
    for row, name in enumerate(names):
        model = Models((tuned.labels[left[row]],), None, finite[row : row + 1])
        one = {key: value[row : row + 1] for key, value in found.items()}
        matrices = tuple(f"{name}:{matrix}" for matrix in quantities.MATRICES)
        places = _coordinates(subjects) | {"matrix": Coordinate("part", matrices)}
        yield _frame(subjects, one, model, step=run.recipe.tune.steps, coordinates=places, part=name)


def _tuned(models: Models) -> Models:
    return Models(models.labels[1:], jax.tree.map(lambda leaf: leaf[1:], models.params), models.finite[1:])


def _run(subjects: Subjects, program: Callable[..., Quantities], lanes: Any, *, label: str) -> Quantities:
    """Runs a probe once over a grid; returns host arrays ``[h, s, ...]``."""
    (found,) = _runs(subjects, program, lanes, [()], label=label)
    return found


def _runs(
    subjects: Subjects, program: Callable[..., Quantities], lanes: Any, shared: list[tuple[Any, ...]], *, label: str
) -> Iterator[Quantities]:
    """Runs a probe over the lanes once for each tuple of shared arguments."""
    points = jnp.zeros(jax.tree.leaves(lanes)[0].shape[0])
    with progress.track(len(shared), label=label, seeds=len(subjects.run.recipe.seeds)) as update:
        for i, arguments in enumerate(shared):
            yield jax.device_get(program(lanes, subjects.per_seed, points, *arguments))
            update(i + 1, {})


def _coordinates(subjects: Subjects) -> dict[str, Coordinate]:
    places = subjects.run.world.spec.max_text + 1
    return quantities.coordinates(subjects.run.recipe, layers=subjects.layers, places=places)


def _frame(
    subjects: Subjects,
    found: Quantities,
    models: Models,
    *,
    step: int,
    coordinates: Mapping[str, Coordinate] | None = None,
    **columns: Any,
) -> pl.DataFrame:
    rows = [(*label, 0 if label.method == PRETRAINED else step) for label in models.labels]
    lanes = Lanes(rows, subjects.run.recipe.seeds, models.finite)
    labels = evaluation.run_labels(subjects.run) | columns
    return analysis_frame.to_frame(found, coordinates or _coordinates(subjects), lanes, labels=labels)
