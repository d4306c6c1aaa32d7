"""The window sampler against distributions enumerated from NLTK's own productions, and under NLTK's parsers."""

import itertools
import math
from bisect import bisect
from functools import cache
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nltk.grammar import PCFG, Nonterminal
from nltk.parse import ChartParser, ViterbiParser
from scipy.stats import chisquare

from jaxsafety.world import grammar, pcfg_rules

# Keys are fixed, so a test passes or fails for good; a right sampler would fail a fresh key once in 10^4.
P_VALUE = 1e-4
DRAWS = 40_000
ABC = ("a", "b", "c", "d")

GRAMMARS = {
    # Everything has a known length.
    "fixed": """
        v -> x y [0.7] | y x [0.3]
        x -> 'a' z [0.9] | z 'b' [0.1]
        y -> 'c' 'd' z [0.25] | 'd' z 'd' [0.25] | 'd' z 'd' [0.5]
        z -> 'a' 'b' [0.4] | 'c' 'c' [0.35] | 'd' 'a' [0.25]""",
    # Lengths known at different depths, mixed with bare letters.
    "mixed": """
        v -> x 'b' y [0.35] | y x x [0.65]
        x -> z 'a' [0.8] | 'd' 'd' 'd' [0.2]
        y -> x z [0.5] | z 'c' z [0.5]
        z -> 'a' 'b' [0.15] | 'c' 'c' [0.85]""",
    # Nothing has a known length, and some of it may be empty.
    "variable": """
        v -> x y x 'd' [0.6] | 'c' y x y x [0.4]
        x -> 'a' 'b' [0.5] | 'c' 'd' y [0.5]
        y -> 'b' [0.3] | 'a' e 'a' 'c' [0.3] | [0.4]
        e -> 'd' [0.75] | [0.25]""",
}


def strings(nltk_grammar, symbol):
    """Distribution of the strings of a symbol, by plain recursion over NLTK's productions."""
    if not isinstance(symbol, Nonterminal):
        return {(symbol,): 1.0}
    result = {}
    for production in nltk_grammar.productions(lhs=symbol):
        for parts in itertools.product(*(strings(nltk_grammar, child).items() for child in production.rhs())):
            whole = tuple(itertools.chain.from_iterable(part for part, _ in parts))
            result[whole] = result.get(whole, 0.0) + production.prob() * math.prod(p for _, p in parts)
    return result


@cache
def language(text):
    """Distribution of the strings of a grammar."""
    parsed = PCFG.fromstring(text)
    return strings(parsed, parsed.start())


def windows(text, *, min_window, max_window, trim):
    """Distribution of windows as the sampler defines it, summed over all strings, lengths and starts."""
    result = {}
    for string, weight in language(text).items():
        for length in range(min_window, max_window + 1):
            starts = range(len(string) - length - trim)
            for start in starts:
                window = string[start : start + length]
                share = weight / (max_window - min_window + 1) / len(starts)
                result[window] = result.get(window, 0.0) + share
    return result


def draw(compiled, *pcfgs, draws=DRAWS, **lengths):
    """As many windows of each PCFG, in one compiled call; one list of strings for each."""

    def one(pcfg, key):
        return grammar.sample_window(compiled, pcfg, key=key, **lengths)

    keys = jax.random.split(jax.random.key(0), (len(pcfgs), draws))
    batch = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0))))
    rows, counts = map(np.asarray, batch(jnp.array(pcfgs, jnp.int32), keys))
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows == -1, np.arange(rows.shape[2])[None, None, :] >= counts[:, :, None])
    letters = np.array(compiled.alphabet)[rows]
    return [
        [tuple(row[:n].tolist()) for row, n in zip(*pcfg, strict=True)] for pcfg in zip(letters, counts, strict=True)
    ]


