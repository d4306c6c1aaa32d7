"""Who says whether answers of a study's models refuse: the built-in rule, a function, or a file of verdicts.

The first judge decides; how far further ones agree with it is measured.
"""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from jaxsafety.config.names import check_name, nearest
from jaxsafety.formats import prompts, rows_file, rule_judge
from jaxsafety.formats.prompts import Prompt
from jaxsafety.formats.rule_judge import Verdict
from jaxsafety.subjects.checkpoint import RULE, Config, is_verdict_file

_SUCH = 'lines such as {"id": "tuned/0/17-1f2e3d4c", "verdict": "refused"}, with the ids of results/answers'


@dataclass(frozen=True)
class Answer:
    """What a model answered to a prompt; ``is_cut``, as nothing but the number of tokens has ended it.

    ``id`` names model, seed, place and answer: verdicts of another answer do not fit. ``given`` is what was put before
    the model's own words, which alone are judged.
    """

    id: str
    prompt: Prompt
    text: str
    is_cut: bool
    given: str = ""

    @property
    def asked(self) -> str:
        """What was asked, all turns of it."""
        return "\n".join(turn.content for turn in self.prompt.messages)

    def row(self, **more: Any) -> dict[str, Any]:
        """The answer as a line of JSON, with ``more`` of it."""
        given = {"given": self.given} if self.given else {}
        return prompts.as_row(self.prompt) | {"id": self.id} | given | {"answer": self.text} | more


def answer_id(model: str, seed: int, place: int | str, text: str) -> str:
    """Returns the id of what a model answered to the prompt of a place."""
    return f"{model}/{seed}/{place}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def of(about: Config) -> tuple[str, ...]:
    """Returns the judges of a study, at least one."""
    return about.judges or (RULE,)


def check(judges: Sequence[str]) -> None:
    """Checks that judges are there, and of files that they hold verdicts.

    Raises:
        ValueError: one is not.
    """
    if twice := next((judge for judge in judges if judges.count(judge) > 1), None):
        raise ValueError(f"judges: got {twice} twice, expected each once")
    for judge in judges:
        if is_verdict_file(judge) and not Path(judge).exists():
            hint = nearest(Path(judge).name, [RULE])
            raise ValueError(f"judges: no file of verdicts at {judge}: expected {RULE}, a function as "
                             f"package.module:name, or a file of {_SUCH}{hint}")  # fmt: skip
        if is_verdict_file(judge):
            _read(Path(judge))
        elif judge != RULE:
            _function(judge)


def verdicts(judge: str, answers: Sequence[Answer]) -> list[Verdict | None]:
    """Returns what a judge says of answers; None of one that a file says nothing of.

    Raises:
        ValueError: a function that says something else than refused, complied or other; a damaged file.
    """
    if judge == RULE:
        return [rule_judge.verdict(one.text, prompt=one.asked, is_cut=one.is_cut) for one in answers]
    if is_verdict_file(judge):
        told = _read(Path(judge))
        return [told.get(one.id) for one in answers]
    return [_checked(_says(judge, one.asked, one.text), f"verdict of {judge} on {one.id}") for one in answers]


def decided(judge: str, answers: Sequence[Answer]) -> list[Verdict]:
    """Returns what the judge that decides says of answers, all of them; for errors see :func:`verdicts`.

    Raises:
        ValueError: a file lacks some.
    """
    found = verdicts(judge, answers)
    if missing := [one.id for one, verdict in zip(answers, found, strict=True) if verdict is None]:
        raise ValueError(
            f"{judge} has no verdict on {len(missing)} of {len(answers)} answers, the first {missing[0]}: expected "
            "one on each, and then the same command"
        )
    return found


def _checked(verdict: Any, what: str) -> Verdict:
    check_name(what, verdict if isinstance(verdict, str) else rows_file.shown(verdict), get_args(Verdict))
    return verdict


@cache
def _says(judge: str, asked: str, text: str) -> Any:
    """What a function says of an answer, asked once: it may be a model behind a network."""
    return _function(judge)(asked, text)


def _function(judge: str) -> Callable[[str, str], str]:
    module, _, name = judge.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that it imports itself
        raise ValueError(f"judges: there is no module {module!r} on the path of Python, got {judge}") from error
    if not callable(found):
        raise ValueError(f"judges: module {module!r} has no function {name!r}, expected one of (prompt, answer)")
    return found


def _read(path: Path) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    for row, where in rows_file.rows(path, what="verdicts", such=_SUCH):
        for name in ("id", "verdict"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"{where} has no {name}: expected {_SUCH}")
        verdict = _checked(row["verdict"], f"verdict in {where}")
        if found.setdefault(row["id"], verdict) != verdict:
            raise ValueError(f"{where} has another verdict on {row['id']} than a line before: expected one")
    return found
