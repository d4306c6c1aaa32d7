"""An attack on one model of a study of checkpoints: which prompts it answers at which strengths, and its answers.

Answers lie beside the plain ones, batch by batch, so that a killed run writes the rest alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxsafety import keys
from jaxsafety.engine import programs
from jaxsafety.formats import hf
from jaxsafety.formats.hf_tokenizer import Tokenizer
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.nodes import AttackConfig
from jaxsafety.rundir import atomic
from jaxsafety.study.checkpoints import answers, attacked, evaluate, inputs, opened, strengths
from jaxsafety.study.checkpoints.answers import Ids, Run
from jaxsafety.study.checkpoints.attacked import Writes
from jaxsafety.study.checkpoints.batches import Batch, Encoded, Shape
from jaxsafety.study.checkpoints.strengths import Strength
from jaxsafety.study.pipeline import Study
from jaxsafety.types import Asked, Params, Point, Written


@dataclass(frozen=True)
class Attempt:
    """One attack on one seed of one lane; ``base`` is the lane that it may look at, which may be the same."""

    study: Study
    label: str
    lane: Lane
    base: Lane
    seed: int
    asked: Encoded
    reader: Tokenizer

    @property
    def node(self) -> AttackConfig:
        """The attack as the recipe has it."""
        return self.study.recipe.attacks[self.label]

    @property
    def how(self) -> Written:
        """How it is made."""
        return self.node.load().written

    @property
    def max_new(self) -> int:
        """The most tokens of an answer."""
        return self.study.recipe.evaluate.answers

    @cached_property
    def own(self) -> hf.Checkpoint:
        """The model."""
        return opened.of_lane(self.study, self.lane, self.seed)

    @cached_property
    def stop(self) -> tuple[int, ...]:
        """What ends its answers."""
        return evaluate.ends(self.own, self.reader)

    @cached_property
    def places(self) -> Int[np.ndarray, " n"]:
        """The prompts that are answered."""
        return strengths.places(self.node, self.asked)

    @cached_property
    def strengths(self) -> list[Strength]:
        """All that it is made at."""
        return list(strengths.of(self.node, self.asked, self.reader, batch_tokens=self.study.about.batch_tokens))

    @property
    def is_based(self) -> bool:
        """Whether its base is another model, and looked at."""
        return self.how.base and self.base.name != self.lane.name

    @cached_property
    def params(self) -> tuple[Params, Params | None]:
        """The model's parameters and those of its base, loaded once for all strengths."""
        self.programs  # noqa: B018  (before: what these need includes the models' place)
        base = self._loaded(opened.of_lane(self.study, self.base, self.seed)) if self.is_based else None
        return self._loaded(self.own), base

    def _loaded(self, checkpoint: hf.Checkpoint) -> Params:
        answers.check_room(checkpoint, self.study.about.dtype)
        return hf.load(checkpoint.directory, dtype=self.study.about.dtype, ignored=checkpoint.ignored)[1]

    @cached_property
    def programs(self) -> dict[Shape, Any]:
        """By the shape of a batch what answers it."""
        if self.how.attack is None:
            return {shape: answers.program(self.config, shape, self.max_new, self.stop) for shape in self.shapes}
        return {shape: attacked.writer(self.writes, shape) for shape in self.shapes}

    @property
    def shapes(self) -> list[Shape]:
        """Those of the batches, each once."""
        fit = partial(answers.fitted, config=self.config, max_new=self.max_new)
        return list(dict.fromkeys(fit(one).tokens.shape for one in self._batches()))

    def _batches(self) -> Iterator[Batch]:
        for strength in self.strengths:
            yield from strength.batches

    def need(self) -> int:
        """Returns the bytes of a device that the largest batch takes, models included; none is loaded."""
        largest = max(self.shapes, key=math.prod)
        plain = self.how.attack is None
        asked = [answers.written(self.config, largest, self.max_new, self.stop) if plain
                 else attacked.written(self.writes, largest)]  # fmt: skip
        if self.finding is not None:
            asked.append(
                attacked.looking(self.how, self.node.options, self.config, attacked.told(self.finding._asdict()))
            )
        with jax.default_matmul_precision("highest"):
            return max(programs.planned(run, *given)[1] for run, given in asked)

    @property
    def config(self) -> LlamaConfig:
        """The model's, as it computes here."""
        return replace(self.own.config, compute_dtype=self.study.about.dtype)

    @property
    def writes(self) -> Writes:
        """What the program of its answers goes by."""
        return writes(self.study, self.node, self.config, self.stop, self.is_based, self.finding)

    @cached_property
    def finding(self) -> Asked | None:
        """The prompts that something is found out on, if it is."""
        return finding(self.study, self.node, self.asked, self.reader, self.config)

    @cached_property
    def found(self) -> dict[str, np.ndarray]:
        """What was found out about the model, kept once it is; a damaged file is a ValueError."""
        if self.finding is None:
            return {}
        file = self.file().with_suffix(".npz")
        if not file.exists():
            run = attacked.finder(self.how, self.node.options, self.config, attacked.told(self.finding._asdict()))
            content = io.BytesIO()
            np.savez(content, **jax.device_get(run(self.params[0], self.finding)))
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic.atomic_write(file, content.getvalue())
        try:
            with np.load(file) as kept:
                return dict(kept)
        except Exception as error:
            raise ValueError(f"{file} does not hold what was found for {self.label}: remove it") from error

    def file(self, name: str = "") -> Path:
        """Where the answers at a strength lie."""
        return evaluate.answers_file(self.study, self.lane, self.seed, self.label, *([name] if name else []))

    def ids(self, strength: Strength) -> Ids:
        """Returns the answers at a strength, row by row of its batches, written where they are not there.

        Raises:
            ValueError: a model does not fit into memory or is too short for prompt and answer; a damaged file.
            OSError: a file cannot be read or written.
            Stopped: a signal has asked to stop; the answers before are kept.
        """
        label = " ".join(
            filter(None, [f"answers of {self.lane.name} seed {self.seed} under", self.label, strength.name])
        )
        file, point = self.file(strength.name), strength.points[-1]
        return answers.kept(strength.batches, file, lambda _: self._run(point), stop=self.stop, label=label)

    def _run(self, point: Point) -> Run:
        answers.check_window(self.own, self._batches(), max_new=self.max_new)
        own, key = attacked.scalars(point), keys.named(keys.stream(keys.root(self.seed), "attack"), self.node.attack)

        def run(batch: Batch) -> np.ndarray:
            batch = answers.fitted(batch, self.config, max_new=self.max_new)
            program, (params, base) = self.programs[batch.tokens.shape], self.params
            if self.how.attack is None:
                return np.asarray(program(params, batch.tokens, batch.mask))
            draws, rows = np.divmod(batch.rows, len(self.places))
            which = np.stack([self.places[rows], draws], axis=1).astype(np.int32)
            return np.asarray(program(params, base, self.found, batch.tokens, batch.mask, own, which, key))

        return run


def finding(study: Study, node: AttackConfig, asked: Encoded, reader: Tokenizer, config: LlamaConfig) -> Asked | None:
    """Returns the prompts that an attack finds out about a model on, if it does."""
    if node.load().written.find is None:
        return None
    most = inputs.longest(study, config)
    return attacked.chosen_half(asked, reader, batch_tokens=study.about.batch_tokens, max_tokens=most)


def writes(
    study: Study, node: AttackConfig, config: LlamaConfig, stop: tuple[int, ...], is_based: bool, prompts: Asked | None
) -> Writes:
    """Returns what the program of the answers under an attack goes by."""
    how, point = node.load().written, attacked.scalars(node.points()[0])
    of = () if prompts is None else attacked.found_shapes(how, node.options, config, attacked.told(prompts._asdict()))
    types = tuple((name, str(value.dtype)) for name, value in point.items())
    return Writes(how, node.options, config, study.recipe.evaluate.answers, stop, is_based, types, of)
