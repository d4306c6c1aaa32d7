"""Trains the lanes of a grid chunk by chunk, with checkpoints, metrics and progress.

A chunk is one dispatch: many steps, batches drawn inside, no host synchronisation. Its end is copied, and every lane's
state is saved while the next chunk computes; a run killed at any moment continues from the last one saved, bit for bit.
After the last step parameters alone are kept. A program may train the lanes of several models side by side; each keeps
its own row of the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafety import tree
from jaxsafety.engine import hosts, sweep
from jaxsafety.engine.programs import Grid, at_once, place, program
from jaxsafety.rundir import checkpoint, metrics_file, progress, signals
from jaxsafety.rundir.layout import CHECKPOINTS, SNAPSHOTS
from jaxsafety.types import HParams, Metrics, Params, TrainState

# One lane's read-out of its parameters, and what it takes per seed, ``[s, ...]``.
Readout = tuple[Callable[[Params, Any, Any], Metrics], Any]


@dataclass(frozen=True)
class Leg:
    """One resumable stretch of training: a row of lanes, all its seeds.

    Attributes:
        directory: the run directory.
        stage: ``pretrain`` or ``tune``.
        name: a plain file name, its own in the directory.
        label, point, lr: what the rows of ``metrics.jsonl`` are labelled with: the model, what tells it from the other
            lanes of that model, and its learning rate.
        steps: optimiser steps in all.
        chunk_steps: steps per dispatch.
        snapshots: steps after which the parameters are kept for good, ascending; a chunk ends at each.
    """

    directory: Path
    stage: str
    name: str
    label: str
    point: str
    lr: float
    steps: int
    chunk_steps: int
    snapshots: tuple[int, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """Where this leg's checkpoints are."""
        return self.directory / CHECKPOINTS / self.name

    @property
    def snapshot_folder(self) -> Path:
        """Where this leg's snapshots are."""
        return self.directory / SNAPSHOTS / self.name

    @property
    def labels(self) -> dict[str, Any]:
        """What its rows of metrics have in common."""
        return {"stage": self.stage, "method": self.label, "lr_name": self.point, "lr": self.lr}

    def chunk_end(self, done: int) -> int:
        """The step at which the chunk that starts after ``done`` steps ends."""
        regular = min(done - done % self.chunk_steps + self.chunk_steps, self.steps)
        return min([regular, *(step for step in self.snapshots if step > done)])


def is_finished(leg: Leg) -> bool:
    """Whether the leg's last checkpoint is at its last step."""
    return hosts.decide(lambda: _is_finished(leg))


def _is_finished(leg: Leg) -> bool:
    return checkpoint.latest(leg.checkpoints) == leg.steps


def in_step(legs: Sequence[Leg]) -> list[tuple[Leg, ...]]:
    """Splits legs into unfinished parts that can train side by side: each has a step that all its legs can go on from.

    A kill between two saves leaves legs a chunk apart, which the second-newest checkpoint bridges; legs further apart,
    as after the loss of one's checkpoints, are not joined.
    """
    return [tuple(legs[place] for place in part) for part in hosts.decide(lambda: _in_step(legs))]


def _in_step(legs: Sequence[Leg]) -> list[list[int]]:
    parts, left = [], list(legs)
    while left:
        step = _common_step(left)
        part = tuple(leg for leg in left if step in (checkpoint.steps(leg.checkpoints) or [0]))
        parts.append(part)
        left = [leg for leg in left if leg not in part]
    return [[legs.index(leg) for leg in part] for part in parts if not all(map(_is_finished, part))]


def _common_step(legs: Sequence[Leg]) -> int:
    return min(checkpoint.latest(leg.checkpoints) or 0 for leg in legs)


def load(leg: Leg, like: Params, *, grid: Grid, step: int | None = None) -> dict[str, Any]:
    """Returns a finished leg's ``params [s, ...]`` and ``finite [s]``, placed as the grid's strategy wants them.

    ``like`` are the shapes of the parameters; ``step`` is one of ``leg.snapshots``, None the end. A corrupt, missing or
    misshapen checkpoint is a ValueError.
    """
    placed = _placed({"params": like, "finite": jax.ShapeDtypeStruct((len(grid.seeds),), bool)}, grid)
    if step is None:
        return _load(leg.checkpoints, placed)
    try:
        return _load(leg.snapshot_folder, placed, step=step)
    except ValueError as error:
        raise ValueError(f"{error}: {_train_again(leg)}, which saves the same snapshots") from error


def _load(folder: Path, placed: Any, *, step: int | None = None) -> Any:
    return hosts.load(lambda like: checkpoint.load(folder, like, step=step)[0], placed)


def _train_again(leg: Leg) -> str:
    return f"remove {leg.checkpoints} and run `jaxsafety {leg.stage}` to train {leg.name} again from the start"


