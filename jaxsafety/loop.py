"""The one place that jits: runs the lanes of a grid chunk by chunk, with checkpoints, metrics and progress.

A chunk is one dispatch: many steps, batches drawn inside, no host synchronisation. At its end the stacked state is
saved, so a run killed at any moment continues from the last chunk, bit for bit.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsafety import checkpoint, progress, runlog, signals, sweep
from jaxsafety.types import HParams, Metrics, Params, Strategy, TrainState


@dataclass(frozen=True)
class Grid:
    """The lanes of a program.

    Attributes:
        seeds: seed numbers, axis s.
        points: (name, peak learning rate) of the hyper-parameter points, axis h.
        strategy: a resolved strategy.
    """

    seeds: tuple[int, ...]
    points: tuple[tuple[str, float], ...]
    strategy: Strategy


@dataclass(frozen=True)
class Leg:
    """One resumable stretch of training.

    Attributes:
        directory: the run directory.
        stage: ``pretrain`` or ``tune``.
        method: what the rows of ``metrics.jsonl`` are labelled with.
        steps: optimiser steps in all.
        chunk_steps: steps per dispatch.
        snapshots: steps after which the parameters are kept for good, ascending; a chunk ends at each.
    """

    directory: Path
    stage: str
    method: str
    steps: int
    chunk_steps: int
    snapshots: tuple[int, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """Where this leg's checkpoints are."""
        return self.directory / "checkpoints" / self.method

    @property
    def snapshot_folder(self) -> Path:
        """Where this leg's snapshots are."""
        return self.directory / "snapshots" / self.method

    def chunk_end(self, done: int) -> int:
        """The step at which the chunk that starts after ``done`` steps ends."""
        regular = min(done - done % self.chunk_steps + self.chunk_steps, self.steps)
        return min([regular, *(step for step in self.snapshots if step > done)])


def program(run: Callable[..., Any], *, grid: Grid) -> Callable[..., Any]:
    """Returns a single-lane function mapped over the grid and jitted; see :func:`jaxsafety.sweep.over_lanes`."""
    return jax.jit(sweep.over_lanes(run, grid.strategy, seeds=len(grid.seeds)))


def is_finished(leg: Leg) -> bool:
    """Whether the leg's last checkpoint is at its last step."""
    return checkpoint.latest(leg.checkpoints) == leg.steps


def load(leg: Leg, like: TrainState, *, grid: Grid) -> TrainState:
    """Returns the finished leg's states ``[h, s, ...]``, placed as the grid's strategy wants them.

    Args:
        leg: which leg.
        like: shapes of the stacked state (from ``jax.eval_shape``).
        grid: the lanes.

    Raises:
        ValueError: corrupt, missing or misshapen checkpoint.
        FloatingPointError: every lane of it has diverged.
    """
    state = checkpoint.load(leg.checkpoints, _placed(like, grid))[0]
    _check_alive(state.finite, leg)
    return state


def load_snapshot(leg: Leg, like: TrainState, *, grid: Grid, step: int) -> tuple[Params, jax.Array]:
    """Returns the parameters ``[h, s, ...]`` and ``finite`` ``[h, s]`` as they were after ``step`` steps of the leg.

    Args:
        leg: which leg.
        like: shapes of the stacked state (from ``jax.eval_shape``).
        grid: the lanes.
        step: one of ``leg.snapshots``.

    Raises:
        ValueError: corrupt, missing or misshapen snapshot.
    """
    try:
        found = checkpoint.load(leg.snapshot_folder, _placed(_snapshot(like), grid), step=step)[0]
    except ValueError as error:
        raise ValueError(f"{error}: {_train_again(leg)}, which saves the same snapshots") from error
    return found["params"], found["finite"]


def _snapshot(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "finite": state.finite}


def _train_again(leg: Leg) -> str:
    return f"remove {leg.checkpoints} and run `jaxsafety {leg.stage}` to train {leg.method} again from the start"


def curves(leg: Leg, *, grid: Grid) -> Iterator[tuple[dict[str, Any], dict[str, float | None]]]:
    """Yields the rows of ``metrics.jsonl`` that a finished leg wrote, as labels and values by metric.

    They are in the order of an undisturbed run, also where the leg was trained again after another.

    Raises:
        ValueError: a row is missing, as after a damage to the file, or a line is not JSON.
    """
    names = ("stage", "method", "lr_name", "lr", "seed", "step")
    written = {tuple(map(row.get, names)): row for row in runlog.read_metrics(leg.directory)}
    done = 0
    while done < leg.steps:
        done = leg.chunk_end(done)
        for labels in _labels(grid=grid, leg=leg, step=done):
            row = written.get(tuple(labels.values()))
            if row is None:
                shown = ", ".join(f"{name} {labels[name]}" for name in ("lr", "seed", "step"))
                raise ValueError(
                    f"{leg.directory / 'metrics.jsonl'} lacks a row of {leg.method} ({shown}): {_train_again(leg)}, "
                    "which writes the same rows"
                )
            yield labels, {name: value for name, value in row.items() if name not in labels}


