"""Text in NLTK's PCFG notation, read and spelled: ``v -> u t [0.5] | 'a' [0.5]``, a rule a line.

A right side is nonterminals and quoted letters, and may be empty; a probability that is not written is 0. A line that
ends in a backslash goes on in the next, ``#`` begins a comment line, ``%start v`` names the start symbol, which else is
the first left side. NLTK itself brings SciPy's statistics along, more than a second to import; it is the oracle of the
tests.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_NAME = re.compile(r"([\w/][\w/^<>-]*)\s*")
_ARROW = re.compile(r"\s*->\s*")
_PROBABILITY = re.compile(r"\[([\d.]+)\]\s*")
_LETTER = re.compile(r"""(?:"([^"]*)"|'([^']*)')\s*""")
_BAR = re.compile(r"\|\s*")


class Nonterminal(NamedTuple):
    """A nonterminal; a plain string is a letter."""

    name: str

    def __str__(self) -> str:
        return self.name


class Production(NamedTuple):
    """One alternative of a nonterminal, with its probability."""

    lhs: Nonterminal
    rhs: tuple[Nonterminal | str, ...]
    prob: float


def read(text: str, *, where: str) -> tuple[Nonterminal, list[Production]]:
    """Returns the start symbol and the productions of a text; messages call it ``where``.

    Raises:
        ValueError: there is no rule, or a line is not in this notation.
    """
    start, productions = None, []
    for number, line in _lines(text):
        try:
            if line.startswith("%"):
                start = _directive(line)
            else:
                productions += _rule(line)
        except ValueError as error:
            raise ValueError(f"{where} is not in NLTK's PCFG notation: line {number}, {line}: {error}") from error
    if not productions:
        raise ValueError(f"{where} is empty: expected rules in NLTK's PCFG notation, e.g. v -> u t [0.5] | 'a' [0.5]")
    return start or productions[0].lhs, productions


def nonterminals(production: Production) -> list[Nonterminal]:
    """Returns the nonterminals on the right side, in order."""
    return [symbol for symbol in production.rhs if isinstance(symbol, Nonterminal)]


def spell(production: Production) -> str:
    """Returns the production as a line that :func:`read` reads back exactly."""
    names = [str(s) if isinstance(s, Nonterminal) else f'"{s}"' if "'" in s else f"'{s}'" for s in production.rhs]
    return " ".join([str(production.lhs), "->", *names, f"[{np.format_float_positional(production.prob)}]"])


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that say something, by the number of their last."""
    begun = ""
    for number, line in enumerate(text.split("\n"), 1):
        whole = begun + line.strip()
        if not whole or whole.startswith("#"):
            continue
        if whole.endswith("\\"):
            begun = whole[:-1].rstrip() + " "
            continue
        begun = ""
        yield number, whole


def _directive(line: str) -> Nonterminal:
    name, *argument = line[1:].split(None, 1)
    found = _NAME.fullmatch(argument[0]) if argument else None
    if name != "start" or not found:
        raise ValueError("expected %start and a nonterminal")
    return Nonterminal(found[1])


def _rule(line: str) -> list[Production]:
    lhs, place = _nonterminal(line, 0)
    if not (arrow := _ARROW.match(line, place)):
        raise ValueError("expected an arrow after the left side")
    place, sides = arrow.end(), [([], 0.0)]
    while place < len(line):
        rhs, _ = sides[-1]
        if found := _PROBABILITY.match(line, place):
            sides[-1] = rhs, _share(found[1])
        elif found := _BAR.match(line, place):
            sides.append(([], 0.0))
        elif found := _LETTER.match(line, place):
            rhs.append(found[1] if found[2] is None else found[2])
        elif line[place] in "'\"":
            raise ValueError("unterminated string")
        else:
            symbol, place = _nonterminal(line, place)
            rhs.append(symbol)
            continue
        place = found.end()
    return [Production(lhs, tuple(rhs), probability) for rhs, probability in sides]


def _nonterminal(line: str, place: int) -> tuple[Nonterminal, int]:
    if not (found := _NAME.match(line, place)):
        raise ValueError(f"expected a nonterminal, got {line[place:] or 'the end'}")
    return Nonterminal(found[1]), found.end()


def _share(written: str) -> float:
    try:
        share = float(written)
    except ValueError:
        share = 2.0
    if share > 1:
        raise ValueError(f"expected a probability from 0 to 1, got [{written}]")
    return share
