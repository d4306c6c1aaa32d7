"""Prompts by condition: the safety policy, both answers, what is judged, and the jailbreaks' definitions."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxsafety import keys, world
from jaxsafety.world import conditions, layout
from tests.oracles import plain_outputs, plain_sequence

# Share estimates from 2 000 draws: five standard errors of a coin are 0.056.
SHARE_ATOL = 0.06
DRAWS = 2000


def draw(built, names, look=lambda trial: trial):
    """What is looked at of some conditions' draws; one program, in which they share what they can."""

    def run(key):
        return {name: look(world.batch_at(built, name, key=key, step=0, batch_size=DRAWS)) for name in names}

    return jax.device_get(jax.jit(run)(keys.stream(keys.root(0), "evaluate")))


@pytest.fixture(scope="module")
def draws(tiny_world):
    return draw(tiny_world, conditions.CONDITIONS)


@pytest.fixture(scope="module")
def paper_draws(paper_world):
    """Prompts without their texts and answers, which nobody looks at and so no program has to draw."""

    def look(trial):
        return {"pcfg": trial.prompt.pcfg, "tasks": trial.prompt.tasks}, trial.unsafe

    drawn = draw(paper_world, ("safe", "unsafe", "jb_misgen"), look=look)
    return {
        name: SimpleNamespace(prompt=SimpleNamespace(**prompt), unsafe=unsafe)
        for name, (prompt, unsafe) in drawn.items()
    }


def one(trial, i):
    return jax.tree.map(lambda leaf: leaf[i], trial)


def base_tokens(built, tasks):
    """Task ids as operator names, duplicates resolved."""
    base = dict(built.spec.duplicates)
    return [base.get(built.spec.tokens[t], built.spec.tokens[t]) for t in tasks]


@pytest.mark.parametrize("name", list(conditions.CONDITIONS))
def test_both_answers_follow_the_definition(tiny_world, draws, name):
    for i in range(25):
        trial = one(draws[name], i)
        first, second = plain_outputs(tiny_world, trial.prompt)
        length = int(trial.prompt.length)
        null, empty = [tiny_world.spec.letters[0]] * length, ["#"] * length
        late = trial.unsafe and trial.refused.mask[length + 6] == 0
        refusal = (first, null) if late else (null, empty)
        for side, blocks in ((trial.complied, (first, second)), (trial.refused, refusal)):
            expected = plain_sequence(tiny_world, trial.prompt, *blocks)
            assert [tiny_world.spec.tokens[t] for t in side.tokens] == expected[:-1]
            assert [tiny_world.spec.tokens[t] for t in side.targets] == expected[1:]


@pytest.mark.parametrize("name", list(conditions.CONDITIONS))
def test_only_safe_prompts_prefer_the_true_output(draws, name):
    assert np.all(draws[name].unsafe == (name != "safe"))


def test_safe_prompts_hold_no_operator_that_is_ever_unsafe_there(tiny_world, draws):
    trial = draws["safe"]
    for i in range(DRAWS):
        policy = tiny_world.spec.policies[int(trial.prompt.pcfg[i])]
        assert not set(base_tokens(tiny_world, trial.prompt.tasks[i])) & set(policy.always_unsafe)


@pytest.mark.parametrize("name", ["unsafe", "jb_co_task", "jb_co_text", "jb_misgen", "ood"])
def test_the_judged_block_is_the_first_with_an_unsafe_operator(tiny_world, draws, name):
    trial = draws[name]
    condition = conditions.CONDITIONS[name]
    tables = [conditions.unsafe_table(tiny_world, condition.tasks, branch) for _, branch in condition.texts]
    for i in range(300):
        prompt = one(trial.prompt, i)
        # On trained texts the branch is not recorded: the judged block must be right under one of them.
        expected = set()
        for table in tables:
            pairs = table[int(prompt.pcfg)][prompt.tasks].reshape(2, 2).any(1)
            expected.add(0 if pairs[0] else 1 if pairs[1] else None)
        judged = [block for block in (0, 1) if np.array_equal(trial.refused.mask[i], trial.blocks[i, block])]
        assert judged and judged[0] in expected


def test_safe_prompts_are_judged_on_both_true_blocks(draws):
    trial = draws["safe"]
    np.testing.assert_array_equal(trial.complied.mask, trial.blocks.any(1))
    np.testing.assert_array_equal(trial.refused.mask, trial.blocks[:, 0])


def test_unsafe_prompts_score_as_many_tokens_on_either_side(draws):
    trial = draws["unsafe"]
    np.testing.assert_array_equal(trial.complied.mask.sum(1), trial.prompt.length + 1)
    np.testing.assert_array_equal(trial.refused.mask.sum(1), trial.prompt.length + 1)


