"""Grammar text -> checked rules: one probability for each distinct alternative of a symbol.

Convention: rules are listed children first, every symbol after all that it uses; recursion is refused.
"""

import graphlib
import itertools
import math
from collections.abc import Sequence

from jaxsafety.config.names import nearest
from jaxsafety.world.pcfg_text import Nonterminal, Production, read, spell

# Larger merged rules would save few rounds and push the sampler's tables out of the processor's nearest cache.
_MAX_ALTERNATIVES = 64
_MAX_CHILDREN = 64
# Bounds the work on one rule before equal alternatives are merged.
_MAX_ENUMERATED = 4096
# How far the probabilities of a symbol may be from 1: NLTK's own tolerance.
_SUM_TOLERANCE = 0.01


Symbol = str | tuple[int, Nonterminal]  # a letter, or a nonterminal of PCFG p
Rules = dict[Symbol, dict[tuple[Symbol, ...], float]]


def parse(text: str, pcfg: int, *, where: str, alphabet: Sequence[str]) -> tuple[Symbol, Rules]:
    """Returns the start symbol of PCFG ``pcfg`` and its rules.

    Repeated alternatives are merged, probabilities normalised, impossible alternatives and unreachable symbols dropped.

    Raises:
        ValueError: see :func:`jaxsafety.world.grammar.compile_grammar`.
    """
    start, productions = read(text, where=where)
    _check_symbols(productions, where=where, alphabet=alphabet)
    weights: dict[Nonterminal, dict[tuple, float]] = {}
    for production in productions:
        alternatives = weights.setdefault(production.lhs, {})
        alternatives[production.rhs] = alternatives.get(production.rhs, 0.0) + production.prob
    if start not in weights:
        raise ValueError(f"{where}: no rule defines the start symbol {start}{nearest(start, weights)}")
    rules: Rules = {}
    for symbol, alternatives in weights.items():
        total = sum(alternatives.values())
        if abs(total - 1) >= _SUM_TOLERANCE:
            raise ValueError(f"{where}: the probabilities of {symbol} sum to {total:.6g}, expected 1")
        rules[pcfg, symbol] = {
            tuple((pcfg, s) if isinstance(s, Nonterminal) else s for s in rhs): weight / total
            for rhs, weight in alternatives.items()
            if weight > 0
        }
    return (pcfg, start), _children_first((pcfg, start), rules, where=where)


def spans(rules: Rules, alphabet: Sequence[str]) -> dict[Symbol, tuple[int, int]]:
    """Returns the letters in the shortest and longest string of every letter and symbol."""
    known: dict[Symbol, tuple[int, int]] = {letter: (1, 1) for letter in alphabet}
    for symbol, alternatives in rules.items():
        sides = [[known[child] for child in rhs] for rhs in alternatives]
        known[symbol] = (min(sum(s[0] for s in side) for side in sides), max(sum(s[1] for s in side) for side in sides))
    return known


def merge(start: Symbol, rules: Rules) -> Rules:
    """Returns an equivalent grammar of fewer levels: rules are composed while few alternatives result."""
    merged: Rules = {}
    for symbol, alternatives in rules.items():
        # A symbol that is always empty would be a child without letters, which no window can touch.
        visible: dict[tuple[Symbol, ...], float] = {}
        for rhs, weight in alternatives.items():
            kept = tuple(child for child in rhs if merged.get(child) != {(): 1.0})
            visible[kept] = visible.get(kept, 0.0) + weight
        merged[symbol] = _substitute(visible, merged) or visible
    return _children_first(start, merged, where="merged rules")


def _substitute(alternatives: dict[tuple[Symbol, ...], float], rules: Rules) -> dict[tuple[Symbol, ...], float] | None:
    sizes = [math.prod(len(rules[child]) for child in rhs if child in rules) for rhs in alternatives]
    if sum(sizes) > _MAX_ENUMERATED:
        return None
    result: dict[tuple[Symbol, ...], float] = {}
    for rhs, weight in alternatives.items():
        options = [rules[child].items() if child in rules else [((child,), 1.0)] for child in rhs]
        for parts in itertools.product(*options):
            whole = tuple(itertools.chain.from_iterable(part for part, _ in parts))
            result[whole] = result.get(whole, 0.0) + weight * math.prod(share for _, share in parts)
            if len(result) > _MAX_ALTERNATIVES or len(whole) > _MAX_CHILDREN:
                return None
    return result


def _children_first(start: Symbol, rules: Rules, *, where: str) -> Rules:
    """Returns the rules that ``start`` reaches, in topological order."""
    graph: dict[Symbol, list[Symbol]] = {}
    pending = [start]
    while pending:
        symbol = pending.pop()
        if symbol not in graph:
            graph[symbol] = [child for rhs in rules[symbol] for child in rhs if child in rules]
            pending.extend(graph[symbol])
    try:
        return {symbol: rules[symbol] for symbol in graphlib.TopologicalSorter(graph).static_order()}
    except graphlib.CycleError as error:
        cycle = " -> ".join(str(symbol[1]) for symbol in reversed(error.args[1]))
        raise ValueError(f"{where}: recursion without bound, {cycle}; strings must have bounded length") from error


def _check_symbols(productions: list[Production], *, where: str, alphabet: Sequence[str]) -> None:
    defined = {production.lhs: None for production in productions}
    for production in productions:
        for symbol in production.rhs:
            if isinstance(symbol, Nonterminal) and symbol not in defined:
                problem = f"uses {symbol}, which no rule defines{nearest(symbol, defined)}"
            elif not isinstance(symbol, Nonterminal) and symbol not in alphabet:
                problem = f"has the letter {symbol!r}, which is not in the alphabet{nearest(symbol, alphabet)}"
            else:
                continue
            raise ValueError(f"{where}: the rule {spell(production)} {problem}")