def curves(legs: Sequence[Leg], *, seeds: Sequence[int]) -> Iterator[tuple[dict[str, Any], dict[str, float | None]]]:
    """Yields the rows of ``metrics.jsonl`` that finished legs of one directory wrote, as labels and values by metric.

    They are in the order of an undisturbed run, also where a leg was trained again after another.

    Raises:
        ValueError: a row is missing, as after a damage to the file, or a line is not JSON.
    """
    names = ("stage", "method", "lr_name", "lr", "seed", "step")
    written = {tuple(map(row.get, names)): row for row in metrics_file.read_metrics(legs[0].directory)}
    for leg in legs:
        done = 0
        while done < leg.steps:
            done = leg.chunk_end(done)
            for seed in seeds:
                labels = leg.labels | {"seed": seed, "step": done}
                row = written.get(tuple(labels.values()))
                if row is None:
                    shown = ", ".join(f"{name} {labels[name]}" for name in ("lr", "seed", "step"))
                    raise ValueError(
                        f"{leg.directory / 'metrics.jsonl'} lacks a row of {leg.name} ({shown}): {_train_again(leg)}, "
                        "which writes the same rows"
                    )
                yield labels, {name: value for name, value in row.items() if name not in labels}


def _placed(like: Any, grid: Grid) -> Any:
    sharding = sweep.seed_sharding(grid.strategy, seeds=len(grid.seeds), axis=0)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)


def train(
    chunk: Callable[[TrainState, Any, Any, HParams, Any], tuple[TrainState, Metrics]],
    start: Callable[[], TrainState],
    *,
    readout: Readout,
    whole: Callable[[Any, Any, Any, HParams], Params] | None = None,
    given: Any,
    per_seed: Any,
    points: HParams,
    grid: Grid,
    legs: Sequence[Leg],
    headline: Sequence[str] = (),
) -> TrainState:
    """Trains one or more legs to their last step, from the newest step that all have a checkpoint of.

    Args:
        chunk: one lane's chunk, of as many steps as its last argument says.
        start: makes the stacked state ``[h, s, ...]`` before the first step (not called on resume).
        readout: what the learning curves show at a chunk's end.
        whole: one lane's parameters, which are shown and kept, of (what is trained, given, per seed, point); None is
            what is trained.
        given: what the chunk takes per lane beside the state, ``[h, s, ...]``.
        per_seed: what the chunk takes per seed, ``[s, ...]``.
        points: hyper-parameters ``[h]``.
        grid: the lanes.
        legs: where, how long, one for each row h: alike but for their names and labels, in one directory.
        headline: metrics ``condition/metric`` that the progress shows beside the loss, those that there are.

    Returns:
        The final stacked state.

    Raises:
        FloatingPointError: every lane's loss has become non-finite.
        Stopped: a signal has asked to stop; the chunks before are saved.
    """
    leg = legs[0]
    advance = program(chunk, grid=grid, donate=(0,), per_lane=2)
    read = _reader(readout[0], grid)
    join = None if whole is None else program(whole, grid=grid, per_lane=2)
    given, per_seed, points = place(given, per_seed, points, grid=grid)
    # Points differ by method in their names: a read-out, which looks at none, would be traced for each again.
    rows = _everywhere(np.zeros(grid.rows, np.float32), grid=grid)
    state, done = _resume(start, grid=grid, legs=legs)
    hosts.decide(lambda: _forget(legs, after_step=done))
    label = f"{leg.stage} {'+'.join(dict.fromkeys(one.label for one in legs))}"
    with progress.track(leg.steps, label=label, start=done, seeds=len(grid.seeds)) as update, _finishing() as left:
        while done < leg.steps:
            hosts.check(f"after step {done} of {label}")
            end = leg.chunk_end(done)
            steps = _everywhere(np.int32(end - done), grid=grid)
            state, metrics = advance(state, given, per_seed, points, steps)
            _finish(left)  # what the chunk before leaves is written while this one computes
            done = end
            params = state.params if join is None else join(state.params, given, per_seed, points)
            host = hosts.fetch(metrics | read(params, readout[1], rows))
            left.append(_keeper(state, params, host, grid=grid, legs=legs, step=done))
            update(done, _headline(host, headline))
            if not np.any(host["finite"]):
                raise FloatingPointError(f"every lane of {label} diverged: lower its learning rate")
    return state


@lru_cache(maxsize=4)
def _reader(read: Callable[..., Metrics], grid: Grid) -> Callable[..., Metrics]:
    """The program of a read-out, which models with as many lanes share."""
    return program(read, grid=grid)


def forget_optimizers(legs: Sequence[Leg]) -> None:
    """Drops what finished legs have kept to go on from: of each its parameters stay."""
    hosts.decide(lambda: [checkpoint.prune(leg.checkpoints, keep=1) for leg in legs])


def keep(legs: Sequence[Leg], params: Params, finite: np.ndarray) -> None:
    """Records as finished legs the parameters ``[h, s, ...]`` of lanes, and ``[h, s]`` which live, that no step led to.

    Each leg has its row.
    """
    host = hosts.fetch(params)

    def write() -> None:
        for h, leg in enumerate(legs):
            checkpoint.save(leg.checkpoints, {"params": tree.lane(host, h), "finite": finite[h]}, step=leg.steps)

    hosts.decide(write)


