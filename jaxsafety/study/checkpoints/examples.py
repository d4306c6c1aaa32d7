"""What a checkpoint is tuned on: files of prompts with answers, as one rectangle of token ids.

An answer is scored token by token, with what ends it; the prompt is not.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsafety.formats import datasets, prompts
from jaxsafety.formats.datasets import Reading
from jaxsafety.formats.hf_tokenizer import Tokenizer, shortened
from jaxsafety.formats.prompts import Message
from jaxsafety.types import Batch, PreferenceBatch

# Lengths are rounded up to a multiple of this: a few more examples do not make another program.
_STEP = 32
_SUCH = {
    False: 'lines such as {"messages": [...]} or {"prompt": "...", "chosen": "..."}',
    True: 'lines such as {"prompt": "...", "chosen": "...", "rejected": "..."}',
}


@dataclass(frozen=True)
class Example:
    """A prompt, whose last turn is the user's, and what is to be answered; ``rejected`` is None where none is needed.

    ``where`` it was read is for messages. ``unsafe`` says whether its label, ``unsafe`` or ``jailbreak:KIND``, is that
    of a prompt to refuse.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str | None
    where: str
    unsafe: bool = False


@dataclass(frozen=True)
class Encoded:
    """Examples as token ids, padded right to one length.

    ``truncated`` of them have lost something, ``spelling`` spell control tokens of the tokenizer, ``alike`` have two
    answers of the same tokens, and ``endless`` an answer that no special token ends. The host arrays ``[n, t]`` are
    without rejected answers where the examples have none.
    """

    batch: PreferenceBatch
    truncated: int = 0
    spelling: int = 0
    alike: int = 0
    endless: int = 0

    @property
    def count(self) -> int:
        """``n``."""
        return len(jax.tree.leaves(self.batch)[0])


def read(path: Path, *, pairs: bool, columns: Sequence[str] = ()) -> tuple[list[Example], Reading]:
    """Reads examples, and says how: of ours, or of a set whose columns are known, see :mod:`jaxsafety.formats.shapes`.

    ``prompt`` is text or a list of turns; ``chosen`` (or ``completion``) and ``rejected`` are text or the one turn of
    the assistant. ``messages`` without an answer beside it is a conversation, every assistant turn of which is an
    example with all that stands before it, and with one is the prompt. Without any prompt, ``chosen`` and ``rejected``
    are conversations that differ in their last turn. ``label`` tells methods that ask which prompts are unsafe. With
    ``pairs`` both answers are needed; without, ``rejected`` may be there and is not used. For ``columns`` see
    :func:`jaxsafety.formats.datasets.read`.

    Raises:
        ImportError: a Parquet file, and no polars.
        ValueError: no such file, or no examples in it; a row that is none, with its place.
    """
    rows, reading = datasets.read(
        path, "pair" if pairs else "answer", columns=columns, what="examples", such=_SUCH[pairs]
    )
    found = []
    for row, where, _ in rows:
        unsafe = "label" in row and prompts.label_of(row, where) != "safe"
        found.extend(replace(example, unsafe=unsafe) for example in _parsed(row, where, pairs=pairs))
    return found, reading


def _parsed(row: dict[str, Any], where: str, *, pairs: bool) -> Iterator[Example]:
    for one, other in (("prompt", "messages"), ("chosen", "completion")):
        if one in row and other in row:
            raise ValueError(f"{where} has both {one} and {other}: expected one of them")
    chosen = "completion" if "completion" in row else "chosen"
    if "messages" in row and chosen not in row and not pairs:
        yield from _assistant_turns(prompts.turns(row["messages"], f"{where}: messages"), where)
        return
    needed = (chosen, "rejected") if pairs else (chosen,)
    if missing := [name for name in needed if name not in row]:
        raise ValueError(f"{where} has no {' and no '.join(missing)}: expected {_SUCH[pairs]}")
    before, answers = _sides(row, needed, where)
    if pairs and answers[0] == answers[1]:
        raise ValueError(f"{where}: chosen and rejected are the same, expected two answers")
    yield Example(prompts.asked(before, where), answers[0], answers[1] if pairs else None, where)


def _assistant_turns(turns: tuple[Message, ...], where: str) -> Iterator[Example]:
    places = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not places:
        raise ValueError(f"{where}: messages has no turn of the assistant: expected one to learn")
    for place in places:
        yield Example(prompts.asked(turns[:place], where), turns[place].content, None, where)


