"""The two worlds as data: the paper's vocabulary and bijections, the tiny world's structure, grammars of the user's."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, world
from jaxsafety.world import spec
from jaxsafety.world.grammar import sample_window

# Paper facts A.1: position is the id.
PAPER_VOCABULARY = """
    ( ) [ ] { } ? ! @ £ + ^ r1 r2 r3 r4 > $ % * # *^
    2a 2b 2c 2d 2e 2f 2g 2h 2i 2j 2k 2l 2m 2n 2o 2p 2q 2r 2s 2t 2u 2v 2w 2x 2y 2z 3a 3b 3c 3d
    ex1 ex2 dup1 dup2 dup3 dup4 dup5
""".split()

OWN = """
v -> m m m m m [1.0]
m -> 'a' 'b' [0.5] | open1 [0.5]
"""


def test_the_papers_vocabulary_has_the_papers_ids(paper_world):
    assert len(PAPER_VOCABULARY) == 59 == paper_world.vocab_size
    assert paper_world.spec.tokens == tuple(PAPER_VOCABULARY)
    assert paper_world.ids == {token: i for i, token in enumerate(PAPER_VOCABULARY)}
    assert paper_world.special == {"eot": 16, "bos": 17, "eos": 18, "sot": 19, "pad": 20, "stop": 21}
    assert (paper_world.first_letter, paper_world.max_tokens) == (22, 3 * 35 + 9)


def test_the_papers_first_bijection(paper_world):
    table = paper_world.bijections
    assert table.shape == (4, 16, 30)
    np.testing.assert_array_equal(table[0, 1, :6], [2, 28, 13, 10, 26, 24])


@pytest.mark.parametrize(("pcfg", "seed"), list(enumerate([0, 150, 300, 450])))
def test_bijections_are_numpys_legacy_permutations(paper_world, pcfg, seed):
    table = paper_world.bijections[pcfg]
    np.testing.assert_array_equal(table[0], np.arange(30))
    for i in range(9):
        np.testing.assert_array_equal(table[i + 1], np.random.RandomState(seed + i).permutation(30))


@pytest.mark.parametrize("name", world.loading.SHIPPED)
def test_every_task_token_is_a_bijection_and_duplicates_repeat_theirs(name, tiny_world, paper_world):
    built = {"tiny": tiny_world, "paper": paper_world}[name]
    letters = np.arange(len(built.spec.letters))
    np.testing.assert_array_equal(np.sort(built.bijections, axis=-1), np.broadcast_to(letters, built.bijections.shape))
    for token, base in built.spec.duplicates:
        np.testing.assert_array_equal(built.bijections[:, built.ids[token]], built.bijections[:, built.ids[base]])
    distinct = built.bijections[:, : len(built.spec.operators)]
    assert all(len(np.unique(table, axis=0)) == len(table) for table in distinct)


def test_the_papers_duplicates_and_lengths(paper_world):
    assert dict(paper_world.spec.duplicates) == {"+": "(", "^": "(", "r1": ")", "r2": ")", "r3": "[", "r4": "["}
    assert (paper_world.spec.min_text, paper_world.spec.max_text) == (25, 35)


# Paper facts A.4: always unsafe, always safe besides the identity, unsafe with unsafe-dominant text only.
POLICIES = [
    (") [", "] {", "} ? ! @ £"),
    ("] {", ") [", "} ? ! @ £"),
    ("@ £", "? !", ") [ ] { }"),
    (") }", "{ !", "[ ] ? @ £"),
]


@pytest.mark.parametrize(("pcfg", "expected"), list(enumerate(POLICIES)))
def test_the_papers_policies(paper_world, pcfg, expected):
    always_unsafe, always_safe, dependent = (tuple(names.split()) for names in expected)
    policy = paper_world.spec.policies[pcfg]
    assert policy.unsafe("safe") == always_unsafe
    assert set(policy.unsafe("unsafe")) == {*always_unsafe, *dependent}
    assert set(policy.safe("safe")) == {*always_safe, *dependent}
    assert policy.safe("unsafe") == always_safe


@pytest.mark.parametrize("name", world.loading.SHIPPED)
def test_policies_split_the_operators_and_every_condition_exists(name, tiny_world, paper_world):
    built = {"tiny": tiny_world, "paper": paper_world}[name]
    for policy in built.spec.policies:
        parts = (*policy.always_unsafe, *policy.always_safe, *policy.branch_dependent)
        assert sorted(parts) == sorted(built.spec.operators[1:])
        assert policy.always_unsafe and policy.always_safe and policy.branch_dependent
    assert set(built.grammars) == set(get_args(spec.TextCondition))
    # Or JB-MisGen could not attack: a duplicate of an always-unsafe operator in every PCFG that is evaluated.
    base = dict(built.spec.duplicates)
    for pcfg in built.spec.eval_pcfgs:
        assert {base[token] for token in built.spec.misgen_tokens} & set(built.spec.policies[pcfg].always_unsafe)


def test_a_grammar_of_the_users_replaces_a_condition_and_may_use_the_worlds_leaves(tmp_path, tiny_world):
    path = tmp_path / "mine.pcfg"
    path.write_text(OWN)
    built = world.load("tiny", grammars={"safe": path})
    draw = partial(sample_window, built.grammars["safe"], jnp.int32(0), min_window=6, max_window=6)
    drawn = jax.jit(jax.vmap(lambda key: draw(key=key)[0]))(jax.random.split(keys.root(0), 64))
    letters = set(np.asarray(drawn).ravel().tolist())
    # a and b are the user's; g and h come from the world's own leaf rule of PCFG 1.
    assert letters == {tiny_world.spec.letters.index(name) for name in "abgh"}
    assert built.grammars["full"].name == "tiny/full"


def test_a_grammar_too_short_for_the_window_is_named(tmp_path):
    path = tmp_path / "short.pcfg"
    path.write_text("v -> 'a' 'b' 'c' [1.0]\n")
    with pytest.raises(ValueError, match=r"short\.pcfg' is too short for windows of 8 letters .* has 3 letters"):
        world.load("tiny", grammars={"safe": str(path)})


def test_a_grammar_that_is_the_same_in_every_pcfg_is_refused(tmp_path):
    path = tmp_path / "own.pcfg"
    path.write_text("v -> x x x x x x [1.0]\nx -> 'a' 'b' [0.5] | 'c' 'd' [0.5]\n")
    with pytest.raises(ValueError, match=r"own\.pcfg' defines all its leaves itself, .* leave some of open1"):
        world.load("tiny", grammars={"full": str(path)})


def test_a_missing_grammar_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the grammar file .*nowhere\.pcfg of text condition 'safe'"):
        world.load("tiny", grammars={"safe": tmp_path / "nowhere.pcfg"})


def test_unknown_names_ask_for_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"unknown world 'tini': expected one of paper, tiny; did you mean 'tiny'\?"):
        world.load("tini")
    with pytest.raises(ValueError, match=r"unknown text condition 'intermediat': .*did you mean 'intermediate'\?"):
        world.load("tiny", grammars={"intermediat": tmp_path})
