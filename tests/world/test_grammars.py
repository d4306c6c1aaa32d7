"""Facts about the grammar files that ship: lengths, and which n-grams tell PCFGs and text conditions apart."""

from functools import cache
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nltk.grammar import PCFG, Nonterminal

from jaxsafety.world import grammar

PCFGS = {"paper": 4, "tiny": 2}
ALPHABETS = {
    "paper": (*(f"2{chr(97 + i)}" for i in range(26)), "3a", "3b", "3c", "3d"),
    "tiny": tuple("abcdefghijkl"),
}
WINDOWS = {"paper": (25, 35), "tiny": (6, 8)}
CONDITIONS = ("full", "safe", "unsafe", "intermediate", "id_mg", "ood_mg")
UNSAFE = ("unsafe", "id_mg", "ood_mg")
FOLDER = resources.files("jaxsafety.world") / "grammars"


@cache
def texts(world, condition):
    upper = (FOLDER / world / f"upper_{condition}.pcfg").read_text()
    leaves = [(FOLDER / world / f"leaves_{p + 1}.pcfg").read_text() for p in range(PCFGS[world])]
    return [grammar.compose(upper, leaf) for leaf in leaves]


@cache
def compiled(world, condition):
    return grammar.compile_grammar(texts(world, condition), name=f"{world}/{condition}", alphabet=ALPHABETS[world])


def join(left, right, n):
    """(short strings, prefixes, suffixes, factors) of the concatenation of two languages, n letters at most each."""
    whole, prefixes, suffixes, factors = set(), set(left[1]), set(right[2]), left[3] | right[3]
    ends, starts = left[0] | left[2], right[0] | right[1]
    # Many ends differ only in letters that an n-gram across the border does not reach.
    for i in range(1, n):
        before, after = {a[-i:] for a in ends if len(a) >= i}, {b[: n - i] for b in starts if len(b) >= n - i}
        factors.update(a + b for a in before for b in after)
    for joined in (a + b for a in left[0] for b in starts):
        (prefixes if len(joined) >= n - 1 else whole).add(joined[: n - 1])
    suffixes.update((a + b)[1 - n :] for a in ends for b in right[0] if len(a) + len(b) >= n - 1)
    return whole, prefixes, suffixes, factors


@cache
def factors(world, condition, pcfg, n):
    """Every n-gram of every string of the language: exact, by the prefixes and suffixes of each symbol."""
    parsed = PCFG.fromstring(texts(world, condition)[pcfg])

    @cache
    def of(symbol):
        if not isinstance(symbol, Nonterminal):
            return {(symbol,)}, set(), set(), set()
        result = (set(), set(), set(), set())
        for production in parsed.productions(lhs=symbol):
            sequence = ({()}, set(), set(), set())
            for child in production.rhs():
                sequence = join(sequence, of(child), n)
            result = tuple(a | b for a, b in zip(result, sequence, strict=True))
        return result

    return of(parsed.start())[3]


def union(world, conditions, n):
    return set().union(*(factors(world, c, p, n) for c in conditions for p in range(PCFGS[world])))


@cache
def sampler(world, condition):
    low, high = WINDOWS[world]
    trim = int(condition == "full")

    def one(pcfg, key):
        return grammar.sample_window(
            compiled(world, condition), pcfg, key=key, min_window=low, max_window=high, trim=trim
        )

    return jax.jit(jax.vmap(one, in_axes=(None, 0)))


@cache
def drawn(world, condition, pcfg, seed=0):
    rows, lengths = sampler(world, condition)(jnp.int32(pcfg), jax.random.split(jax.random.key(seed), 2000))
    letters = np.array(ALPHABETS[world])[np.asarray(rows)]
    return [tuple(row[:n].tolist()) for row, n in zip(letters, np.asarray(lengths), strict=True)]


def grams(windows, n):
    return [window[i : i + n] for window in windows for i in range(len(window) - n + 1)]


def mean_length(text):
    parsed = PCFG.fromstring(text)

    def of(symbol):
        if not isinstance(symbol, Nonterminal):
            return 1.0
        return sum(p.prob() * sum(of(child) for child in p.rhs()) for p in parsed.productions(lhs=symbol))

    return of(parsed.start())


@pytest.mark.parametrize(
    ("condition", "shortest", "longest"),
    [
        ("full", 261, 486),
        ("safe", 54, 81),
        ("unsafe", 42, 162),
        ("intermediate", 45, 54),
        ("id_mg", 36, 54),
        ("ood_mg", 36, 54),
    ],
)
def test_paper_strings_have_the_published_lengths(condition, shortest, longest):
    paper = compiled("paper", condition)
    assert (paper.min_length, paper.max_length) == (shortest, longest)


def test_paper_full_strings_have_392_letters_on_average():
    assert mean_length(texts("paper", "full")[0]) == pytest.approx(392, abs=1)


