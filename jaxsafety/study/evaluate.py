"""The evaluation stage: every model of a study judged on every condition, as tidy rows, and readable examples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsafety import keys
from jaxsafety.claims.evidence import Model as Label
from jaxsafety.engine import hosts, legs, programs
from jaxsafety.engine.programs import Grid
from jaxsafety.models import generation
from jaxsafety.recipe.lane import Lane
from jaxsafety.rundir import atomic, machine, progress, results
from jaxsafety.rundir.layout import RESULT_FILES
from jaxsafety.study import lanes, pipeline
from jaxsafety.study.pipeline import Study
from jaxsafety.types import Key, Params, Trial

# Of a judge's metrics those that progress shows.
VERDICTS = ("complied", "refused", "other")


class Models(NamedTuple):
    """Lanes of a study in one stack: ``params [h, s, ...]``, and ``[h, s]`` which of them live."""

    lanes: tuple[Lane, ...]
    params: Params
    finite: np.ndarray

    @property
    def labels(self) -> tuple[Label, ...]:
        """What result rows call them."""
        return tuple(Label(lane.label, lane.point, lane.lr) for lane in self.lanes)


def gather(run: Study) -> Models:
    """Stacks all models of a run, or raises as :func:`pipeline.check_trained` and :func:`pipeline.load_living`."""
    pipeline.check_trained(run)
    found = pipeline.load_living(run, run.recipe.lanes)
    return Models(run.recipe.lanes, found.params, hosts.fetch(found.finite))


def named(models: Models, names: Sequence[str]) -> Models:
    """Returns the models of some names, all where there are none."""
    rows = [row for row, lane in enumerate(models.lanes) if lane.is_among(names)]
    if len(rows) == len(models.lanes):
        return models
    params = programs.at_once(lambda params: jax.tree.map(lambda leaf: leaf[np.asarray(rows)], params), models.params)
    return Models(tuple(models.lanes[row] for row in rows), params, models.finite[rows])


def judge_all(run: Study, models: Models) -> Iterator[dict[str, Any]]:
    """Yields result rows of every condition, model, seed and metric; null for a lane that diverged."""
    grid = run.grid(len(models.lanes))
    judge = programs.program(lambda params, trials, _: lanes.evaluate(run.subject, params, trials), grid=grid)
    conditions = run.recipe.evaluated
    with progress.track(len(conditions), label="evaluate", seeds=len(grid.seeds), unit="condition") as update:
        for i, (name, condition) in enumerate(conditions.items()):
            late = run.subject.late_probability
            trials = pipeline.draw_prompts(run, condition, stream="evaluate", late_probability=late)
            rates = hosts.fetch(judge(models.params, trials, jnp.zeros(len(models.lanes))))
            yield from _rows(run, models, name, rates)
            update(i + 1, {name: float(np.mean(rates[name])) for name in VERDICTS if name in rates})


def _rows(run: Study, models: Models, condition: str, rates: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    for h, (lane, label) in enumerate(zip(models.lanes, models.labels, strict=True)):
        for s, seed in enumerate(run.recipe.seeds):
            for metric, value in rates.items():
                yield {
                    "stage": "evaluate", **label._asdict(), "seed": seed, "step": lane.steps,
                    "condition": condition,
                    "metric": metric, "value": float(value[h, s]) if models.finite[h, s] else None,
                }  # fmt: skip


def curve_rows(run: Study) -> Iterator[dict[str, Any]]:
    """Yields the learning curves of ``metrics.jsonl`` as result rows, lane by lane.

    Raises:
        ValueError: a row of the file is missing or damaged.
    """
    for labels, values in legs.curves([run.leg(lane) for lane in run.recipe.lanes], seeds=run.recipe.seeds):
        for name, value in values.items():
            condition, _, metric = name.partition("/")
            if condition not in run.recipe.read_out:
                condition, metric = "train", name
            yield labels | {"condition": condition, "metric": metric, "value": value}


def example_answers(run: Study, models: Models) -> list[dict[str, Any]]:
    """Returns one prompt per condition with every model's greedy answer, for the first seed, in words.

    None of a subject that has no words.
    """
    text, conditions = run.subject.text, run.recipe.evaluated
    if text is None:
        return []
    key = keys.stream(run.roots[0], "evaluate")

    def draw(key: Key) -> Trial:
        one = partial(
            run.of_seed(0).trials, key=key, step=0, batch_size=1, late_probability=run.subject.late_probability
        )
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[one(each) for each in conditions.values()])

    trials = programs.fitted(draw, key, what="drawing the examples", quick=True)(key)
    first_seed = hosts.fetch(programs.at_once(_first_seed, models.params))
    lane = Grid(run.recipe.seeds[:1], len(models.lanes), "map")
    batch = jax.tree.map(lambda leaf: leaf[None], jax.device_get(trials))
    decode = programs.program(partial(_decode, run), grid=lane, quick=True)
    decoded = decode(first_seed, batch, jnp.zeros(len(models.lanes)))
    names = [" ".join(filter(None, (label.method, label.lr_name))) for label in models.labels]
    rows = []
    for name, told in zip(conditions, text.tell(trials, np.asarray(decoded)[:, 0]), strict=True):
        given = [
            {"model": model, "answer": answer, "verdict": verdict}
            for model, (answer, verdict) in zip(names, told["answers"], strict=True)
        ]
        rows.append({"condition": name} | told | {"answers": given})
    return rows


def _first_seed(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf[:, :1], params)


def _decode(run: Study, params: Params, trials: Trial, _: Any) -> Array:
    """Greedy answers ``[b, t]`` to a batch of prompts, from the first judged token on, as the verdict reads them."""
    start = jnp.argmax(trials.complied.mask | trials.refused.mask, axis=1) + 1
    tokens, count = trials.complied.tokens, 2 * run.subject.text.answer
    prompt = jnp.arange(tokens.shape[1])[None] < start[:, None]
    written = generation.generate((params, run.subject.model), tokens, mask=prompt, count=count)
    rows, places = jnp.arange(len(tokens))[:, None], start[:, None] + jnp.arange(count)[None]
    # A long prompt's window ends before its answer does.
    return tokens.at[rows, places].set(written, mode="drop")


def run_labels(run: Study) -> dict[str, str]:
    """Returns the columns that say which run, code and device a row comes from."""
    revision = machine.environment()["revision"] or "unknown"
    return {"run": run.recipe.name, "revision": revision, "device": jax.devices()[0].device_kind}


def write(run: Study) -> None:
    """Writes ``RESULT_FILES`` into ``results/``: the judged rates, the learning curves and examples.

    Files that are there are kept and not made again.

    Raises:
        ValueError: a stage before has not been finished.
        Stopped: a signal has asked to stop; the files before are saved.
    """
    models, shared = named(gather(run), run.recipe.evaluate.on), run_labels(run)
    folder = run.directory / "results"

    def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
        results.write_results(path, results.rows_to_frame(shared | row for row in rows))

    def curves(path: Path) -> None:
        hosts.decide(lambda: write_rows(path, curve_rows(run)))

    def examples(path: Path) -> None:
        content = json.dumps(example_answers(run, models), ensure_ascii=False, indent=1)
        hosts.decide(lambda: atomic.atomic_write(path, content))

    def evaluated(path: Path) -> None:
        rows = list(judge_all(run, models))
        hosts.decide(lambda: write_rows(path, rows))

    for name, write_file in zip(RESULT_FILES, (curves, examples, evaluated), strict=True):
        if not hosts.decide((folder / name).exists):
            hosts.check(f"before {name}")
            write_file(folder / name)
