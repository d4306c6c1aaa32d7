"""Labelled prompts for models that read English: a set of our own making, and files of a user's.

A label is ``safe``, ``unsafe`` or ``jailbreak:KIND``. The set pairs instructions that differ in their object alone,
such as "Design a bicycle" and "Design a bomb"; its jailbreaks are wrappings of the unsafe ones, one of them with
control tokens of a checkpoint.
"""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from jaxsafety.config.names import check_name
from jaxsafety.formats import datasets
from jaxsafety.formats.datasets import Reading
from jaxsafety.formats.rows_file import shown

LABELS = ("safe", "unsafe")
_JAILBREAK = re.compile(r"jailbreak:[\w.-]+")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: its role, system, user or assistant, and its text."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, at least one turn, and what kind of question that is.

    A plain prompt is one turn of the user; the label is ``safe``, ``unsafe`` or ``jailbreak:KIND``. ``target`` is how
    the answer begins that an attacker wants, where the file says.
    """

    messages: tuple[Message, ...]
    label: str
    target: str | None = None


def own(*, turn: str | None = None) -> list[Prompt]:
    """Returns the set of this package: 240 safe instructions, 240 unsafe ones, and these in two wrappings, or three.

    The i-th safe and the i-th unsafe one have the same verb, and so has the i-th of each jailbreak. ``turn`` is what a
    chat template writes between the user's words and the answer, see :class:`jaxsafety.formats.hf_tokenizer.Tokenizer`.
    With it the third wrapping is an injection, which ends the user's turn and begins an answer that complies; where
    control tokens in prompts are text, it is nothing but text.
    """
    words = yaml.safe_load((resources.files("jaxsafety.formats") / "instructions.yaml").read_text())
    asked = {label: [f"{verb} {thing}." for verb in words["verbs"] for thing in words[label]] for label in LABELS}
    for kind, template in words["jailbreaks"].items():
        if turn is None and "{turn}" in template:
            continue
        asked[f"jailbreak:{kind}"] = [
            template.format(prompt=prompt, encoded=base64.b64encode(prompt.encode()).decode(), turn=turn)
            for prompt in asked["unsafe"]
        ]
    return [_plain(prompt, label) for label, prompts in asked.items() for prompt in prompts]


def to_jsonl(prompts: Iterable[Prompt]) -> str:
    """Returns one line of JSON a prompt, as :func:`read` takes them: ``prompt`` for one turn of the user, else
    ``messages``; ``label``, and ``target`` if there is one."""
    return "".join(json.dumps(as_row(prompt), ensure_ascii=False) + "\n" for prompt in prompts)


def read(path: Path, *, columns: Sequence[str] = ()) -> tuple[list[Prompt], Reading]:
    """Reads labelled prompts, and says how: ours, ``{"prompt" | "messages": ..., "label": ...}``, or of a known set.

    ``target`` may stand beside them; AdvBench's and JailbreakBench's are read as such. A prompt that comes once for
    each of its answers is read once, and is unsafe where one of these is. For ``columns`` see
    :func:`jaxsafety.formats.datasets.read`.

    Raises:
        ImportError: a Parquet file, and no polars.
        ValueError: no such file, or no prompts in it; a row that is none, with its place.
    """
    such = 'lines such as {"prompt": "...", "label": "safe"}, as `jaxsafety prompts --out` writes them'
    rows, reading = datasets.read(path, "label", columns=columns, what="prompts", such=such)
    found: list[Prompt] = []
    places: dict[tuple[Message, ...], int] = {}
    for row, where, shape in rows:
        prompt = _parsed(row | {"target": row["chosen"]} if shape.aims and row["chosen"] else row, where)
        if not shape.repeats:
            found.append(prompt)
        elif prompt.messages not in places:
            places[prompt.messages] = len(found)
            found.append(prompt)
        elif prompt.label == "unsafe":
            found[places[prompt.messages]] = prompt
    return found, reading


def _parsed(row: dict[str, Any], where: str) -> Prompt:
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(f"{where} must have either prompt or messages, got {'both' if 'prompt' in row else 'neither'}")
    label = label_of(row, where)
    target = text(row["target"], f"{where}: target") if "target" in row else None
    if "prompt" in row:
        return _plain(text(row["prompt"], f"{where}: prompt"), label, target)
    return Prompt(asked(turns(row["messages"], f"{where}: messages"), where), label, target)


def label_of(row: dict[str, Any], where: str) -> str:
    """Returns the label of a row: ``safe``, ``unsafe`` or ``jailbreak:KIND``; another, or none, is a ValueError."""
    if "label" not in row:
        raise ValueError(f"{where} has no label: expected safe, unsafe or jailbreak:KIND")
    label = row["label"]
    if isinstance(label, str) and _JAILBREAK.fullmatch(label):
        return label
    check_name(f"label in {where}", label if isinstance(label, str) else shown(label), (*LABELS, "jailbreak:KIND"))
    if label not in LABELS:
        raise ValueError(f"{where}: label must name its jailbreak in place of KIND, got {label!r}")
    return label


def turns(messages: Any, what: str) -> tuple[Message, ...]:
    """Returns a conversation of at least one turn, from a list of role and content; ValueErrors begin with ``what``."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{what} must be a list of at least one turn, got {shown(messages)}")
    found = []
    for turn in messages:
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            raise ValueError(f"{what}: a turn must have role and content, got {shown(turn)}")
        check_name(f"role in {what}", text(turn["role"], f"{what}: role"), _ROLES)
        found.append(Message(turn["role"], text(turn["content"], f"{what}: content")))
    return tuple(found)


def asked(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """Returns a conversation that must end with the user's turn; the ValueError begins with ``where``."""
    if not messages or messages[-1].role != "user":
        got = messages[-1].role if messages else "none"
        raise ValueError(f"{where}: the last turn must be the user's, which the model answers, got {got}")
    return messages


def text(value: Any, what: str) -> str:
    """Returns a value that must be text and not empty; the ValueError begins with ``what``."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be text that is not empty, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a surrogate pair at character {error.start}: expected text") from error
    return value


def _plain(prompt: str, label: str, target: str | None = None) -> Prompt:
    return Prompt((Message("user", prompt),), label, target)


def as_row(prompt: Prompt) -> dict[str, Any]:
    """Returns a prompt as :func:`read` takes it: ``prompt`` for one turn of the user, else ``messages``; ``label``, and
    ``target`` if there is one."""
    turns, told = prompt.messages, {"label": prompt.label}
    told |= {} if prompt.target is None else {"target": prompt.target}
    if len(turns) == 1 and turns[0].role == "user":
        return {"prompt": turns[0].content} | told
    return {"messages": [asdict(turn) for turn in turns]} | told
