"""The strengths of attacks on answers: which prompts are answered at them, how often, and behind what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
from jaxtyping import Int

from jaxsafety.config.names import check_name
from jaxsafety.config.told import told_of
from jaxsafety.formats.hf_tokenizer import Tokenizer
from jaxsafety.formats.prompts import LABELS, Prompt
from jaxsafety.recipe.nodes import AttackConfig
from jaxsafety.study.checkpoints import answers, inputs
from jaxsafety.study.checkpoints.batches import Batch, Encoded, bucketed
from jaxsafety.study.pipeline import Study
from jaxsafety.types import Point


@dataclass(frozen=True)
class Strength:
    """Points of an attack that differ in the number of draws alone, with what is answered at all of them.

    Attributes:
        points: fewer draws first.
        name: of the folder of their answers; empty where all points are one strength.
        draws: the most of them.
        given: ``[n]`` token ids before the answers to the n prompts.
        batches: rows are ``draw * n + i`` for the i-th of the prompts.
    """

    points: list[Point]
    name: str
    draws: int
    given: list[list[int]]
    batches: list[Batch]


def check(study: Study) -> None:
    """Checks the attacks of a study whose files are known to be readable; nothing is loaded.

    Raises:
        ValueError: a condition that no prompt has as its label; a model too short for prompt and answer.
    """
    if not study.recipe.attacks:
        return
    models, reader = inputs.given(study), inputs.tokenizer(study)
    asked = inputs.asked(study, models=models)
    for label, node in study.recipe.attacks.items():
        for name in node.conditions:
            check_name(f"label of prompts in attacks.{label}.conditions", name, asked.labels)
        for strength in of(node, asked, reader, batch_tokens=study.about.batch_tokens):
            for model in models:
                with told_of(f"attacks.{label}"):
                    answers.check_window(model, strength.batches, max_new=study.recipe.evaluate.answers)


def places(node: AttackConfig, asked: Encoded) -> Int[np.ndarray, " n"]:
    """Returns the prompts that are answered under an attack: of its conditions, by default all but safe.

    Of one that finds out about models on half of the prompts they are those of the other half.
    """
    own = np.isin([prompt.label for prompt in asked.prompts], conditions(node, asked))
    return np.flatnonzero(own & (asked.folds == 0) if node.load().written.find else own)


def conditions(node: AttackConfig, asked: Encoded) -> tuple[str, ...]:
    """Returns the labels of the prompts that are attacked."""
    return node.conditions or tuple(label for label in asked.labels if label != LABELS[0])


def of(node: AttackConfig, asked: Encoded, reader: Tokenizer, *, batch_tokens: int) -> Iterator[Strength]:
    """Yields the points of an attack by what is answered at them."""
    how, own = node.load().written, places(node, asked)
    found: dict[str, list[Point]] = {}
    for point in node.points():
        name = ",".join(f"{field}={value}" for field, value in point.items() if field != how.draws)
        found.setdefault(name, []).append(point)
    for name, points in found.items():
        given = _wanted(node, points[-1], [asked.prompts[place] for place in own], reader)
        placed = bucketed([[*asked.ids[place], *more] for place, more in zip(own, given, strict=True)],
                          batch_tokens=batch_tokens)  # fmt: skip
        draws = int(points[-1][how.draws]) if how.draws else 1
        batches = [replace(one, rows=one.rows + draw * len(own)) for draw in range(draws) for one in placed]
        yield Strength(points, name, draws, given, batches)


def _wanted(node: AttackConfig, point: Point, prompts: Sequence[Prompt], reader: Tokenizer) -> list[list[int]]:
    """The token ids that stand before a model's own answer to each of some prompts."""
    given = node.load().written.given
    text, count = ("", 0) if given is None else given(node.options, point)
    if not count:
        return [[] for _ in prompts]
    answers = (reader.exchange(prompt.messages, prompt.target or text)[1] for prompt in prompts)
    # Behind the answer's words stands what ends it.
    return [list(takewhile(lambda one: one not in reader.ends, ids))[:count] for ids in answers]
