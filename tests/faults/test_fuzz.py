"""Recipes and grammars mutated at random: every one is read, or refused with a ValueError of one sentence, in time."""

import random
import signal
import tempfile
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.schema import Recipe
from jaxsafety.world import grammar, loading

LETTERS = loading.source("tiny").spec.letters
RECIPES = [path.read_text() for path in sorted(Path("experiments").glob("*.yaml"))] + [yaml_file.to_yaml(Recipe())]
GRAMMARS = [
    path.read_text()
    for path in sorted((resources.files("jaxsafety.world") / "grammars" / "tiny").iterdir(), key=lambda path: path.name)
]
RECIPE_WORDS = (
    *("null", "true", "~", "1", "-1", "0", "1e400", ".nan", ".inf", "2.5", "9" * 30, "9" * 400, "9" * 5000),
    *("[]", "{}", "[", "{", "]", "}", "- ", ": ", "? ", "&a ", "*a", "<<: *a", "!!binary x", "!!set {a}", "%YAML 9"),
    *("2001-99-99", "2001-01-01", "1:30", "config: x", "help: 1", "class_path: os.system", "init_args: {}", "''", "é"),
    *("models.sft: 5", "model: ", "models: ", "method: ", "seeds: ", "subject: ", "kind: "),
    *("\t", "\0", "\x85", "\n", "#", "|\n", "---\n"),
)
GRAMMAR_WORDS = (
    *("[0.5]", "[1.0]", "[0]", "[.]", "[1.2.3]", "[nan]", "[-1]", "[", "]", "|", "->", "'a'", "'", '"', "'zz'", "''"),
    *("v", "u", "open1", "%start", "%start v", "%end", "\\\n", "#", "\n", "\t", "\x85", "\0", "é", "٣", "<", "/", "^"),
    *("v -> v [1.0]\n", "a -> [1.0]\n", "v -> a a [1.0]\na -> b b [1.0]\nb -> v [1.0]\n", "9" * 400),
)
LIMIT_S = 20


@contextmanager
def in_time():
    """Fails what hangs."""

    def late(*_):
        pytest.fail(f"not read within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def mutated(draw, texts, words):
    """A real text after a few edits: words put in, spans cut, repeated or moved, characters changed."""
    text, rng = draw(st.sampled_from(texts)), random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(1, 6))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 1, 5, 40)))
        new = rng.choice((rng.choice(words), "", text[start:end] * 2, text[end : end + 20], chr(rng.randrange(1, 300))))
        text = text[:start] + new + text[end:]
    return text


def many(count):
    quiet = list(HealthCheck)
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


def read_recipe(text):
    with tempfile.TemporaryDirectory() as folder, in_time():
        path = Path(folder) / "study.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            yaml_file.read(path)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) > 10


def compile_grammar(text):
    with in_time():
        try:
            composed = grammar.compose(text, GRAMMARS[0], name="mine")
            grammar.check_window(grammar.compile_grammar([composed], name="mine", alphabet=LETTERS), max_window=8)
        except ValueError as error:
            assert "'mine'" in str(error) and "\n" not in str(error)


def recipe_fuzz(count):
    return many(count)(given(mutated(RECIPES, RECIPE_WORDS))(read_recipe))


def grammar_fuzz(count):
    return many(count)(given(mutated(GRAMMARS, GRAMMAR_WORDS))(compile_grammar))


@pytest.mark.usefixtures("unchecked")
def test_mutated_recipes_are_read_or_refused_in_one_sentence():
    recipe_fuzz(100)()


@pytest.mark.usefixtures("unchecked")
def test_mutated_grammars_are_compiled_or_refused_in_one_sentence():
    grammar_fuzz(400)()


@pytest.mark.faults
@pytest.mark.usefixtures("unchecked")
def test_thousands_of_mutated_recipes():
    recipe_fuzz(3000)()


@pytest.mark.faults
@pytest.mark.usefixtures("unchecked")
def test_thousands_of_mutated_grammars():
    grammar_fuzz(5000)()


LAUGHS = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "repeats itself without end"),
        ("a: &a {b: *a}", "repeats itself without end"),
        ("a: &a [*a]", "repeats itself without end"),
        ("[" * 5000, "is not YAML"),
        ("1: 2", "a key that is no text: put '1' in quotes"),
        ("true: 2", "a key that is no text: put 'true' in quotes"),
        ("? [a]\n: 1", "a key that is no text"),
        (f"seeds: [{'9' * 5000}]", "is not YAML: Exceeds the limit"),
        (f"evaluate: {{prompts: {'9' * 400}}}", "a number is too large"),
        (f"models: {{a: {{method: sft, lr: {'9' * 400}}}}}", "a number is too large"),
    ],
    ids=["laughs", "cycle", "list cycle", "deep", "int", "bool", "list", "long", "steps", "rate"],
)
@pytest.mark.usefixtures("unchecked")
def test_a_recipe_that_once_ended_in_a_traceback_or_never_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with in_time(), pytest.raises(ValueError) as error:
        yaml_file.read(path)
    assert message in str(error.value) and "\n" not in str(error.value)
