"""Runs the lanes of a grid chunk by chunk, with checkpoints, metrics and progress.

A chunk is one dispatch: many steps, batches drawn inside, no host synchronisation. At its end the stacked state is
saved, so a run killed at any moment continues from the last chunk, bit for bit. A program may train the lanes of
several run directories side by side; each keeps its own rows of the state.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafety.engine import hosts, sweep
from jaxsafety.engine.programs import Grid, place, program
from jaxsafety.rundir import checkpoint, metrics_file, progress
from jaxsafety.types import HParams, Metrics, Params, TrainState


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


def is_finished(leg: Leg) -> bool:
    """Whether the leg's last checkpoint is at its last step."""
    return hosts.decide(lambda: checkpoint.latest(leg.checkpoints) == leg.steps)


def in_step(legs: Sequence[Leg]) -> list[tuple[Leg, ...]]:
    """Splits legs into parts that can train side by side: every part has a step that all its legs can go on from.

    A kill between two saves leaves legs a chunk apart, which the second-newest checkpoint bridges; legs further apart,
    which were not always trained together, are not joined.
    """
    parts, left = [], list(legs)
    while left:
        step = _common_step(left)
        part = tuple(leg for leg in left if step in (checkpoint.steps(leg.checkpoints) or [0]))
        parts.append(part)
        left = [leg for leg in left if leg not in part]
    return parts


def _common_step(legs: Sequence[Leg]) -> int:
    return min(checkpoint.latest(leg.checkpoints) or 0 for leg in legs)


def load(leg: Leg, like: TrainState, *, grid: Grid) -> TrainState:
    """Returns the finished leg's states ``[h, s, ...]``, placed as the grid's strategy wants them.

    ``like`` are the shapes of the stacked state (from ``jax.eval_shape``).

    Raises:
        ValueError: corrupt, missing or misshapen checkpoint.
        FloatingPointError: every lane of it has diverged.
    """
    state = _load(leg.checkpoints, _placed(like, grid))
    _check_alive(hosts.fetch(state.finite), leg)
    return state


def load_snapshot(leg: Leg, like: TrainState, *, grid: Grid, step: int) -> tuple[Params, jax.Array]:
    """Returns the parameters ``[h, s, ...]`` and ``finite`` ``[h, s]`` as they were after a step of ``leg.snapshots``.

    ``like`` is as for :func:`load`.

    Raises:
        ValueError: corrupt, missing or misshapen snapshot.
    """
    try:
        found = _load(leg.snapshot_folder, _placed(_snapshot(like), grid), step=step)
    except ValueError as error:
        raise ValueError(f"{error}: {_train_again(leg)}, which saves the same snapshots") from error
    return found["params"], found["finite"]


def _load(folder: Path, placed: Any, *, step: int | None = None) -> Any:
    return hosts.load(lambda like: checkpoint.load(folder, like, step=step)[0], placed)


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
    written = {tuple(map(row.get, names)): row for row in metrics_file.read_metrics(leg.directory)}
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
    legs: Sequence[Leg],
) -> TrainState:
    """Trains all lanes of one or more legs to their last step, from the newest step that all have a checkpoint of.

    Args:
        chunk: one lane's chunk, of as many steps as its last argument says.
        start: makes the stacked state ``[h, s, ...]`` before the first step (not called on resume).
        readout: what the learning curves show at a chunk's end: one lane's function of its parameters, and what it
            takes per seed, ``[s, ...]``.
        per_seed: what the chunk takes per seed, ``[s, ...]``.
        points: hyper-parameters ``[h]``.
        grid: the lanes.
        legs: where, how long: alike but for their directories, whose rows follow each other along h, as many of each.

    Returns:
        The final stacked state.

    Raises:
        FloatingPointError: every lane's loss has become non-finite.
        Stopped: a signal has asked to stop; the chunks before are saved.
    """
    leg = legs[0]
    advance = program(chunk, grid=grid, donate=(0,))
    read = program(readout[0], grid=grid)
    per_seed, points = place(per_seed, points, grid=grid)
    state, done = _resume(start, grid=grid, legs=legs)
    hosts.decide(lambda: _forget(legs, after_step=done))
    label = f"{leg.stage} {leg.method}" + f" of {len(legs)} cells" * (len(legs) > 1)
    with progress.track(leg.steps, label=label, start=done, seeds=len(grid.seeds)) as update:
        while done < leg.steps:
            hosts.check(f"after step {done} of {label}")
            end = leg.chunk_end(done)
            state, metrics = advance(state, per_seed, points, _steps(end - done, grid=grid))
            done = end
            host = hosts.fetch(metrics | read(state.params, readout[1], points))
            _keep(state, host, grid=grid, legs=legs, step=done)
            update(done, _headline(host))
            _check_alive(host["finite"], leg)
    return state