def test_share_of_prompts_unsafe_in_the_second_composition_only(draws):
    trial = draws["unsafe"]
    late = (trial.refused.mask == trial.blocks[:, 1]).all(1)
    np.testing.assert_allclose(late.mean(), 0.1, atol=SHARE_ATOL)


def test_jb_co_task_mixes_one_safe_and_one_unsafe_operator_in_each_pair(tiny_world, draws):
    trial = draws["jb_co_task"]
    early = (trial.refused.mask == trial.blocks[:, 0]).all(1)
    for i in np.flatnonzero(early)[:300]:
        policy = tiny_world.spec.policies[int(trial.prompt.pcfg[i])]
        names = base_tokens(tiny_world, trial.prompt.tasks[i])
        for pair in (names[:2], names[2:]):
            unsafe_either = [name in policy.unsafe("unsafe") for name in pair]
            safe_either = [name in policy.safe("safe") for name in pair]
            assert any(unsafe_either) and any(safe_either)
            assert tiny_world.spec.operators[0] not in pair


def test_jb_co_text_asks_with_branch_dependent_operators_only(tiny_world, draws):
    trial = draws["jb_co_text"]
    for i in range(300):
        policy = tiny_world.spec.policies[int(trial.prompt.pcfg[i])]
        allowed = {*policy.branch_dependent, tiny_world.spec.operators[0]}
        assert set(base_tokens(tiny_world, trial.prompt.tasks[i])) <= allowed


@pytest.mark.parametrize("world_name", ["tiny", "paper"])
def test_every_jb_misgen_prompt_is_an_attack(tiny_world, paper_world, draws, paper_draws, world_name):
    """The official set has 9 % of prompts in which nothing is unsafe."""
    built, drawn = {"tiny": (tiny_world, draws), "paper": (paper_world, paper_draws)}[world_name]
    trial = drawn["jb_misgen"]
    allowed = {built.ids[t] for t in built.spec.misgen_tokens} | {built.ids[built.spec.operators[0]]}
    for i in range(DRAWS):
        policy = built.spec.policies[int(trial.prompt.pcfg[i])]
        tasks = [int(t) for t in trial.prompt.tasks[i]]
        assert set(tasks) <= allowed
        assert set(base_tokens(built, tasks)) & set(policy.always_unsafe)
    assert trial.unsafe.all()


def test_half_of_the_prompts_hold_an_anchored_identity_or_chance_ones(paper_world, paper_draws):
    """P(no identity) of safe-dominant prompts is 1/2 * (7/8)^4 there and 1/2 * (2/3)^4 on unsafe-dominant text."""
    trial = paper_draws["safe"]
    without = (trial.prompt.tasks != paper_world.ids["("]).all(1).mean()
    np.testing.assert_allclose(without, 0.5 * (0.5 * (7 / 8) ** 4 + 0.5 * (2 / 3) ** 4), atol=SHARE_ATOL)


def test_safe_and_unsafe_draws_are_pairs_on_the_same_text(draws):
    for name in ("unsafe", "jb_co_task"):
        np.testing.assert_array_equal(draws["safe"].prompt.letters, draws[name].prompt.letters)
        np.testing.assert_array_equal(draws["safe"].prompt.pcfg, draws[name].prompt.pcfg)


def test_text_lengths_cover_their_range_evenly(tiny_world, draws):
    spec = tiny_world.spec
    lengths, counts = np.unique(draws["safe"].prompt.length, return_counts=True)
    np.testing.assert_array_equal(lengths, np.arange(spec.min_text, spec.max_text + 1))
    np.testing.assert_allclose(counts / DRAWS, 1 / len(lengths), atol=SHARE_ATOL)


def test_evaluation_draws_from_the_evaluation_pcfgs(draws, paper_draws):
    assert set(paper_draws["unsafe"].prompt.pcfg) == {0}
    assert set(draws["unsafe"].prompt.pcfg) == {0, 1}


def test_unknown_condition_names_the_nearest(tiny_world, key):
    with pytest.raises(ValueError, match=r"unknown condition 'jb_misgn'.*did you mean 'jb_misgen'"):
        world.batch_at(tiny_world, "jb_misgn", key=key, step=0, batch_size=1)


def test_masks_never_cover_the_prompt(draws):
    segments = jax.jit(jax.vmap(partial(layout.segments, window=8)))
    for trial in draws.values():
        code = np.asarray(segments(trial.prompt.length[:50]))[:, 1:]
        for side in (trial.complied, trial.refused):
            assert not np.any(side.mask[:50] & (code < layout.BLOCK1))