def _check_alive(finite: Any, leg: Leg) -> None:
    if not np.any(finite):
        raise FloatingPointError(f"every lane of {leg.stage} {leg.method} diverged: lower its learning rate")


def _placed(like: Any, grid: Grid) -> Any:
    sharding = sweep.seed_sharding(grid.strategy, seeds=len(grid.seeds), axis=1)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)


def train(
    chunk: Callable[[TrainState, Any, HParams, Any], tuple[TrainState, Metrics]],
    start: Callable[[], TrainState],
    *,
    readout: tuple[Callable[[Params, Any, Any], Metrics], Any],
    per_seed: Any,
    points: HParams,
    grid: Grid,
    leg: Leg,
) -> TrainState:
    """Trains all lanes of a leg to its last step, from its newest checkpoint if there is one.

    Args:
        chunk: one lane's chunk, of as many steps as its last argument says.
        start: makes the stacked state ``[h, s, ...]`` before the first step (not called on resume).
        readout: what the learning curves show at a chunk's end: one lane's function of its parameters, and what it
            takes per seed, ``[s, ...]``.
        per_seed: what the chunk takes per seed, ``[s, ...]``.
        points: hyper-parameters ``[h]``.
        grid: the lanes.
        leg: where, how long.

    Returns:
        The final stacked state.

    Raises:
        FloatingPointError: every lane's loss has become non-finite.
        Stopped: a signal has asked to stop; the chunks before are saved.
    """
    advance = jax.jit(sweep.over_lanes(chunk, grid.strategy, seeds=len(grid.seeds)), donate_argnums=0)
    read = program(readout[0], grid=grid)
    state, done = _resume(start, grid=grid, leg=leg)
    runlog.truncate_metrics(leg.directory, stage=leg.stage, method=leg.method, after_step=done)
    label = f"{leg.stage} {leg.method}"
    with progress.track(leg.steps, label=label, start=done, seeds=len(grid.seeds)) as update:
        while done < leg.steps:
            signals.check(f"after step {done} of {label}")
            end = leg.chunk_end(done)
            state, metrics = advance(state, per_seed, points, np.int32(end - done))
            done = end
            host = jax.device_get(metrics | read(state.params, readout[1], points))
            runlog.append_metrics(leg.directory, _rows(host, grid=grid, leg=leg, step=done))
            if done in leg.snapshots:
                # Before the checkpoint: whoever resumes from a step finds all snapshots up to it.
                checkpoint.save(leg.snapshot_folder, _snapshot(state), step=done, keep=len(leg.snapshots))
            checkpoint.save(leg.checkpoints, state, step=done)
            update(done, _headline(host))
            _check_alive(host["finite"], leg)
    return state


def _resume(start: Callable[[], TrainState], *, grid: Grid, leg: Leg) -> tuple[TrainState, int]:
    if checkpoint.latest(leg.checkpoints) is None:
        return start(), 0
    return checkpoint.load(leg.checkpoints, _placed(jax.eval_shape(start), grid))


def _rows(metrics: Mapping[str, np.ndarray], *, grid: Grid, leg: Leg, step: int) -> Iterable[dict[str, Any]]:
    for lane, labels in enumerate(_labels(grid=grid, leg=leg, step=step)):
        h, s = divmod(lane, len(grid.seeds))
        # Of a lane that has diverged nothing is a result, not even what its last finite parameters answer.
        alive = metrics["finite"][h, s] == 1
        values = {name: float(value[h, s]) if alive else math.nan for name, value in metrics.items()}
        values["finite"] = float(metrics["finite"][h, s])
        yield labels | values


def _labels(*, grid: Grid, leg: Leg, step: int) -> Iterator[dict[str, Any]]:
    """Yields what says which lane at which step a row is of, lane by lane."""
    for lr_name, lr in grid.points:
        for seed in grid.seeds:
            yield {"stage": leg.stage, "method": leg.method, "lr_name": lr_name, "lr": lr, "seed": seed, "step": step}


def _headline(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    names = {"loss": "loss", "exact_match": "safe/exact_match", "refused": "unsafe/refused"}
    alive = metrics["finite"] == 1
    return {short: float(np.mean(metrics[name][alive])) if alive.any() else math.nan for short, name in names.items()}
