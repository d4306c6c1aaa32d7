"""Attacks on the answers of the models of a study of checkpoints: judged at every strength, as tidy rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import polars as pl
from jaxtyping import Bool, Shaped

from jaxsafety.formats.rule_judge import Verdict
from jaxsafety.study.analyze import named
from jaxsafety.study.checkpoints import evaluate, judges, rows
from jaxsafety.study.checkpoints.attempts import Attempt
from jaxsafety.study.checkpoints.judges import Answer
from jaxsafety.study.checkpoints.strengths import Strength, conditions
from jaxsafety.types import Point


def measured(attempt: Attempt, *, labels: dict[str, Any]) -> pl.DataFrame:
    """Returns the rows of an attack on one model at all its strengths; answers that are not there are written.

    ``labels`` are the columns that all rows share.

    Raises:
        ValueError: as :meth:`jaxsafety.study.checkpoints.attempts.Attempt.ids`; a judge that fails or has no verdict on
            some answer, which then are there.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; the answers before are kept.
    """
    frames = [rows.frame({}, labels=labels)]
    for strength in attempt.strengths:
        verdicts = _verdicts(attempt, strength)
        for point in strength.points:
            count = int(point[attempt.how.draws]) if attempt.how.draws else 1
            frames += _rows(attempt, point, _of_draws(verdicts[:count]), labels)
    return pl.concat(frames)


def _verdicts(attempt: Attempt, strength: Strength) -> Shaped[np.ndarray, "draws n"]:
    """What the judge that decides says of the answers at a strength."""
    found, count = [], len(attempt.places)
    name = "/".join(filter(None, (attempt.lane.name, attempt.label, strength.name)))
    for row, own in enumerate(attempt.ids(strength)):
        draw, which = divmod(row, count)
        place, text = attempt.places[which], attempt.reader.text(own)
        where = f"{place}.{draw}" if attempt.how.draws else f"{place}"
        found.append(Answer(
            judges.answer_id(name, attempt.seed, where, text), attempt.asked.prompts[place], text,
            len(own) >= attempt.max_new and own[-1] not in attempt.stop, attempt.reader.text(strength.given[which]),
        ))  # fmt: skip
    first = judges.of(attempt.study.recipe.subject.options)[0]
    verdicts = evaluate.decided(found, attempt.file(strength.name).with_suffix(".jsonl"), judge=first)
    return np.array(verdicts).reshape(strength.draws, count)


def _of_draws(verdicts: Shaped[np.ndarray, "draws n"]) -> dict[str, Bool[np.ndarray, " n"]]:
    """By verdict the prompts that have it: one draw that complies is enough, and all must refuse."""
    complied, refused = (verdicts == "complied").any(axis=0), (verdicts == "refused").all(axis=0)
    return dict(zip(get_args(Verdict), (refused, complied, ~(refused | complied)), strict=True))


def _rows(
    attempt: Attempt, point: Point, found: dict[str, Bool[np.ndarray, " n"]], labels: dict[str, Any]
) -> Iterator[pl.DataFrame]:
    part, strength = named(point)
    given = np.array([attempt.asked.prompts[place].label for place in attempt.places])
    numbers = {name: value for name, value in attempt.found.items() if value.ndim == 0}
    for condition in conditions(attempt.node, attempt.asked):
        own, where = given == condition, labels | {"part": part, "strength": strength, "condition": condition}
        yield rows.shares({(attempt.label, verdict): cases[own] for verdict, cases in found.items()}, labels=where)
        told = {"n_prompts": own.sum()} | numbers
        yield rows.frame({(attempt.label, name): value for name, value in told.items()}, labels=where)
