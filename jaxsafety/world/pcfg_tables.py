"""Checked PCFG rules -> NumPy tables that a fixed number of gathers can draw from.

Convention: a *code* below the number of productions is a production already drawn, a code from there on is a symbol
yet to be drawn. Production 0 is padding without letters, production ``1 + a`` is letter ``a`` of the alphabet.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array

from jaxsafety.world.pcfg_rules import Rules, Symbol

# Symbols of unknown length that one draw may hold: more would make every draw slow without a word.
_MAX_WIDTH = 4096
_NEVER = np.iinfo(np.int32).max
# The tables of a grammar that its probabilities are in; all else follows from which derivations there are.
DRAWN = ("threshold", "choices")


@dataclass(frozen=True, eq=False)
class Children:
    """Child codes of every production: those of ``q`` are ``codes[offsets[q] : offsets[q + 1]]``."""

    codes: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, eq=False)
class Grammar:
    """Compiled PCFGs over one alphabet, those of one text condition; :func:`~.grammar.compile_grammar` makes one.

    Attributes:
        name: what messages call it.
        texts: the PCFGs in NLTK's notation.
        alphabet: the letters that samples index.
        starts: ``[p]`` int32, the start symbol's code of each PCFG.
        threshold: ``[symbol, column]`` uint32 alias table: the residual draw from which on the second choice holds.
        choices: ``[symbol, column, 2]`` int32, the two productions that share a column.
        lengths: ``[production]`` int32, letters of a production; 0 where later draws decide.
        child_ends: ``[production, child]`` int32, letters up to the end of that child.
        lazy: children before the window is placed: what has a known length stays as it is.
        eager: children after that.
        widths: codes held after each round before the window is placed.
        shortest: letters of the shortest production left by those rounds.
        stages: for each round after that, letters of the shortest child and the largest number of children.
        min_length: letters of the shortest string of any PCFG.
        max_length: letters of the longest.
    """

    name: str
    texts: tuple[str, ...]
    alphabet: tuple[str, ...]
    starts: np.ndarray
    threshold: np.ndarray | Array
    choices: np.ndarray | Array
    lengths: np.ndarray
    child_ends: np.ndarray
    lazy: Children
    eager: Children
    widths: tuple[int, ...]
    shortest: int
    stages: tuple[tuple[int, int], ...]
    min_length: int
    max_length: int


def tabulate(
    rules: Rules,
    starts: list[Symbol],
    spans: dict[Symbol, tuple[int, int]],
    *,
    name: str,
    texts: tuple[str, ...],
    alphabet: tuple[str, ...],
) -> Grammar:
    """Returns the tables of several PCFGs whose rules are listed together, children first within each.

    ``spans`` are the letters in the shortest and longest string of every letter and symbol.

    Raises:
        ValueError: a derivation holds too many symbols of unknown length.
    """
    known = {symbol for symbol, (shortest, longest) in spans.items() if shortest == longest}
    rows, code, whole, outcomes = _number(rules, known, alphabet)
    settled = [bool(row) and known.issuperset(row) for row in rows]
    eager = [[code[s] for s in row] if done else [] for row, done in zip(rows, settled, strict=True)]
    lazy = [[q] if settled[q] else [whole[s] if s in known else code[s] for s in row] for q, row in enumerate(rows)]
    widths, frontier = _lazy_rounds([code[s] for s in starts], lazy, outcomes, settled)
    if max(widths) > _MAX_WIDTH:
        raise ValueError(
            f"grammar {name!r}: a derivation holds up to {max(widths)} symbols before its length is known, "
            f"expected at most {_MAX_WIDTH}"
        )
    lengths = [sum(spans[s][0] for s in row) if done else 0 for row, done in zip(rows, settled, strict=True)]
    code_lengths = lengths + [spans[symbol][0] for symbol in rules]
    threshold, choices = _alias_tables(rules, outcomes[len(rows) :])
    return Grammar(
        name=name,
        texts=texts,
        alphabet=alphabet,
        starts=np.array([code[s] for s in starts], np.int32),
        threshold=threshold,
        choices=choices,
        lengths=np.array(lengths, np.int32),
        child_ends=_child_ends(eager, code_lengths),
        lazy=_ragged(lazy),
        eager=_ragged(eager),
        widths=widths,
        shortest=min((lengths[q] for q in frontier), default=1),
        stages=_eager_rounds(frontier, eager, outcomes, code_lengths, letter_count=len(alphabet)),
        min_length=min(spans[s][0] for s in starts),
        max_length=max(spans[s][1] for s in starts),
    )


def _number(
    rules: Rules, known: set[Symbol], alphabet: tuple[str, ...]
) -> tuple[list[tuple[Symbol, ...]], dict[Symbol, int], dict[Symbol, int], list[range]]:
    """Numbers the productions: their children, symbol -> code, symbol -> itself unexpanded, code -> productions."""
    rows: list[tuple[Symbol, ...]] = [(), *((letter,) for letter in alphabet)]
    whole: dict[Symbol, int] = {letter: 1 + a for a, letter in enumerate(alphabet)}
    options = []
    for symbol, alternatives in rules.items():
        if symbol in known:
            whole[symbol] = len(rows)
            rows.append((symbol,))
        options.append(range(len(rows), len(rows) + len(alternatives)))
        rows.extend(alternatives)
    code = {letter: whole[letter] for letter in alphabet} | {s: len(rows) + i for i, s in enumerate(rules)}
    return rows, code, whole, [range(q, q + 1) for q in range(len(rows))] + options


def _lazy_rounds(
    starts: list[int], lazy: list[list[int]], outcomes: list[range], settled: list[bool]
) -> tuple[tuple[int, ...], set[int]]:
    """Rounds until every length is known: codes held after each, and the productions that can be left."""
    first = frontier = set(itertools.chain.from_iterable(outcomes[code] for code in starts))
    widths, holds = [1], [1] * len(lazy)
    while not all(settled[q] for q in frontier):
        frontier = {q for parent in frontier for code in lazy[parent] for q in outcomes[code]}
        holds = [sum(max(holds[q] for q in outcomes[code]) for code in row) for row in lazy]
        widths.append(max(1, *(holds[q] for q in first)))
    return tuple(widths), frontier


def _eager_rounds(
    frontier: set[int], eager: list[list[int]], outcomes: list[range], code_lengths: list[int], *, letter_count: int
) -> tuple[tuple[int, int], ...]:
    """Rounds from placed productions down to letters: the shortest child and the most children of each."""
    stages = []
    while any(q > letter_count for q in frontier):
        codes = {code for q in frontier for code in eager[q]}
        stages.append((min(code_lengths[code] for code in codes), max(len(eager[q]) for q in frontier)))
        frontier = {q for code in codes for q in outcomes[code]}
    return tuple(stages)


def _alias_tables(rules: Rules, options: list[range]) -> tuple[np.ndarray, np.ndarray]:
    """Vose's alias tables, padded to a power of two of columns so that the high bits of one word pick a column."""
    columns = max(2, 1 << (max(len(row) for row in rules.values()) - 1).bit_length())
    threshold = np.full((len(rules), columns), 2**32 - 1, np.uint32)
    choices = np.empty((len(rules), columns, 2), np.int32)
    for i, alternatives in enumerate(rules.values()):
        share = np.zeros(columns)
        share[: len(alternatives)] = np.array(list(alternatives.values())) * columns
        choices[i] = options[i][0] + np.arange(columns)[:, None]
        poor = [column for column in range(columns) if share[column] < 1]
        rich = [column for column in range(columns) if share[column] >= 1]
        while poor and rich:
            column, donor = poor.pop(), rich[-1]
            threshold[i, column] = min(round(share[column] * 2**32), 2**32 - 1)
            choices[i, column, 1] = choices[i, donor, 0]
            share[donor] -= 1 - share[column]
            if share[donor] < 1:
                poor.append(rich.pop())
    return threshold, choices


def _child_ends(eager: list[list[int]], code_lengths: list[int]) -> np.ndarray:
    ends = np.full((len(eager), max(1, *map(len, eager))), _NEVER, np.int32)
    for q, row in enumerate(eager):
        ends[q, : len(row)] = np.cumsum([code_lengths[code] for code in row])
    return ends


def _ragged(rows: list[list[int]]) -> Children:
    codes = np.array(list(itertools.chain.from_iterable(rows)), np.int32)
    return Children(codes=codes, offsets=np.cumsum([0, *map(len, rows)]).astype(np.int32))
