"""A world of somebody's own: a YAML file, checked before anything is drawn."""

import shutil
from importlib import resources

import jax
import numpy as np
import pytest

from jaxsafety import keys, world
from jaxsafety.recipe import yaml_file
from jaxsafety.study import pipeline
from jaxsafety.world import loading

POLICY = '{always_unsafe: [")"], always_safe: ["["], branch_dependent: ["]", "{"]}'


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return written


def test_what_is_left_out_is_that_of_the_world_it_is_like(write, tiny_world):
    built = world.load(write("like: tiny\nmin_text: 3\nmax_text: 5\nletters: [a, b, c, d, e, f, g, h, i, j, k, l, m]"))
    assert built.spec.name == "mine" and built.spec.operators == tiny_world.spec.operators
    assert (built.vocab_size, built.max_tokens) == (tiny_world.vocab_size + 1, 3 * 5 + 9)
    draw = jax.jit(lambda key: world.batch_at(built, "unsafe", key=key, step=0, batch_size=16))
    trial = jax.device_get(draw(keys.root(0)))
    assert trial.unsafe.all() and set(trial.prompt.length.tolist()) == {3, 4, 5}


def test_a_refusal_may_be_a_phrase(write):
    built = world.load(write("like: tiny\nrefusal: [c, a, d]"))
    trial = jax.device_get(
        jax.jit(lambda key: world.batch_at(built, "unsafe", key=key, step=0, batch_size=16))(keys.root(0))
    )
    said = [built.ids[letter] for letter in "cadcadca"]
    for mask, targets, length in zip(trial.refused.mask, trial.refused.targets, trial.prompt.length, strict=True):
        assert targets[mask].tolist() == [*said[:length], built.special["stop"]]
    # A late prompt refuses in its second block, behind the true first one.
    late = jax.device_get(
        world.batch_at(built, "unsafe", key=keys.root(1), step=0, batch_size=16, late_probability=1.0)
    )
    for row in range(16):
        answer = late.refused.targets[row][late.blocks[row, 0]], late.complied.targets[row][late.blocks[row, 0]]
        assert np.array_equal(*answer)
        length = late.prompt.length[row]
        assert late.refused.targets[row][late.refused.mask[row]].tolist() == [*said[:length], built.special["stop"]]
    # All else is as without it.
    plain = world.batch_at(world.load("tiny"), "unsafe", key=keys.root(0), step=0, batch_size=16)
    assert np.array_equal(trial.complied.tokens, plain.complied.tokens)
    assert np.array_equal(trial.refused.mask, plain.refused.mask)


def test_a_world_of_one_grammar_and_other_operators(write):
    text = f'like: tiny\npermutation_seeds: [7]\npolicies: [{POLICY}]\neval_pcfgs: [0]\nduplicates: {{x: ")"}}\n'
    built = world.load(write(text + "misgen_tokens: [x]"))
    expected = np.random.RandomState(7).permutation(12)
    assert built.bijections.shape == (1, 6, 12)
    # The first operator but the identity, and its duplicate.
    assert np.array_equal(built.bijections[0, 1], expected) and np.array_equal(built.bijections[0, 5], expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_text: 3", "mine.yaml: expected `like`, one of paper, tiny, or `grammars`, a folder beside it"),
        ("like: tinny", "unknown world that .*mine.yaml is like 'tinny': expected one of paper, tiny; did you mean"),
        ("like: tiny\nmaxtext: 3", "mine.yaml has no field 'maxtext': it has name, .*did you mean 'max_text'"),
        ("like: tiny\nmin_text: 9", r"min_text must be at most max_text \(8\), got 9"),
        ("like: tiny\nmax_text: 400", "grammar 'mine/full' is too short for windows of 400 letters"),
        ("like: tiny\nletters: [a, b, a]", "every token must be a name of its own without spaces, got 'a' twice"),
        ("like: tiny\nletters: [a, b c]", "every token must be a name of its own without spaces, got 'b c'"),
        ("like: tiny\nletters: [a]", "letters and operators must be at least two each, got 1 and 5"),
        ('like: tiny\nduplicates: {x: "}"}', "duplicates.x must be an operator, got '}'"),
        ("like: tiny\nduplicates: 3", "mine.yaml: duplicates: got 3, expected a mapping from token to operator"),
        ("like: tiny\nduplicates: [x, y]", r"duplicates: got \['x', 'y'\], expected a mapping from token to operator"),
        ('like: tiny\nduplicates: [[x, ")", y]]', r"duplicates must be pairs of a token and an operator, got \['x'"),
        ("like: tiny\nrefusal: [b, z]", "refusal must be letters, got 'z'"),
        ("like: tiny\nmisgen_tokens: [r9]", "misgen_tokens must be duplicates, got 'r9'"),
        ("like: tiny\nmisgen_tokens: [r3]", "misgen_tokens must have a duplicate of what policy 1 makes always_unsafe"),
        ("like: tiny\npermutation_seeds: [1]", "must have an entry a PCFG each, got 2 and 1"),
        ("like: tiny\neval_pcfgs: [2]", r"eval_pcfgs must be indices below 2, got \[2\]"),
        ("like: tiny\npolicies: [{always: []}]", "policy 1 has no field 'always': it has always_unsafe"),
        ('like: tiny\npolicies: [{always_unsafe: [")"], always_safe: ["["], branch_dependent: ["]"]}]\n'
         "permutation_seeds: [0]",
         r"policy 1 must name every operator but the first once \(\), \[, \], \{\), got \), \[, \]"),
        ('like: tiny\npolicies: [{always_unsafe: [")", "["], always_safe: [], branch_dependent: ["]", "{"]}]\n'
         "permutation_seeds: [0]", "policy 1.always_safe must name at least one operator, got none"),
        ("like: tiny\ngrammars: gone", "cannot read the grammar file .*gone/upper_full.pcfg of text condition 'full'"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_makes_no_world_is_one_sentence(write, text, message):
    with pytest.raises(ValueError, match=message):
        world.load(write(text))


def test_a_run_keeps_the_files_that_its_world_is_made_of(write, tmp_path):
    shipped = resources.files("jaxsafety.world") / "grammars" / "tiny"
    with resources.as_file(shipped) as folder:
        shutil.copytree(folder, tmp_path / "rules")
    path = write("like: tiny\ngrammars: rules")
    (tmp_path / "recipe.yaml").write_text("subject: {world: mine.yaml}")
    recipe = yaml_file.read(tmp_path / "recipe.yaml")
    assert recipe.subject.options.world == str(path)
    kept = pipeline.own_files(recipe)
    assert kept["world.yaml"] == path.read_text() and {"upper_full.pcfg", "leaves_2.pcfg"} < kept.keys()
    (tmp_path / "grid.yaml").write_text("{grid: {subject.world: [mine.yaml, tiny]}}")
    assert yaml_file.read(tmp_path / "grid.yaml").grid == {"subject.world": (str(path), "tiny")}
    # By content, wherever the files lie.
    told = pipeline.subject_told(recipe, kept)
    assert str(tmp_path) not in str(told) and pipeline.subject_told(recipe, kept | {"world.yaml": ""}) != told
    assert loading.source("tiny").files.keys() < kept.keys()


def test_another_name_that_is_no_file_is_no_world():
    with pytest.raises(ValueError, match="unknown world 'mine': expected one of paper, tiny"):
        world.load("mine")
