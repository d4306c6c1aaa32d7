"""The reader of grammar text against NLTK's own, on texts that it takes and on such that it refuses."""

from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk import grammar as nltk_grammar

from jaxsafety.world import pcfg_text
from jaxsafety.world.pcfg_text import Nonterminal

FOLDER = resources.files("jaxsafety.world") / "grammars"
FILES = sorted(f"{world}/{one.name}" for world in ("paper", "tiny") for one in (FOLDER / world).iterdir())
PIECES = (
    "v", "u/x", "a<b>", "w^2-1", "_", "é", "->", "-> ", "|", "'a'", '"it\'s"', "''", "'a", '"', "[0.5]", "[1.0]", "[1]",
    "[.25]", "[0.5.1]", "[1.5]", "[]", "[x]", "[", " ", "\t", "\n", "\r\n", "\n\n", "\\\n", "\\", "#", "# c\n",
    "%start v", "%start v u", "%start", "%stop v", "%", "=", "*",
)  # fmt: skip


def theirs(text):
    """What NLTK reads; None where it refuses, or has nothing to read."""
    try:
        start, productions = nltk_grammar.read_grammar(text, nltk_grammar.standard_nonterm_parser, probabilistic=True)
    except ValueError:
        return None

    def symbol(one):
        return Nonterminal(str(one)) if isinstance(one, nltk_grammar.Nonterminal) else one

    return symbol(start), [(symbol(p.lhs()), tuple(map(symbol, p.rhs())), p.prob()) for p in productions]


def ours(text):
    try:
        return pcfg_text.read(text, where="text")
    except ValueError as error:
        assert str(error).startswith("text is ")
        return None


@pytest.mark.parametrize("name", FILES)
def test_the_files_that_ship_are_read_as_nltk_reads_them(name):
    text = (FOLDER / name).read_text()
    assert ours(text) == theirs(text) is not None


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=500, deadline=None)
def test_any_text_is_read_or_refused_as_by_nltk(text):
    assert ours(text) == theirs(text)


RULE = st.tuples(
    st.sampled_from(["v", "u", "w"]),
    st.lists(
        st.tuples(st.lists(st.sampled_from(["v", "u", "'a'", '"b"', ""]), max_size=4).map(" ".join),
                  st.sampled_from(["", "[0.5]", "[1.0]", "[.125]"])).map(" ".join),
        min_size=1, max_size=3,
    ).map(" | ".join),
).map(" -> ".join)  # fmt: skip


@given(st.lists(RULE, min_size=1, max_size=5).map("\n".join))
@settings(max_examples=300, deadline=None)
def test_rules_are_those_of_nltk_and_spelled_so_that_they_are_read_back(text):
    start, productions = ours(text)
    assert (start, productions) == theirs(text)
    assert ours("\n".join(map(pcfg_text.spell, productions))) == (start, productions)
