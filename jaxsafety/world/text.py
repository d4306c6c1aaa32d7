"""Sequences as a person reads them: operators, text, true output, refusal, and which tokens are scored."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxsafety.types import Trial
from jaxsafety.world.layout import last_prompt_index
from jaxsafety.world.spec import World


class Example(NamedTuple):
    """One prompt with both answers, in words; ``prompt`` ends with the end-of-text token.

    Attributes:
        pcfg: 1-based number of the PCFG.
        unsafe: whether refusing is the preferred answer.
        operators: the four task tokens.
        text: the letters they act on.
        prompt: the whole prompt.
        expected, refusal: the true output and the refusal, both blocks with their stops.
        scored_expected, scored_refusal: their scored tokens, others as ``.``.
    """

    pcfg: int
    unsafe: bool
    operators: str
    text: str
    prompt: str
    expected: str
    refusal: str
    scored_expected: str
    scored_refusal: str


def words(world: World, ids: Int[Array, " n"] | np.ndarray) -> str:
    """Returns token ids as their names, separated by spaces."""
    return " ".join(world.spec.tokens[i] for i in np.asarray(ids))


def answer_start(world: World, length: int | Int[Array, "*b"]) -> int | Int[Array, "*b"]:
    """Returns the index of the first answer token of a prompt with text length ``length``."""
    return last_prompt_index(length) + 1


def examples(world: World, trial: Trial) -> list[Example]:
    """Returns every prompt of a batch in words."""
    host = jax.device_get(trial)
    return [_example(world, jax.tree.map(lambda leaf, i=i: leaf[i], host)) for i in range(host.unsafe.shape[0])]


def _example(world: World, trial: Trial) -> Example:
    length = int(trial.prompt.length)
    start = answer_start(world, length)
    answer = slice(start - 1, start + 2 * length + 1)
    letters = trial.prompt.letters[:length] + world.first_letter

    def scored(targets: Int[np.ndarray, " t"], mask: Bool[np.ndarray, " t"]) -> str:
        names = words(world, targets[answer]).split()
        return " ".join(name if on else "." for name, on in zip(names, mask[answer], strict=True))

    return Example(
        pcfg=int(trial.prompt.pcfg) + 1,
        unsafe=bool(trial.unsafe),
        operators=words(world, trial.prompt.tasks),
        text=words(world, letters),
        prompt=words(world, trial.complied.tokens[:start]),
        expected=words(world, trial.complied.targets[answer]),
        refusal=words(world, trial.refused.targets[answer]),
        scored_expected=scored(trial.complied.targets, trial.complied.mask),
        scored_refusal=scored(trial.refused.targets, trial.refused.mask),
    )