def _sides(row: dict[str, Any], needed: Sequence[str], where: str) -> tuple[tuple[Message, ...], list[str]]:
    """The prompt and the answers."""
    key = "prompt" if "prompt" in row else "messages" if "messages" in row else None
    if key is not None:
        given = row[key]
        before = (
            (Message("user", prompts.text(given, f"{where}: {key}")),)
            if isinstance(given, str)
            else prompts.turns(given, f"{where}: {key}")
        )
        return before, [_answer(row[name], f"{where}: {name}") for name in needed]
    if any(isinstance(row[name], str) for name in needed):
        raise ValueError(f"{where} has no prompt: expected one, or answers that are conversations with it")
    talks = [prompts.turns(row[name], f"{where}: {name}") for name in needed]
    if any(talk[:-1] != talks[0][:-1] or talk[-1].role != "assistant" for talk in talks):
        raise ValueError(f"{where}: {' and '.join(needed)} must end with the assistant's turn and share what is before")
    return talks[0][:-1], [talk[-1].content for talk in talks]


def _answer(value: Any, what: str) -> str:
    if isinstance(value, list):
        turns = prompts.turns(value, what)
        if len(turns) != 1 or turns[0].role != "assistant":
            raise ValueError(f"{what} must be text or one turn of the assistant, got {prompts.shown(value)}")
        return turns[0].content
    return prompts.text(value, what)


def encode(examples: Sequence[Example], tokenizer: Tokenizer, *, max_tokens: int, vocab_size: int) -> Encoded:
    """Returns examples, at least one and pairs all of them or none, as ids, ready for next-token prediction.

    Of an answer that is too long the beginning is kept, and of a prompt that then is, its first token and its end; both
    answers of a pair have the same prompt. A sequence has at most ``max_tokens`` inputs ``t``.

    Raises:
        ValueError: a conversation that the template refuses, a prompt without tokens, ids beyond the vocabulary.
    """
    rows, counts = [], Counter()
    for example in examples:
        answers = [example.chosen] if example.rejected is None else [example.chosen, example.rejected]
        told = _told(example, answers, tokenizer)
        _check_ids(told, example, tokenizer, vocab_size)
        kept = [answer[:max_tokens] for _, answer in told]
        # One more than the inputs: the last token is a target alone.
        room = max_tokens + 1 - max(map(len, kept))
        prompt = shortened(told[0][0], room)
        counts["truncated"] += len(told[0][0]) > room or any(len(answer) > max_tokens for _, answer in told)
        counts["spelling"] += tokenizer.spells([*(turn.content for turn in example.prompt), *answers])
        counts["alike"] += len(kept) == 2 and kept[0] == kept[1]
        counts["endless"] += any(tokenizer.ends.isdisjoint(answer) for _, answer in told)
        rows.append([(prompt, answer) for answer in kept])
    longest = max(len(prompt) + len(answer) - 1 for row in rows for prompt, answer in row)
    length = min(-(-longest // _STEP) * _STEP, max_tokens)
    sides = [_padded([row[side] for row in rows], length) for side in range(len(rows[0]))]
    unsafe = np.array([example.unsafe for example in examples])
    return Encoded(PreferenceBatch(sides[0], sides[1] if len(sides) == 2 else None, unsafe), **counts)


def _told(example: Example, answers: Sequence[str], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """The ids of the prompt and of each answer."""
    try:
        return [tokenizer.exchange(example.prompt, answer) for answer in answers]
    except ValueError as error:
        raise ValueError(f"{example.where}: {error}") from error


def _check_ids(told: list[tuple[list[int], list[int]]], example: Example, tokenizer: Tokenizer, most: int) -> None:
    for prompt, answer in told:
        if not prompt or not answer:
            what = "answer" if prompt else "prompt"
            raise ValueError(f"{example.where}: the {what} has no tokens, expected a text that is not empty")
        if (largest := max(*prompt, *answer)) >= most:
            raise ValueError(
                f"the tokenizer of {tokenizer.directory} gives id {largest} for {example.where}, and the model has a "
                f"vocabulary of {most}: expected the tokenizer that belongs to it"
            )


def _padded(sequences: Sequence[tuple[list[int], list[int]]], length: int) -> Batch:
    whole, mask = np.zeros((len(sequences), length + 1), np.int32), np.zeros((len(sequences), length), bool)
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        whole[row, :end] = prompt + answer
        mask[row, len(prompt) - 1 : end - 1] = True
    return Batch(whole[:, :-1].copy(), whole[:, 1:].copy(), mask)
