"""Legs, the resumable stretches of training, and what is on disk of them: checkpoints, snapshots, learning curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsafety import tree
from jaxsafety.engine import hosts, sweep
from jaxsafety.engine.programs import Grid
from jaxsafety.rundir import checkpoint, metrics_file
from jaxsafety.rundir.layout import CHECKPOINTS, SNAPSHOTS
from jaxsafety.types import Params


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


def common_step(legs: Sequence[Leg]) -> int:
    """Returns the newest step that all of the legs have a checkpoint of, 0 where one has none."""
    return hosts.decide(lambda: _common_step(legs))


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


def load_states(legs: Sequence[Leg], like: Any, *, grid: Grid, step: int) -> list[Any]:
    """Returns each leg's own state after a step that all have a checkpoint of.

    ``like`` are the shapes of one, ``[s, ...]``. A corrupt, missing or misshapen checkpoint is a ValueError.
    """
    placed = _placed(like, grid)
    # The newest by no number: with its damage comes what to do.
    wanted = hosts.decide(lambda: [None if checkpoint.latest(leg.checkpoints) == step else step for leg in legs])
    return [_load(leg.checkpoints, placed, step=wants) for leg, wants in zip(legs, wanted, strict=True)]


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


def _placed(like: Any, grid: Grid) -> Any:
    sharding = sweep.seed_sharding(grid.strategy, seeds=len(grid.seeds), axis=0)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