def adopt(
    state: TrainState, readout: tuple[Callable[[Params, Any, Any], Metrics], Any], *, grid: Grid, leg: Leg
) -> None:
    """Records as a finished leg of a single chunk the states ``[h, s, ...]`` of lanes that were trained elsewhere.

    The learning curves get one point, what the read-out (as in :func:`train`) says of the parameters after the last
    step; of the way there nothing is known.
    """
    rates = hosts.fetch(program(readout[0], grid=grid)(state.params, readout[1], jnp.zeros(len(grid.points))))
    alive = np.ones((len(grid.points), len(grid.seeds)), np.float32)
    _keep(state, rates | {"finite": alive}, grid=grid, legs=[leg], step=leg.steps)


def _steps(count: int, *, grid: Grid) -> jax.Array:
    everywhere = sweep.seed_sharding(grid.strategy, seeds=len(grid.seeds), axis=None)
    return jax.make_array_from_callback((), everywhere, lambda _: np.int32(count))


def _keep(state: TrainState, metrics: Mapping[str, np.ndarray], *, grid: Grid, legs: Sequence[Leg], step: int) -> None:
    """Writes what a chunk's end leaves, every leg its own rows."""
    count, host = len(grid.points) // len(legs), hosts.fetch(state)

    def write() -> None:
        for i, leg in enumerate(legs):
            rows = slice(i * count, (i + 1) * count)
            own, numbers = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (host, metrics))
            points = replace(grid, points=grid.points[rows])
            metrics_file.append_metrics(leg.directory, _rows(numbers, grid=points, leg=leg, step=step))
            if step in leg.snapshots:
                # Before the checkpoint: whoever resumes from a step finds all snapshots up to it.
                checkpoint.save(leg.snapshot_folder, _snapshot(own), step=step, keep=len(leg.snapshots))
            checkpoint.save(leg.checkpoints, own, step=step)

    hosts.decide(write)


def _forget(legs: Sequence[Leg], *, after_step: int) -> None:
    """Drops the metrics of steps that will be taken again."""
    for leg in legs:
        metrics_file.truncate_metrics(leg.directory, stage=leg.stage, method=leg.method, after_step=after_step)


def _resume(start: Callable[[], TrainState], *, grid: Grid, legs: Sequence[Leg]) -> tuple[TrainState, int]:
    step = hosts.decide(lambda: _common_step(legs))
    if not step:
        return start(), 0
    like = _placed(jax.eval_shape(start), grid)
    one = jax.tree.map(lambda leaf: leaf.update(shape=(leaf.shape[0] // len(legs), *leaf.shape[1:])), like)
    # The newest by no number: with its damage comes what to do.
    wanted = [None if checkpoint.latest(leg.checkpoints) == step else step for leg in legs]
    found = [_load(leg.checkpoints, one, step=wants) for leg, wants in zip(legs, wanted, strict=True)]
    if len(found) == 1:
        return found[0], step
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)
    return jax.device_put(joined, jax.tree.map(lambda leaf: leaf.sharding, like)), step


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