def adopt(params: Params, readout: Readout, *, grid: Grid, legs: Sequence[Leg]) -> None:
    """Records as finished legs of a single chunk the parameters ``[h, s, ...]`` of lanes that were trained elsewhere.

    The learning curves get one point, what the read-out says of the parameters after the last step; of the way there
    nothing is known.
    """
    rates = hosts.fetch(_reader(readout[0], grid)(params, readout[1], jnp.zeros(grid.rows)))
    alive = np.ones((grid.rows, len(grid.seeds)), bool)
    numbers = rates | {"finite": alive.astype(np.float32)}
    for h, leg in enumerate(legs):
        metrics_file.append_metrics(leg.directory, _rows(numbers, seeds=grid.seeds, row=h, leg=leg, step=leg.steps))
    keep(legs, params, alive)


def _everywhere(value: np.ndarray | np.generic, *, grid: Grid) -> jax.Array:
    """A value on every device of the grid, in every process."""
    sharding = sweep.seed_sharding(grid.strategy, seeds=len(grid.seeds), axis=None)
    return jax.make_array_from_callback(value.shape, sharding, lambda _: value)


@contextmanager
def _finishing() -> Iterator[list[Callable[[], None]]]:
    """A list of what is left to write, which is written in every case at the end, a signal's or an error's as well."""
    left: list[Callable[[], None]] = []
    try:
        yield left
    except (signals.Stopped, FloatingPointError):
        _finish(left)
        raise
    except BaseException:
        # It may be the error of one process alone, and the others don't come to decide anything.
        while hosts.is_first() and left:
            left.pop()()
        raise
    _finish(left)


def _finish(left: list[Callable[[], None]]) -> None:
    while left:
        hosts.decide(left.pop())


def _keeper(
    state: TrainState, params: Params, metrics: Mapping[str, np.ndarray], *, grid: Grid, legs: Sequence[Leg], step: int
) -> Callable[[], None]:
    """Returns what writes the end of a chunk, every leg its own row, whatever becomes of the state's memory."""
    host = _copied(state)
    # Of what is trained itself there is one copy.
    shown = {"params": host.params if params is state.params else _copied(params), "finite": host.finite}

    def write() -> None:
        rows = (_rows(metrics, seeds=grid.seeds, row=h, leg=leg, step=step) for h, leg in enumerate(legs))
        metrics_file.append_metrics(legs[0].directory, (row for own in rows for row in own))
        for h, leg in enumerate(legs):
            if step in leg.snapshots:
                # Before the checkpoint: whoever resumes from a step finds all snapshots up to it.
                checkpoint.save(leg.snapshot_folder, tree.lane(shown, h), step=step, keep=len(leg.snapshots))
            checkpoint.save(leg.checkpoints, tree.lane(shown if step == leg.steps else host, h), step=step)

    return write


def _copied(tree: Any) -> Any:
    # What is fetched from a CPU may be the very memory that the next chunk is given.
    return jax.tree.map(lambda leaf: leaf if leaf.flags.owndata else np.array(leaf), hosts.fetch(tree))


def _forget(legs: Sequence[Leg], *, after_step: int) -> None:
    """Drops the metrics of steps that will be taken again."""
    metrics_file.truncate_metrics(legs[0].directory, of=[leg.labels for leg in legs], after_step=after_step)


def _resume(start: Callable[[], TrainState], *, grid: Grid, legs: Sequence[Leg]) -> tuple[TrainState, int]:
    step = hosts.decide(lambda: _common_step(legs))
    if not step:
        return start(), 0
    shapes = jax.eval_shape(start)
    like = _placed(jax.tree.map(lambda leaf: leaf.update(shape=leaf.shape[1:]), shapes), grid)
    # The newest by no number: with its damage comes what to do.
    wanted = hosts.decide(lambda: [None if checkpoint.latest(leg.checkpoints) == step else step for leg in legs])
    found = [_load(leg.checkpoints, like, step=wants) for leg, wants in zip(legs, wanted, strict=True)]
    joined = at_once(lambda *states: tree.stack(states), *found)
    placed = sweep.seed_sharding(grid.strategy, seeds=len(grid.seeds), axis=1)
    return jax.device_put(joined, placed), step


def _rows(
    metrics: Mapping[str, np.ndarray], *, seeds: Sequence[int], row: int, leg: Leg, step: int
) -> Iterable[dict[str, Any]]:
    for s, seed in enumerate(seeds):
        # Of a lane that has diverged nothing is a result, not even what its last finite parameters answer.
        alive = metrics["finite"][row, s] == 1
        values = {name: float(value[row, s]) if alive else math.nan for name, value in metrics.items()}
        values["finite"] = float(metrics["finite"][row, s])
        yield leg.labels | {"seed": seed, "step": step} | values


def _headline(metrics: Mapping[str, np.ndarray], shown: Sequence[str]) -> dict[str, float]:
    names = {name.rpartition("/")[2]: name for name in ("loss", *shown) if name in metrics}
    alive = metrics["finite"] == 1
    return {short: float(np.mean(metrics[name][alive])) if alive.any() else math.nan for short, name in names.items()}
