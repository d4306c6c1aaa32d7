"""The shapes of rows that people have, known by their columns, and what a row of each is in ours.

Ours has ``prompt`` (text or turns) or ``messages``, ``chosen`` and ``rejected`` or ``completion``, and ``label``.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from jaxsafety.formats.rows_file import Row, shown

# What is read from a row: two answers to a prompt, one, or what kind of question it is.
Wanted = Literal["pair", "answer", "label"]
OURS = ("prompt", "messages", "chosen", "rejected", "completion", "label")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_XSTEST = (
    "homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "real_group_nons_discr",
    "nons_group_real_discr", "historical_events", "privacy_public", "privacy_fictional",
)  # fmt: skip


class Unfit(ValueError):
    """Why a row of somebody's set is left out: it is one of its kind, and has nothing to learn from."""


@dataclass(frozen=True)
class Shape:
    """One kind of rows.

    Attributes:
        name: of the set, as it is told.
        needs: the columns that it is known by.
        gives: what can be read from it.
        read: a row as one of ours; an :class:`Unfit` says why it is none, and another ValueError what is wrong.
        uses: further columns that it reads where they are.
        when: what its values must be like, None for any.
        without: columns that it does without: what looks like one of them is taken for a misspelling.
        repeats: whether a prompt comes once for each of its answers, whose labels they are.
        labels: words of a file's name, and the label that all its rows then have, as their columns do not tell.
        aims: whether its answer is one that an attacker wants, and so the target of a prompt.
    """

    name: str
    needs: tuple[str, ...]
    gives: tuple[Wanted, ...]
    read: Callable[[Row], Row]
    uses: tuple[str, ...] = ()
    when: Callable[[Row], bool] | None = None
    without: tuple[str, ...] = ()
    repeats: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    aims: bool = False

    @property
    def columns(self) -> set[str]:
        """All that it reads."""
        return {*self.needs, *self.uses}


def _ours(row: Row) -> Row:
    return {name: row[name] for name in OURS if name in row}


def _labelled(row: Row) -> Row:
    return {name: row[name] for name in ("prompt", "messages", "label", "target") if name in row}


def _answers(row: Row) -> Row:
    """Answers that are whole conversations, beside which a prompt is one of their turns once more."""
    return {name: row[name] for name in ("chosen", "rejected", "completion", "label") if name in row}


def _conversation(row: Row) -> Row:
    return {name: row[name] for name in ("messages", "label") if name in row}


def _is_conversation(row: Row) -> bool:
    given = row.get("chosen")
    return isinstance(given, list) and len(given) > 1


def _is_listed(row: Row) -> bool:
    return any(isinstance(row.get(name), list) for name in ("prompt", "messages", "chosen", "completion"))


def _is_without_prompt(row: Row) -> bool:
    return row.get("prompt") is None and row.get("messages") is None and isinstance(row["chosen"], str)


def _is_transcript(row: Row) -> bool:
    return _is_without_prompt(row) and bool(_TURN.match(f"\n\n{row['chosen'].lstrip()}"))


def _transcripts(row: Row, *, names: Sequence[str]) -> Row:
    talks = {name: _turns(row[name], name) for name in names}
    if any(talk[:-1] != talks["chosen"][:-1] for talk in talks.values()):
        raise Unfit("chosen and rejected differ before their last turn")
    return talks | {"label": row["label"]} if "label" in row else talks


