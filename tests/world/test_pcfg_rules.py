"""Grammar text: what is refused and how it is said, composing files, and rules that stay equivalent when merged."""

import itertools
import math

import pytest

from jaxsafety.world import grammar, pcfg_rules, pcfg_text

LETTERS = ("a", "b", "c", "it's")
# Products and sums of a few probabilities in float64.
ROUNDING = 1e-12


def compile_text(text):
    return grammar.compile_grammar([text], name="mine", alphabet=LETTERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"grammar 'mine', PCFG 1 of 1 is empty: expected rules"),
        ("# only a comment\n\n", r"is empty"),
        ("v -> 'a' [1.0]\nv = 'b' [1.0]", r"not in NLTK's PCFG notation: line 2, v = 'b' \[1.0\]: expected an arrow"),
        ("v -> 'a [1.0]", r"line 1.*unterminated string"),
        ("%start\nv -> 'a' [1.0]", r"not in NLTK's PCFG notation: .*line 1"),
        ("v -> 'a' [0.5] | 'b' [0.4]", r"the probabilities of v sum to 0.9, expected 1$"),
        ("v -> 'a'", r"the probabilities of v sum to 0, expected 1$"),
        ("v -> node [1.0]\nnoda -> 'a' [1.0]", r"rule v -> node \[1.\] uses node, which no .*; did you mean 'noda'\?$"),
        ("%start u\nv -> 'a' [1.0]", r"no rule defines the start symbol u$"),
        ("v -> 'its' [1.0]", r"has the letter 'its', which is not in the alphabet; did you mean \"it's\"\?$"),
        ("v -> v 'a' [0.5] | 'b' [0.5]", r"recursion without bound, v -> v; strings must have bounded length$"),
        (
            "v -> 'a' u [1.0]\nu -> t [1.0]\nt -> u [0.5] | 'b' [0.5]",
            r"recursion without bound, (u -> t -> u|t -> u -> t)",
        ),
    ],
)
def test_a_bad_text_is_refused_in_one_sentence_naming_grammar_and_place(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        compile_text(text)
    assert str(caught.value).startswith("grammar 'mine', PCFG 1 of 1") and "\n" not in str(caught.value)


def test_the_pcfg_at_fault_is_named():
    with pytest.raises(ValueError, match=r"PCFG 2 of 2: the probabilities of v sum to 0.5"):
        grammar.compile_grammar(["v -> 'a' [1.0]", "v -> 'a' [0.5]"], name="mine", alphabet=LETTERS)


@pytest.mark.parametrize(("texts", "alphabet"), [([], ("a",)), (["v -> 'a' [1.0]"], ()), (["v -> 'a' [1.0]"], "aa")])
def test_no_text_and_no_proper_alphabet_are_refused(texts, alphabet):
    with pytest.raises(ValueError, match="grammar 'mine'"):
        grammar.compile_grammar(texts, name="mine", alphabet=alphabet)


def doubling(leaf, *, levels):
    return "\n".join([*(f"s{i} -> s{i + 1} s{i + 1} [1.0]" for i in range(levels)), f"s{levels} -> {leaf}"])


# Too many alternatives to merge, of unequal length.
UNEQUAL = " | ".join(["'c' [0.1]", *(f"'{a}' '{b}' [0.1]" for a, b in itertools.product("abc", repeat=2))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (doubling("'a' [1.0]", levels=200), "strings have up to 1606938044258990275541962092341162602522202993782792"),
        (doubling(UNEQUAL, levels=13), "holds up to 8192 symbols .* expected at most 4096"),
    ],
)
def test_hopelessly_large_grammars_are_refused_at_once(text, message):
    with pytest.raises(ValueError, match=message):
        compile_text(text)


def test_unreachable_and_impossible_rules_do_no_harm():
    text = "v -> 'a' 'b' [1.0] | v v [0.0]\nw -> w 'c' [1.0]"
    compiled = compile_text(text)
    assert (compiled.min_length, compiled.max_length) == (2, 2)
    _, rules = pcfg_rules.parse(text, 0, where="w", alphabet=LETTERS)
    assert list(rules.values()) == [{("a", "b"): 1.0}]


def test_compose_appends_what_is_used_and_lacking_only():
    upper = "v -> x y [1.0]\ny -> 'b' [1.0]\n"
    leaves = "y -> 'a' [1.0]\nz -> \"it's\" [0.333333333333] | 'a' [0.666666666667]\nx -> z 'c' [1.0]\nq -> 'a' [1.0]"
    text = grammar.compose(upper, leaves)
    assert text.startswith(upper)
    start, productions = pcfg_text.read(text, where="text")
    assert str(start) == "v"
    assert [str(p.lhs) for p in productions] == ["v", "y", "z", "z", "x"]
    assert [p.prob for p in productions] == [1.0, 1.0, 0.333333333333, 0.666666666667, 1.0]
    assert [p.rhs for p in productions if str(p.lhs) == "z"] == [("it's",), ("a",)]


def test_compose_leaves_an_undefined_symbol_to_the_compiler():
    with pytest.raises(ValueError, match="uses g, which no rule defines"):
        compile_text(grammar.compose("v -> g [1.0]", "h -> 'a' [1.0]"))


def test_compose_names_the_file_at_fault():
    with pytest.raises(ValueError, match=r"^grammar 'my.pcfg' is not .* line 1"):
        grammar.compose("v = g", "g -> 'a' [1.0]", name="my.pcfg")
    with pytest.raises(ValueError, match=r"^the leaf text for grammar 'my.pcfg' is empty"):
        grammar.compose("v -> g [1.0]", "", name="my.pcfg")


def strings(symbol, rules):
    """Distribution of the strings of a symbol, by plain recursion."""
    if symbol not in rules:
        return {(symbol,): 1.0}
    result = {}
    for rhs, weight in rules[symbol].items():
        for parts in itertools.product(*(strings(child, rules).items() for child in rhs)):
            whole = tuple(itertools.chain.from_iterable(part for part, _ in parts))
            result[whole] = result.get(whole, 0.0) + weight * math.prod(p for _, p in parts)
    return result


NESTED = """
v -> u t [0.2] | t u w [0.5] | t u w [0.3]
u -> 'a' [0.25] | 'b' t [0.75]
t -> 'c' w 'c' [0.6] | "it's" [0.4]
w -> [0.5] | e 'b' [0.2] | 'b' e [0.3]
e -> [1.0]
"""


@pytest.mark.parametrize("most", [1, 3, 64])
def test_merged_rules_have_the_same_strings_and_probabilities(most, monkeypatch):
    start, rules = pcfg_rules.parse(NESTED, 0, where="w", alphabet=LETTERS)
    monkeypatch.setattr(pcfg_rules, "_MAX_ALTERNATIVES", most)
    merged = pcfg_rules.merge(start, rules)
    assert len(merged) < len(rules)
    assert (len(merged) == 1) == (most == 64)
    expected = strings(start, rules)
    assert strings(start, merged) == pytest.approx(expected, rel=ROUNDING)
    lengths = [len(string) for string in expected]
    assert pcfg_rules.spans(rules, LETTERS)[start] == (min(lengths), max(lengths))