def assert_follows(samples, expected):
    unknown = set(samples) - set(expected)
    assert not unknown, f"windows that no string contains: {list(unknown)[:3]}"
    cells = sorted(expected, key=expected.get)
    index = {window: i for i, window in enumerate(cells)}
    observed = np.bincount([index[window] for window in samples], minlength=len(cells)).astype(float)
    mean = np.array([expected[window] for window in cells]) * len(samples)
    # Chi-square needs a handful of expected counts in each cell: pool the rarest.
    pooled = np.searchsorted(np.cumsum(mean) // 10, np.unique(np.cumsum(mean) // 10))
    result = chisquare(np.add.reduceat(observed, pooled), np.add.reduceat(mean, pooled), sum_check=False)
    assert result.pvalue > P_VALUE


@pytest.mark.parametrize(("lengths", "trim", "merged"), [((2, 4), 0, 1), ((1, 3), 1, 1), ((2, 3), 1, 64)])
@pytest.mark.parametrize("name", GRAMMARS)
def test_windows_follow_the_exact_distribution(name, lengths, trim, merged, monkeypatch):
    monkeypatch.setattr(pcfg_rules, "_MAX_ALTERNATIVES", merged)
    compiled = grammar.compile_grammar([GRAMMARS[name]], name=name, alphabet=ABC)
    options = {"min_window": lengths[0], "max_window": lengths[1], "trim": trim}
    assert_follows(*draw(compiled, 0, **options), windows(GRAMMARS[name], **options))


def test_rare_and_repeated_alternatives_keep_nltk_probabilities():
    text = "v -> 'a' 'd' [0.001] | 'b' 'd' [0.009] | 'c' 'd' [0.3] | 'd' 'd' [0.3] | 'd' 'd' [0.2] | 'c' 'd' [0.19]"
    compiled = grammar.compile_grammar([text], name="rare", alphabet=ABC)
    options = {"min_window": 1, "max_window": 1}
    assert_follows(*draw(compiled, 0, draws=200_000, **options), windows(text, trim=0, **options))


def test_a_chain_longer_than_the_merge_limit_is_followed():
    alternatives = " | ".join(f"'{a}' '{b}' '{c}' 'd' [{1 / 64}]" for a, b, c in itertools.product(ABC, repeat=3))
    text = f"v -> s s [0.5] | s 'a' 'a' [0.5]\ns -> t [1.0]\nt -> u [1.0]\nu -> {alternatives} | 'd' 'd' 'd' [0.0]"
    compiled = grammar.compile_grammar([text], name="chain", alphabet=ABC)
    options = {"min_window": 2, "max_window": 3}
    assert_follows(*draw(compiled, 0, **options), windows(text, trim=0, **options))


@pytest.fixture(scope="module")
def whole_strings():
    """A grammar and strings of it: its end mark, which no window holds, makes them of windows of full length."""
    text = "top -> v 'd' [1.0]\n" + GRAMMARS["fixed"]
    compiled = grammar.compile_grammar([text], name="marked", alphabet=ABC)
    length = compiled.min_length - 1
    return text, set(*draw(compiled, 0, draws=300, min_window=length, max_window=length))


@pytest.mark.parametrize("parser", [ChartParser, ViterbiParser])
def test_whole_strings_parse_under_nltk(whole_strings, parser):
    text, samples = whole_strings
    oracle = parser(PCFG.fromstring(text))
    assert len(samples) > 50
    assert all(any(True for _ in oracle.parse([*sample, "d"])) for sample in samples)


def test_each_pcfg_draws_its_own_strings():
    texts = ["v -> 'a' 'a' [1.0]", "v -> 'b' 'b' [0.5] | 'b' 'c' 'c' [0.5]", "v -> u u [1.0]\nu -> 'd' 'd' [1.0]"]
    compiled = grammar.compile_grammar(texts, name="three", alphabet=ABC)
    assert (compiled.min_length, compiled.max_length) == (2, 4)
    samples = draw(compiled, 0, 1, 2, 3, draws=100, min_window=1, max_window=1)
    letters = [set(itertools.chain(*windows)) for windows in samples]
    assert letters == [{"a"}, {"b", "c"}, {"d"}, {"d"}]


def packaged(world, condition, pcfgs):
    folder = resources.files("jaxsafety.world") / "grammars" / world
    upper = (folder / f"upper_{condition}.pcfg").read_text()
    return [grammar.compose(upper, (folder / f"leaves_{p + 1}.pcfg").read_text()) for p in range(pcfgs)]


PAPER_LETTERS = tuple(f"{n}{c}" for n, c in [*((2, chr(97 + i)) for i in range(26)), *((3, c) for c in "abcd")])


@pytest.fixture(scope="module")
def paper_full():
    return grammar.compile_grammar(packaged("paper", "full", 4), name="paper/full", alphabet=PAPER_LETTERS)


def make_generator(nltk_grammar, rng):
    """A function that draws a whole string of a symbol, letter by letter."""
    rules = {}
    for rule in nltk_grammar.productions():
        rules.setdefault(rule.lhs(), []).append(rule)
    totals = {symbol: np.cumsum([rule.prob() for rule in own]).tolist() for symbol, own in rules.items()}

    def generate(symbol):
        if not isinstance(symbol, Nonterminal):
            return [symbol]
        total = totals[symbol]
        chosen = rules[symbol][bisect(total, rng.random() * total[-1], hi=len(total) - 1)]
        return [letter for child in chosen.rhs() for letter in generate(child)]

    return generate


def bigram_table(texts):
    table = np.zeros((len(PAPER_LETTERS),) * 2)
    index = {letter: i for i, letter in enumerate(PAPER_LETTERS)}
    pairs = [(index[a], index[b]) for text in texts for a, b in itertools.pairwise(text)]
    np.add.at(table, tuple(np.transpose(pairs)), 1)
    return table / table.sum()


def test_the_paper_grammar_gives_the_bigrams_of_a_plain_generator(paper_full):
    # 400 plain strings hold 157 000 bigrams of about 150 kinds: two right samplers differ by about 0.02.
    largest_total_variation = 0.04
    rng = np.random.default_rng(0)
    samples = draw(paper_full, 0, 3, draws=8000, min_window=25, max_window=35, trim=1)
    for pcfg, fast in zip((0, 3), samples, strict=True):
        parsed = PCFG.fromstring(packaged("paper", "full", 4)[pcfg])
        generate = make_generator(parsed, rng)
        plain, drawn = bigram_table([generate(parsed.start()) for _ in range(400)]), bigram_table(fast)
        assert np.array_equal(plain > 0, drawn > 0)
        assert 0.5 * np.abs(plain - drawn).sum() < largest_total_variation


def test_letters_outside_the_window_are_not_drawn(paper_full):
    # A full derivation takes about 300 draws. Needed: length, start, v, 6 branches, 5 groups of 9 letters.
    def one(key):
        return grammar.sample_window(paper_full, jnp.int32(0), key=key, min_window=25, max_window=35)

    drawn = [
        e.params["shape"] for e in jax.make_jaxpr(one)(jax.random.key(0)).eqns if e.primitive.name == "random_bits"
    ]
    assert drawn == [(14,)]


@pytest.mark.slow
def test_jit_is_eager_and_vmap_is_a_loop():
    compiled = grammar.compile_grammar([GRAMMARS["mixed"], GRAMMARS["fixed"]], name="two", alphabet=ABC)

    def one(pcfg, key):
        return grammar.sample_window(compiled, pcfg, key=key, min_window=2, max_window=4)

    pcfgs = jnp.array([0, 1, 1, 0, 1, 0], jnp.int32)
    keys = jax.random.split(jax.random.key(3), len(pcfgs))
    batched = jax.jit(jax.vmap(one))(pcfgs, keys)
    jitted = jax.jit(one)
    looped = [jitted(pcfg, key) for pcfg, key in zip(pcfgs, keys, strict=True)]
    for i, (window, length) in enumerate(looped):
        np.testing.assert_array_equal(window, batched[0][i])
        assert length == batched[1][i]
    with jax.disable_jit():
        window, length = one(pcfgs[0], keys[0])
    np.testing.assert_array_equal(window, looped[0][0])
    assert length == looped[0][1]


def test_a_window_that_does_not_fit_is_refused():
    compiled = grammar.compile_grammar([GRAMMARS["fixed"]], name="short", alphabet=ABC)
    assert compiled.min_length == 7
    grammar.check_window(compiled, max_window=6)
    grammar.check_window(compiled, max_window=5, trim=1)
    with pytest.raises(ValueError, match=r"'short' is too short .* 6 letters with trim 1: .* has 7 .* at least 8$"):
        grammar.check_window(compiled, max_window=6, trim=1)
    with pytest.raises(ValueError, match="too short"):
        grammar.sample_window(compiled, jnp.int32(0), key=jax.random.key(0), min_window=1, max_window=7)


@pytest.mark.parametrize(("max_window", "trim"), [(0, 0), (3, -1)])
def test_window_numbers_out_of_range_are_refused(max_window, trim):
    compiled = grammar.compile_grammar([GRAMMARS["fixed"]], name="short", alphabet=ABC)
    with pytest.raises(ValueError, match="max_window must be at least 1 and trim at least 0, got"):
        grammar.check_window(compiled, max_window=max_window, trim=trim)


@pytest.mark.parametrize("min_window", [0, 4])
def test_min_window_must_lie_below_max_window(min_window):
    compiled = grammar.compile_grammar([GRAMMARS["fixed"]], name="short", alphabet=ABC)
    with pytest.raises(ValueError, match=f"min_window must be in 1..3 .*, got {min_window}"):
        grammar.sample_window(compiled, jnp.int32(0), key=jax.random.key(0), min_window=min_window, max_window=3)
