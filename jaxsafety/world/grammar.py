"""Probabilistic context-free grammars: NLTK's PCFG notation -> compiled tables -> a jittable sampler of windows.

Rules are merged and, while few alternatives result, composed into larger ones, so that a draw takes few rounds. What
has a known length is left unexpanded until the window is placed; after that only what the window touches is expanded.

Convention: samples are indices into the grammar's alphabet, -1 beyond the window.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsafety.types import Key
from jaxsafety.world import pcfg_rules, pcfg_text, words
from jaxsafety.world.pcfg_rules import Rules, Symbol
from jaxsafety.world.pcfg_tables import Children, Grammar, tabulate

_MAX_LENGTH = words.BELOW - 1


def compose(upper: str, leaves: str, *, name: str = "upper rules") -> str:
    """Returns ``upper`` with those rules of ``leaves`` appended that it uses, directly or through them, but lacks.

    Both are in NLTK's PCFG notation; the first left side of ``upper`` stays the start symbol. Rules whose left side
    ``upper`` defines, and unused ones, are left out. Messages call ``upper`` by ``name``.

    Raises:
        ValueError: one of the two is not in NLTK's PCFG notation, or has no rules.
    """
    _, above = pcfg_text.read(upper, where=f"grammar {name!r}")
    _, below = pcfg_text.read(leaves, where=f"the leaf text for grammar {name!r}")
    defined = {production.lhs for production in above}
    wanted = set()
    pending = list(itertools.chain.from_iterable(map(pcfg_text.nonterminals, above)))
    while pending:
        symbol = pending.pop()
        if symbol not in defined | wanted:
            wanted.add(symbol)
            pending.extend(s for rule in below if rule.lhs == symbol for s in pcfg_text.nonterminals(rule))
    added = [pcfg_text.spell(rule) for rule in below if rule.lhs in wanted]
    return "\n".join([upper.rstrip("\n"), *added, ""])


def compile_grammar(texts: Sequence[str], *, name: str, alphabet: Sequence[str]) -> Grammar:
    """Returns the tables of several PCFGs, one text in NLTK's PCFG notation each; messages call them by ``name``.

    Alternatives that are listed twice are merged, probabilities are normalised (sums within 0.01 of 1 pass, as in
    NLTK), and nonterminals that the start symbol does not reach are dropped. The start symbol is the left side of the
    first rule, or what a ``%start`` line names. ``alphabet`` has every terminal; its order numbers the letters.

    Raises:
        ValueError: no texts, an empty text or alphabet, a line not in that notation, probabilities that do not sum
            to 1, an undefined nonterminal, a terminal outside the alphabet, recursion, or strings too long to sample.
    """
    alphabet = tuple(alphabet)
    if not texts:
        raise ValueError(f"grammar {name!r} has no PCFG: expected at least one text")
    if not alphabet or len(set(alphabet)) < len(alphabet):
        raise ValueError(f"grammar {name!r}: the alphabet must list distinct letters, got {alphabet}")
    rules: Rules = {}
    starts: list[Symbol] = []
    spans: dict[Symbol, tuple[int, int]] = {}
    for p, text in enumerate(texts):
        where = f"grammar {name!r}, PCFG {p + 1} of {len(texts)}"
        start, own = pcfg_rules.parse(text, p, where=where, alphabet=alphabet)
        spans |= pcfg_rules.spans(own, alphabet)
        if spans[start][1] > _MAX_LENGTH:
            raise ValueError(f"{where}: strings have up to {spans[start][1]} letters, expected at most {_MAX_LENGTH}")
        starts.append(start)
        rules |= pcfg_rules.merge(start, own)
    return tabulate(rules, starts, spans, name=name, texts=tuple(texts), alphabet=alphabet)


def together(grammars: Sequence[Grammar]) -> Grammar:
    """Returns one grammar with the PCFGs of several over one alphabet, in their order, which draws as each of them."""
    first, *others = grammars
    if not others:
        return first
    texts, name = [text for one in grammars for text in one.texts], " + ".join(one.name for one in grammars)
    return compile_grammar(texts, name=name, alphabet=first.alphabet)


def check_window(grammar: Grammar, *, max_window: int, trim: int = 0) -> None:
    """Checks that a window of ``max_window`` letters fits every string of the grammar.

    ``trim`` positions at the end are those where no window may start, besides the last one that fits.

    Raises:
        ValueError: the shortest string leaves no position to start at, or a number is out of range.
    """
    if max_window < 1 or trim < 0:
        raise ValueError(f"max_window must be at least 1 and trim at least 0, got {max_window} and {trim}")
    needed = max_window + trim + 1
    if grammar.min_length < needed:
        raise ValueError(
            f"grammar {grammar.name!r} is too short for windows of {max_window} letters with trim {trim}: "
            f"its shortest string has {grammar.min_length} letters, expected at least {needed}"
        )


def sample_window(
    grammar: Grammar, pcfg: Int[Array, ""], *, key: Key, min_window: int, max_window: int, trim: int = 0
) -> tuple[Int[Array, "w"], Int[Array, ""]]:
    """Draws one window of one fresh string.

    The length L is uniform over ``min_window..max_window`` and the start uniform over ``range(n - L - trim)``, n being
    the string's length; every draw is exact to 2^-32. Letters outside the window are never drawn. ``pcfg`` is clipped
    to ``range(len(grammar.starts))``; the grammar is static.

    Fidelity: faithful to the released generators, with ``trim`` 1 for their pretraining and 0 for their fine-tuning;
    as there, no window contains the last letter of its string.

    Returns:
        ``[w]`` int32 indices into the alphabet, w = ``max_window``, -1 from L on; and ``[]`` int32 L.

    Raises:
        ValueError: the window does not fit the grammar, or ``min_window`` is not in ``1..max_window``.

    References:
        Jain et al., What Makes and Breaks Safety Fine-tuning? (arXiv 2407.10264); M. D. Vose, A linear algorithm for
        generating random numbers with a given distribution (1991), for the alias tables.
    """
    check_window(grammar, max_window=max_window, trim=trim)
    if not 1 <= min_window <= max_window:
        raise ValueError(f"min_window must be in 1..{max_window} (max_window), got {min_window}")
    counts = _window_counts(grammar, max_window)
    sizes = [1, 1, *grammar.widths, *counts[1:-1]]
    drawn = jnp.split(words.draw(key, count=sum(sizes)), np.cumsum(sizes)[:-1])
    window = min_window + words.below(drawn[0][0], max_window - min_window + 1)

    productions = _draw(
        grammar, jnp.asarray(grammar.starts)[jnp.clip(pcfg, 0, len(grammar.starts) - 1)][None], drawn[2]
    )
    for width, bits in zip(grammar.widths[1:], drawn[3:], strict=False):
        productions = _draw(grammar, _place(grammar.lazy, productions, jnp.int32(0), width), bits)

    ends = jnp.cumsum(_look_up(grammar.lengths, productions))
    first, offset = _locate(ends, words.below(drawn[1][0], ends[-1] - window - trim))
    productions = jnp.take(productions, first + jnp.arange(counts[0]), mode="clip")
    for stage, count in enumerate(counts[1:]):
        first, offset = _locate(_look_up(grammar.child_ends, productions[0]), offset)
        productions = _place(grammar.eager, productions, first, count)
        if stage < len(counts) - 2:
            productions = _draw(grammar, productions, drawn[2 + len(grammar.widths) + stage])
    return jnp.where(jnp.arange(max_window) < window, productions - 1, -1), window


def _window_counts(grammar: Grammar, window: int) -> list[int]:
    """Most consecutive items that a window can touch: productions when it is placed, then children of each round."""
    counts = [min(grammar.widths[-1], 1 + -(-(window - 1) // grammar.shortest))]
    for shortest, most in grammar.stages:
        counts.append(min(counts[-1] * most, 1 + -(-(window - 1) // shortest)))
    return counts


def _draw(grammar: Grammar, codes: Array, bits: Array) -> Array:
    """Replaces every symbol code by a production: the high bits pick a column of the alias table, the rest a side."""
    production_count, columns = len(grammar.lengths), grammar.threshold.shape[1]
    column_bits = columns.bit_length() - 1
    column = (bits >> (32 - column_bits)).astype(jnp.int32)
    cell = jnp.maximum(codes - production_count, 0) * columns + column
    second = (bits << column_bits) >= _look_up(grammar.threshold.ravel(), cell)
    drawn = _look_up(grammar.choices.ravel(), 2 * cell + second.astype(jnp.int32))
    return jnp.where(codes < production_count, codes, drawn)


def _place(children: Children, productions: Array, first: Array, width: int) -> Array:
    """Returns ``width`` codes of the concatenated children, from the ``first`` on; padding after the last."""
    begin = _look_up(children.offsets, productions)
    ends = jnp.cumsum(_look_up(children.offsets, productions + 1) - begin)
    # Child j of the row lies at begin - (children before its parent) + j: gather that shift by adding up its steps,
    # because a gather from a per-sample array is slower than these few comparisons.
    shift = begin - jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    slot = first + jnp.arange(width)
    steps = jnp.where(ends[None, :-1] <= slot[:, None], jnp.diff(shift)[None, :], 0)
    source = jnp.minimum(slot + shift[0] + steps.sum(axis=1), len(children.codes) - 1)
    return jnp.where(slot < ends[-1], _look_up(children.codes, source), 0)


def _locate(ends: Array, position: Array) -> tuple[Array, Array]:
    """Returns which item ``position`` falls in, and its offset there, from the ends of consecutive items."""
    passed = ends <= position
    return passed.sum(), position - jnp.where(passed, ends, 0).max()


def _look_up(table: np.ndarray | Array, index: Array) -> Array:
    # Every index is in bounds by construction; clamping costs a fifth of the sampler's time.
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