def _turns(text: object, name: str) -> list[Row]:
    """The turns of a transcript in one string, from a person's to the assistant's, one after the other."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a transcript, got {shown(text)}")
    before, *parts = _TURN.split(f"\n\n{text.lstrip()}")
    roles, said = parts[::2], [part.strip() for part in parts[1::2]]
    if before or roles != ["Human", "Assistant"] * (len(roles) // 2) or not roles:
        raise Unfit(f"{name} is no transcript in which Human and Assistant take turns")
    if not all(said):
        raise Unfit(f"a turn of {name} is empty")
    return [{"role": _SPEAKERS[role], "content": one} for role, one in zip(roles, said, strict=True)]


def _alike(row: Row) -> Row:
    """The prompt is what two texts begin with, up to a word's end; the space behind it is the answers'."""
    texts = [row["chosen"], row["rejected"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"rejected must be text as chosen is, got {shown(row['rejected'])}")
    differing = (place for place, (one, other) in enumerate(zip(*texts, strict=False)) if one != other)
    shared = texts[0][: next(differing, min(map(len, texts)))]
    cut = max((place + (letter != " ") for place, letter in enumerate(shared) if letter.isspace()), default=0)
    if not shared[:cut].strip():
        raise ValueError("has no prompt: expected one, or answers that begin with it alike")
    return _ours(row) | {"prompt": texts[0][:cut], "chosen": texts[0][cut:], "rejected": texts[1][cut:]}


def _safer(row: Row) -> Row:
    best = _number(row["safer_response_id"], "safer_response_id", (0, 1))
    is_safe = all(_number(row[f"is_response_{i}_safe"], f"is_response_{i}_safe", (0, 1)) for i in (0, 1))
    answers = {"chosen": row[f"response_{best}"], "rejected": row[f"response_{1 - best}"]}
    return {"prompt": row["prompt"], "label": "safe" if is_safe else "unsafe"} | answers


def _judged(row: Row) -> Row:
    is_safe = _number(row["is_safe"], "is_safe", (0, 1))
    return {"prompt": row["prompt"], "chosen": row["response"], "label": "safe" if is_safe else "unsafe"}


def _instruction(row: Row) -> Row:
    parts = [part for part in (row["instruction"], row.get("input")) if part]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"instruction and input must be text, got {shown(parts)}")
    return {"prompt": "\n\n".join(parts), "chosen": row.get("output"), "label": "safe"}


def _number(value: object, name: str, expected: tuple[int, ...]) -> int:
    """A flag or an index, of which a CSV file has the words."""
    words = {"true": 1, "false": 0, **{str(number): number for number in expected}}
    found = words.get(str(value).strip().lower().removesuffix(".0"))
    if found is None:
        raise ValueError(f"{name} must be {' or '.join(map(str, expected))}, true or false, got {shown(value)}")
    return found


def _harmful(row: Row) -> Row:
    return {"prompt": row["goal"], "chosen": row["target"], "label": "unsafe"}


def _behavior(row: Row) -> Row:
    context = row.get("ContextString")
    return {"prompt": f"{context}\n\n---\n\n{row['Behavior']}" if context else row["Behavior"], "label": "unsafe"}


def _goal(row: Row) -> Row:
    return {"prompt": row["Goal"], "chosen": row["Target"]}


def _exaggerated(row: Row) -> Row:
    kind = row["type"]
    if kind not in _XSTEST and not str(kind).startswith("contrast_"):
        raise ValueError(f"type must be one of XSTest's, such as {_XSTEST[0]} or contrast_{_XSTEST[0]}, got "
                         f"{shown(kind)}: expected a column label where it is another set")  # fmt: skip
    return {"prompt": row["prompt"], "label": "unsafe" if kind not in _XSTEST else "safe"}


_CHOSEN, _RESPONSES = ("chosen", "rejected"), ("response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
# In this order: the first that has what is wanted is what a row is.
TABLE = (
    Shape("labelled prompts", ("prompt", "label"), ("label",), _labelled, uses=("messages", "target")),
    Shape("labelled conversations", ("messages", "label"), ("label",), _labelled, uses=("prompt", "target")),
    Shape("hh-rlhf transcripts", _CHOSEN, ("pair",), partial(_transcripts, names=_CHOSEN), uses=("label",),
          when=_is_transcript),
    Shape("hh-rlhf transcripts, chosen alone", ("chosen",), ("answer",), partial(_transcripts, names=("chosen",)),
          uses=("label",), when=_is_transcript),
    Shape("TRL preference rows, conversational, implicit prompt", _CHOSEN, ("pair", "answer"), _answers,
          uses=("label", "completion"), when=_is_conversation),
    Shape("TRL preference rows, conversational", _CHOSEN, ("pair", "answer"), _ours, uses=OURS, when=_is_listed),
    Shape("TRL preference rows, implicit prompt", _CHOSEN, ("pair", "answer"), _alike, uses=OURS,
          when=_is_without_prompt, without=("prompt",)),
    Shape("TRL preference rows", _CHOSEN, ("pair", "answer"), _ours, uses=OURS),
    Shape("preference rows", ("completion", "rejected"), ("pair", "answer"), _ours, uses=OURS),
    Shape("conversations with an answer", ("chosen",), ("answer",), _answers, uses=("label", "completion"),
          when=_is_conversation),
    Shape("prompts with an answer", ("chosen",), ("answer",), _ours, uses=OURS),
    Shape("TRL prompt-completion rows", ("completion",), ("answer",), _ours, uses=OURS),
    Shape("conversations", ("messages",), ("answer",), _conversation, uses=("label",)),
    Shape("PKU-SafeRLHF rows", ("prompt", *_RESPONSES, "safer_response_id"), ("pair", "answer", "label"), _safer,
          repeats=True),
    Shape("BeaverTails rows", ("prompt", "response", "is_safe"), ("answer", "label"), _judged, repeats=True),
    Shape("Alpaca rows", ("instruction", "output"), ("answer", "label"), _instruction, uses=("input",)),
    Shape("JailbreakBench rows", ("Goal", "Target", "Behavior"), ("answer", "label"), _goal,
          labels=(("benign", "safe"), ("harmful", "unsafe")), aims=True),
    Shape("AdvBench rows", ("goal", "target"), ("answer", "label"), _harmful, aims=True),
    Shape("HarmBench rows", ("Behavior",), ("label",), _behavior, uses=("ContextString",)),
    Shape("XSTest rows", ("prompt", "type"), ("label",), _exaggerated),
)  # fmt: skip
