"""Worlds that seeds draw: other operators, policies and probabilities, one program, and the draws of each by itself."""

from dataclasses import fields
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, world
from jaxsafety.pools import safety, text
from jaxsafety.world import drawn, pcfg_text, spec
from jaxsafety.world.pcfg_tables import DRAWN

SEEDS = (3, 5, 6)


@pytest.fixture(scope="module")
def several():
    return [world.load("tiny", drawn_by=seed) for seed in SEEDS]


def shares(rules):
    """Probabilities by left side and alternative, repeated ones added up."""
    found = {}
    for rule in pcfg_text.read(rules, where="test")[1]:
        own = found.setdefault(str(rule.lhs), {})
        own[rule.rhs] = own.get(rule.rhs, 0.0) + rule.prob
    return found


def test_a_seed_draws_bijections_policies_and_probabilities(several, tiny_world):
    for one in several:
        assert one.spec.tokens == tiny_world.spec.tokens and one.max_tokens == tiny_world.max_tokens
        for mine, theirs in zip(one.spec.policies, tiny_world.spec.policies, strict=True):
            assert len(mine.always_unsafe) == len(theirs.always_unsafe) and len(mine.always_safe) == len(
                theirs.always_safe
            )
    tables = [one.bijections for one in (tiny_world, *several)]
    assert len({table.tobytes() for table in tables}) == len(tables)
    assert len({one.spec.policies for one in several}) > 1
    for name in ("full", "safe", "id_mg"):
        assert len({one.grammars[name].texts for one in (tiny_world, *several)}) == len(tables)


def test_what_a_seed_draws_depends_on_it_alone(several):
    again = world.load("tiny", drawn_by=SEEDS[1])
    assert again.spec == several[1].spec and again.grammars["full"].texts == several[1].grammars["full"].texts


def test_a_text_condition_stays_the_part_that_it_was_of_another(several, tiny_world):
    one = several[0]
    for pcfg in range(2):
        whole, part = (shares(one.grammars[name].texts[pcfg]) for name in ("full", "safe"))
        before = shares(tiny_world.grammars["full"].texts[pcfg])
        # In the file, full text has whole and shortened phrases, safe text the whole ones, at equal odds in both.
        for symbol in "mnow":
            odds = [list(found[symbol].values()) for found in (whole, part)]
            assert odds[0][0] / odds[0][1] == pytest.approx(odds[1][0] / odds[1][1])
            assert set(whole[symbol]) == set(before[symbol])
        assert whole["open1"] == part["open1"] != before["open1"]
        for found in (whole, part):
            assert [sum(own.values()) for own in found.values()] == pytest.approx([1.0] * len(found))
    # Rules above the leaves are shared by the PCFGs, leaves are not.
    first, second = (shares(text) for text in one.grammars["full"].texts)
    assert first["v"] == second["v"]
    assert list(first["open1"].values()) != list(second["open1"].values())


def test_equiprobable_alternatives_become_a_beta_draw():
    rules = "\n".join(f"s{i} -> 'a' [0.5] | 'b' [0.5] | 'c' [0]" for i in range(400))
    found = shares(drawn.reweighted(rules, seed=1, part="upper"))
    first = np.array([own["a",] for own in found.values()])
    # Beta(4, 4) has a standard deviation of 1/6; five standard errors of 400 draws.
    assert abs(first.mean() - 0.5) < 5 / 6 / 20 and abs(first.std() - 1 / 6) < 0.03
    assert all(own["c",] == 0 for own in found.values())


def test_a_start_symbol_stays(several):
    assert "%start b" in drawn.reweighted("%start b\na -> 'a' [1]\nb -> a a [1]", seed=1, part="upper")


@pytest.mark.slow
def test_several_worlds_draw_in_one_program_what_each_draws(several):
    family = drawn.together(several)
    key, names = keys.stream(keys.root(0), "evaluate"), ("unsafe", "jb_co_task", "jb_misgen")

    def draws(found):
        given = {"key": key, "step": 0}
        pools = [text.draw(found, text.Config(), **given, total_steps=10, batch_size=8),
                 safety.draw(found, safety.Config(), **given, total_steps=10, batch_size=8)]  # fmt: skip
        return [world.batch_at(found, name, **given, batch_size=8) for name in names], pools

    together = jax.device_get(jax.jit(jax.vmap(lambda place: draws(family.at(place))))(jnp.arange(len(several))))
    for place, one in enumerate(several):
        alone = jax.device_get(draws(one))
        jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda leaf, i=place: leaf[i], together))
    # And they are not the same.
    outputs = together[0][0].complied.targets
    assert not np.array_equal(outputs[0], outputs[1])


def test_worlds_of_a_kind_have_tables_of_one_shape(several):
    for condition in get_args(spec.TextCondition):
        first, *others = (one.grammars[condition] for one in several)
        for other in others:
            for one in fields(first):
                mine, theirs = getattr(first, one.name), getattr(other, one.name)
                if one.name in DRAWN:
                    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
                elif one.name in ("lazy", "eager"):
                    jax.tree.map(np.testing.assert_array_equal, vars(mine), vars(theirs))
                elif one.name != "texts":
                    np.testing.assert_array_equal(mine, theirs)


def test_one_of_several_worlds_is_taken_by_its_place(several):
    family = drawn.together(several)
    assert family.at(1) is several[1]
    with pytest.raises(ValueError, match="these are several worlds: take one by its place"):
        world.batch_at(family, "safe", key=keys.root(0), step=0, batch_size=1)
    with pytest.raises(ValueError, match="place of a world: got 3, expected an index below 3"):
        family.at(3)
    # A world looked up in a program leaves nothing traced behind.
    with jax.checking_leaks():
        jax.jit(lambda place: world.batch_at(family.at(place), "safe", key=keys.root(0), step=0, batch_size=1))(0)


def test_the_papers_world_is_drawn_too(paper_world):
    one = world.load("paper", drawn_by=1)
    assert one.spec != paper_world.spec and one.vocab_size == paper_world.vocab_size
    base = dict(one.spec.duplicates)
    asked = {base[token] for token in one.spec.misgen_tokens}
    assert all(asked & set(one.spec.policies[p].always_unsafe) for p in one.spec.eval_pcfgs)
