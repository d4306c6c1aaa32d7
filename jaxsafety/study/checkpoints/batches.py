"""Labelled prompts as batches of token ids: truncated where they are too long, in buckets of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from jaxsafety.formats.hf_tokenizer import Tokenizer, shortened
from jaxsafety.formats.prompts import LABELS, Prompt

# Lengths are rounded up to a multiple of this: few shapes, few programs.
_STEP = 32
# Each half of a class makes the means that the other half is measured with.
LEAST = 4
# Sequences and places of a batch.
Shape = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """Prompts as token ids, up to where their answers begin.

    ``truncated`` of them have lost something, and ``spelling`` spell control tokens of the tokenizer.
    """

    prompts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    truncated: int
    spelling: int

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels there are: safe, unsafe, then the jailbreaks as they first come."""
        found = dict.fromkeys(prompt.label for prompt in self.prompts)
        return (*LABELS, *(label for label in found if label not in LABELS))

    def of(self, label: str) -> Bool[np.ndarray, " n"]:
        """Marks the prompts of a label."""
        return np.array([prompt.label == label for prompt in self.prompts])

    @property
    def folds(self) -> Int[np.ndarray, " n"]:
        """Which half of its label every prompt belongs to, 0 or 1, in turn.

        Where the i-th jailbreak wraps the i-th unsafe prompt, as in this package's set, both are in one half, so that
        no prompt is measured with a mean that it is part of.
        """
        folds = np.zeros(len(self.prompts), int)
        for label in self.labels:
            folds[self.of(label)] = np.arange(self.of(label).sum()) % 2
        return folds


@dataclass(frozen=True)
class Batch:
    """Sequences of one padded length.

    ``rows`` are the prompts that they are; ``tokens`` are padded right with 0; ``mask`` is True where a token is real;
    what follows the first ``prompt_lengths`` tokens is an answer.
    """

    rows: Int[np.ndarray, " b"]
    tokens: Int[np.ndarray, "b t"]
    mask: Bool[np.ndarray, "b t"]
    prompt_lengths: Int[np.ndarray, " b"]


def encode(prompts: Sequence[Prompt], tokenizer: Tokenizer, *, max_tokens: int, vocab_size: int) -> Encoded:
    """Returns prompts as ids; of one of more than ``max_tokens`` the first token and the end are kept.

    The first token is what attention rests on, and the end is where the activations are read.

    Raises:
        ValueError: less than ``LEAST`` prompts of a class; a conversation that the tokenizer's template refuses; ids
            beyond the vocabulary of both models.
    """
    for label in LABELS:
        if (count := sum(prompt.label == label for prompt in prompts)) < LEAST:
            more = "" if count else "; lines of several sets can stand in one JSONL file"
            raise ValueError(
                f"got {count} {label} prompts, expected at least {LEAST}: halves are compared with halves{more}"
            )
    ids = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids.append(own := tokenizer.prompt(prompt.messages))
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
        if not own:
            raise ValueError(f"prompt {number} has no tokens: expected a text that is not empty")
        if max(own) >= vocab_size:
            raise ValueError(
                f"the tokenizer of {tokenizer.directory} gives id {max(own)} for prompt {number}, and the models have "
                f"a vocabulary of {vocab_size}: expected the tokenizer that belongs to them"
            )
    kept = tuple(tuple(shortened(own, max_tokens)) for own in ids)
    spelling = sum(tokenizer.spells(turn.content for turn in prompt.messages) for prompt in prompts)
    return Encoded(tuple(prompts), kept, sum(len(own) > max_tokens for own in ids), spelling)


def bucketed(
    prompts: Sequence[Sequence[int]], *, answers: Sequence[Sequence[int]] | None = None, batch_tokens: int
) -> list[Batch]:
    """Returns batches of similar length, the shortest first; every prompt, with its answer if any, is in one of them.

    A batch has at most ``batch_tokens`` places, padding included, if it has more than one sequence.
    """
    whole = [list(own) + list(more) for own, more in zip(prompts, answers or [()] * len(prompts), strict=True)]
    padded = np.array([padded_length(len(own)) for own in whole])
    batches = []
    for length in np.unique(padded):
        rows = np.flatnonzero(padded == length)
        size = max(1, batch_tokens // int(length))
        batches += [_batch(rows[i : i + size], whole, prompts, int(length)) for i in range(0, len(rows), size)]
    return batches


def padded_length(tokens: int) -> int:
    """Returns how many places a sequence of so many tokens takes with its padding."""
    return -(-tokens // _STEP) * _STEP


def _batch(rows: np.ndarray, whole: list[list[int]], prompts: Sequence[Sequence[int]], length: int) -> Batch:
    tokens = np.zeros((len(rows), length), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(whole[row])] = whole[row]
    lengths = np.array([len(whole[row]) for row in rows])
    mask = np.arange(length)[None] < lengths[:, None]
    return Batch(rows, tokens, mask, np.array([len(prompts[row]) for row in rows]))
