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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafety import tree
from jaxsafety.engine import hosts, sweep
from jaxsafety.engine.legs import Leg, common_step, keep, load_states
from jaxsafety.engine.programs import Grid, at_once, place, program
from jaxsafety.rundir import checkpoint, metrics_file, progress, signals
from jaxsafety.types import HParams, Metrics, Params, TrainState

# One lane's read-out of its parameters, and what it takes per seed, ``[s, ...]``.
Readout = tuple[Callable[[Params, Any, Any], Metrics], Any]


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
    make: Callable[..., Callable[..., Any]] = program,
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
        make: makes the programs; one of :func:`jaxsafety.engine.programs.sharing` compiles what comes again once.

    Returns:
        The final stacked state.

    Raises:
        FloatingPointError: every lane's loss has become non-finite.
        Stopped: a signal has asked to stop; the chunks before are saved.
    """
    leg = legs[0]
    advance = make(chunk, grid=grid, donate=(0,), per_lane=2)
    read = make(readout[0], grid=grid)
    join = None if whole is None else make(whole, grid=grid, per_lane=2)
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


def adopt(params: Params, readout: Readout, *, grid: Grid, legs: Sequence[Leg]) -> None:
    """Records as finished legs of a single chunk the parameters ``[h, s, ...]`` of lanes that were trained elsewhere.

    The learning curves get one point, what the read-out says of the parameters after the last step; of the way there
    nothing is known.
    """
    rates = hosts.fetch(program(readout[0], grid=grid)(params, readout[1], jnp.zeros(grid.rows)))
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
    step = common_step(legs)
    if not step:
        return start(), 0
    like = jax.tree.map(lambda leaf: leaf.update(shape=leaf.shape[1:]), jax.eval_shape(start))
    joined = at_once(lambda *states: tree.stack(states), *load_states(legs, like, grid=grid, step=step))
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