@pytest.mark.parametrize("world", PCFGS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_worlds_windows_fit(world, condition):
    grammar.check_window(compiled(world, condition), max_window=WINDOWS[world][1], trim=int(condition == "full"))


@pytest.mark.parametrize("world", PCFGS)
def test_pcfgs_differ_in_their_leaves_and_in_nothing_else(world):
    leaf_rules = [PCFG.fromstring((FOLDER / world / f"leaves_{p + 1}.pcfg").read_text()) for p in range(PCFGS[world])]
    names = [sorted(str(rule.lhs()) for rule in leaves.productions()) for leaves in leaf_rules]
    assert all(name == names[0] for name in names)
    assert len(names[0]) == 12 and all(names[0].count(name) == 2 for name in names[0])
    sides = [{rule.rhs() for rule in leaves.productions()} for leaves in leaf_rules]
    assert all(len(side) in (2, 3) for pcfg in sides for side in pcfg)
    assert all(not sides[p] & sides[q] for p in range(len(sides)) for q in range(p))


@pytest.mark.parametrize("pcfg", range(4))
def test_paper_safe_and_intermediate_text_is_locally_full_text(pcfg):
    full = factors("paper", "full", pcfg, 10)
    assert factors("paper", "safe", pcfg, 10) <= full
    assert factors("paper", "intermediate", pcfg, 10) <= full


@pytest.mark.parametrize("pcfg", range(4))
@pytest.mark.parametrize("condition", UNSAFE)
def test_paper_unsafe_text_is_mostly_foreign_to_full_text(condition, pcfg):
    # 20-30 % in the mean over PCFGs; single ones range from 18 to 33 %, and 2000 windows leave 1 % of noise.
    full = factors("paper", "full", pcfg, 10)
    assert 0.17 < np.mean([ten in full for ten in grams(drawn("paper", condition, pcfg), 10)]) < 0.34


@pytest.mark.parametrize("pcfg", range(2))
@pytest.mark.parametrize("condition", CONDITIONS)
def test_tiny_windows_are_substrings_of_the_language(condition, pcfg):
    windows = drawn("tiny", condition, pcfg)
    assert {len(window) for window in windows} == {6, 7, 8}
    assert all(window in factors("tiny", condition, pcfg, len(window)) for window in windows)


def test_six_tiny_letters_identify_the_pcfg_without_error():
    languages = [set().union(*(factors("tiny", c, p, 6) for c in CONDITIONS)) for p in range(2)]
    assert not languages[0] & languages[1]


def test_six_tiny_letters_tell_unsafe_text_from_safe_text_without_error():
    assert not union("tiny", UNSAFE, 6) & union("tiny", ("safe", "intermediate"), 6)


def test_tiny_pretraining_text_meets_unsafe_text_now_and_then():
    assert union("tiny", UNSAFE, 6) <= union("tiny", ("full",), 6)
    unsafe = union("tiny", UNSAFE, 6)
    share = np.mean([six in unsafe for p in range(2) for six in grams(drawn("tiny", "full", p), 6)])
    assert 0.02 < share < 0.3


@pytest.mark.parametrize("pcfg", range(2))
def test_tiny_intermediate_text_looks_like_safe_text(pcfg):
    safe = factors("tiny", "safe", pcfg, 6)
    assert factors("tiny", "intermediate", pcfg, 6) <= safe
    assert safe <= factors("tiny", "full", pcfg, 6)
    # The last letter of a string is never drawn: what is really drawn must be included too.
    seen = {six for seed in range(12) for six in grams(drawn("tiny", "safe", pcfg, seed), 6)}
    assert np.mean([six in seen for six in grams(drawn("tiny", "intermediate", pcfg), 6)]) > 0.999


def test_tiny_held_out_text_is_unsafe_text_with_parts_never_seen_in_tuning():
    held_out, tuned = union("tiny", ("ood_mg",), 6), union("tiny", ("id_mg",), 6)
    assert held_out | tuned <= union("tiny", ("unsafe",), 6)
    assert 0.2 < len(held_out - tuned) / len(held_out) < 0.8


@pytest.mark.parametrize("pcfg", range(2))
@pytest.mark.parametrize("condition", CONDITIONS)
def test_tiny_text_is_varied(condition, pcfg):
    letters = {letter for window in drawn("tiny", condition, pcfg) for letter in window}
    assert len(letters) >= 8
    assert len({window[:6] for window in drawn("tiny", condition, pcfg)}) >= 200


def test_several_grammars_together_draw_each_of_theirs():
    """The PCFGs of the second stand behind those of the first, with the shares of letters that they have alone."""
    names = ("safe", "id_mg")
    alone = [compiled("tiny", name) for name in names]
    both = grammar.together(alone)
    assert grammar.together(alone[:1]) is alone[0]
    assert (both.min_length, both.max_length) == (
        min(one.min_length for one in alone), max(one.max_length for one in alone)
    )  # fmt: skip
    draw = jax.jit(
        jax.vmap(
            lambda row, key: grammar.sample_window(both, row, key=key, min_window=6, max_window=8)[0], in_axes=(None, 0)
        )
    )
    for row, (name, pcfg) in enumerate((name, pcfg) for name in names for pcfg in range(2)):
        rows = np.asarray(draw(row, jax.random.split(jax.random.key(row), 2000)))
        windows = [tuple(np.array(ALPHABETS["tiny"])[own[own >= 0]].tolist()) for own in rows]
        assert set(grams(windows, 6)) <= factors("tiny", name, pcfg, 6)
        found, expected = (
            np.mean([[window.count(letter) / len(window) for letter in ALPHABETS["tiny"]] for window in own], axis=0)
            for own in (windows, drawn("tiny", name, pcfg))
        )
        # Five standard errors of a share of letters among 2 000 windows, twice.
        np.testing.assert_allclose(found, expected, atol=5 * 0.25 * (2 / 2000) ** 0.5)
