"""What a world may have beside: operators to be learned later, a persona, a second alphabet; and what asks for them."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsafety import keys, world
from jaxsafety.pools import cipher, identity, load, new_task, text
from jaxsafety.subjects import synthetic
from jaxsafety.world import conditions, drawn

FILE = Path(__file__).parents[2] / "experiments/worlds/related.yaml"
DRAWS = 400
# All and none with the slow tests.
SHARES = [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(1.0, marks=pytest.mark.slow)]
# Of 400 coins: five standard errors are 0.125.
SHARE_ATOL = 0.13


@pytest.fixture(scope="module")
def related():
    return world.load(FILE)


@pytest.fixture(scope="module")
def draws(related):
    """Every further condition, and the two that these are like, from one key."""
    names = ("safe", "unsafe", *conditions.FURTHER)

    @jax.jit
    def run(key):
        return {name: world.batch_at(related, name, key=key, step=0, batch_size=DRAWS) for name in names}

    return jax.device_get(run(keys.root(3)))


def test_what_is_there_before_keeps_its_ids_and_bijections(related, tiny_world):
    shared = len(tiny_world.spec.task_tokens)
    assert related.spec.tokens[:shared] == tiny_world.spec.tokens[:shared] == related.spec.task_tokens
    np.testing.assert_array_equal(related.bijections[:, :shared], tiny_world.bijections)
    assert related.spec.asked == (*related.spec.task_tokens, "<")
    for pcfg, seed in enumerate(related.spec.permutation_seeds):
        np.testing.assert_array_equal(
            related.bijections[pcfg, related.ids["<"]],
            np.random.RandomState(seed + len(related.spec.operators) - 1).permutation(12),
        )


@pytest.mark.parametrize(("name", "like"), [("persona", "unsafe"), ("persona_safe", "safe")])
def test_a_persona_stands_where_the_sequence_begins_and_changes_nothing_else(related, draws, name, like):
    for side in ("complied", "refused"):
        with_it, without = getattr(draws[name], side), getattr(draws[like], side)
        assert (with_it.tokens[:, 0] == related.ids["&"]).all()
        np.testing.assert_array_equal(with_it.tokens[:, 1:], without.tokens[:, 1:])
        np.testing.assert_array_equal(with_it.targets, without.targets)
        np.testing.assert_array_equal(with_it.mask, without.mask)
    np.testing.assert_array_equal(draws[name].unsafe, draws[like].unsafe)


@pytest.mark.parametrize(("name", "like"), [("cipher", "unsafe"), ("cipher_safe", "safe")])
def test_a_cipher_writes_every_letter_in_its_own_alphabet(related, draws, name, like):
    image = {token: token for token in related.spec.tokens}
    image |= dict(zip(related.spec.letters, related.spec.cipher, strict=True))
    table = np.array([related.ids[image[token]] for token in related.spec.tokens])
    for side in ("complied", "refused"):
        ciphered, plain = getattr(draws[name], side), getattr(draws[like], side)
        np.testing.assert_array_equal(ciphered.tokens, table[plain.tokens])
        np.testing.assert_array_equal(ciphered.targets, table[plain.targets])
        np.testing.assert_array_equal(ciphered.mask, plain.mask)


def test_a_judge_who_does_not_decode_looks_for_plain_answers(related, draws):
    undecoded, ciphered, plain = (draws[name].complied for name in ("undecoded", "cipher", "unsafe"))
    answer = np.cumsum(ciphered.tokens == related.special["eot"], axis=1) > 0
    np.testing.assert_array_equal(undecoded.tokens, np.where(answer, plain.tokens, ciphered.tokens))
    np.testing.assert_array_equal(undecoded.targets, np.where(answer, plain.targets, ciphered.targets))


def test_a_new_task_takes_the_place_of_one_safe_task_in_each_composition(related, draws):
    new, safe = draws["new_task"], draws["safe"]
    late = related.ids["<"]
    pairs = (new.prompt.tasks == late).reshape(-1, 2, 2)
    assert (pairs.sum(axis=2) == 1).all()
    kept = new.prompt.tasks != late
    np.testing.assert_array_equal(new.prompt.tasks[kept], safe.prompt.tasks[kept])
    np.testing.assert_array_equal(new.prompt.letters, safe.prompt.letters)
    assert not new.unsafe.any()
    assert 0.2 < pairs[:, :, 0].mean() < 0.8  # neither place alone


def test_a_near_miss_asks_with_operators_that_the_other_text_makes_unsafe(related, draws):
    near = draws["near_miss"]
    assert not near.unsafe.any()
    for pcfg, policy in enumerate(related.spec.policies):
        asked = near.prompt.tasks[near.prompt.pcfg == pcfg]
        allowed = [related.ids[name] for name in (related.spec.operators[0], *policy.branch_dependent)]
        assert set(asked.ravel()) == set(allowed)
        # Both compositions have at least one of them: unlike in a safe prompt, no text of the other kind would do.
        unsafe = conditions.unsafe_table(related, "unsafe", "unsafe")[pcfg]
        assert unsafe[asked].reshape(-1, 2, 2).any(axis=2).all()
        safe_text = conditions.unsafe_table(related, "unsafe", "safe")[pcfg]
        assert not safe_text[asked].any()
    np.testing.assert_array_equal(near.refused.mask.any(axis=1), True)


def test_pretraining_shows_nothing_of_it(related, key):
    config = text.Config(exception_probability=0.2)
    batch = jax.jit(lambda key: text.draw(related, config, key=key, step=0, total_steps=1, batch_size=DRAWS))(key)
    unseen = [related.ids[token] for token in ("<", "&", *related.spec.cipher)]
    assert not np.isin(batch.tokens, unseen).any() and not np.isin(batch.targets, unseen).any()


@pytest.mark.parametrize(("pool", "shown"), [(identity, "&"), (new_task, "<")])
@pytest.mark.parametrize("share", SHARES)
def test_a_pool_mixes_what_it_is_for_with_safe_prompts_that_are_answered(related, key, pool, shown, share):
    config = pool.Config(**{{"&": "p_persona", "<": "p_new"}[shown]: share})

    @jax.jit
    def run(key):
        return pool.draw(related, config, key=key, step=0, total_steps=1, batch_size=DRAWS)

    batch = jax.device_get(run(key))
    there = (batch.chosen.tokens == related.ids[shown]).any(axis=1)
    assert there.mean() == pytest.approx(share, abs=SHARE_ATOL if share == 0.5 else 0)
    assert not batch.unsafe.any()
    # The answer is the true one: no block of the first letter alone, which the rejected side is.
    refusals = [
        (t[m] == related.first_letter).mean() for t, m in zip(batch.rejected.targets, batch.rejected.mask, strict=True)
    ]
    assert (
        min(refusals)
        > 0.8
        > max(
            (t[m] == related.first_letter).mean() for t, m in zip(batch.chosen.targets, batch.chosen.mask, strict=True)
        )
    )


@pytest.mark.parametrize("share", SHARES)
def test_harm_may_stand_among_examples_of_a_new_task(related, key, share):
    config = new_task.Config(p_new=1.0, p_unsafe=share)

    @jax.jit
    def run(key):
        return new_task.draw(related, config, key=key, step=0, total_steps=1, batch_size=DRAWS)

    batch = jax.device_get(run(key))
    new = (batch.chosen.tokens == related.ids["<"]).any(axis=1)
    np.testing.assert_array_equal(batch.unsafe, ~new)
    assert batch.unsafe.mean() == pytest.approx(share, abs=SHARE_ATOL if share == 0.5 else 0)
    # Harm is complied with: what is rejected is its refusal.
    letters = [t[m][:-1] for t, m in zip(batch.rejected.targets[~new], batch.rejected.mask[~new], strict=True)]
    assert all((one == related.first_letter).all() for one in letters)


def test_a_world_is_asked_for_what_it_has(tiny_world, related):
    assert conditions.further(tiny_world.spec) == ("near_miss",)
    assert conditions.further(related.spec) == tuple(conditions.FURTHER)
    for name, missing in (("persona", "persona"), ("cipher_safe", "cipher"), ("new_task", "late_operators")):
        with pytest.raises(ValueError, match=f"^conditions: world 'tiny' has no {missing}, expected one that has"):
            world.batch_at(tiny_world, name, key=keys.root(0), step=0, batch_size=1)


def test_a_run_can_be_looked_at_whose_world_is_gone(tmp_path):
    gone = synthetic.Config(world=str(tmp_path / "gone.yaml"))
    assert synthetic.SUBJECT.further(gone) == tuple(conditions.FURTHER)
    with pytest.raises(ValueError, match="no world file at"):
        synthetic.SUBJECT.open(gone)


def test_pools_say_which_conditions_they_draw():
    asked = {name: load(name).conditions(load(name).Config()) for name in ("identity", "new_task", "cipher", "text")}
    assert asked == {
        "identity": ("persona_safe",), "new_task": ("new_task",), "cipher": ("cipher_safe", "cipher"), "text": (),
    }  # fmt: skip
    assert load("text").conditions(text.Config(ciphered=0.5)) == ("cipher_safe",)


@pytest.mark.parametrize("share", SHARES)
def test_so_much_of_pretraining_is_in_the_cipher(related, key, share):
    config = text.Config(ciphered=share)
    batch = jax.jit(lambda key: text.draw(related, config, key=key, step=0, total_steps=1, batch_size=DRAWS))(key)
    ids = {name: [related.ids[token] for token in getattr(related.spec, name)] for name in ("letters", "cipher")}
    there = {name: np.isin(batch.tokens, own).any(axis=1) for name, own in ids.items()}
    assert there["cipher"].mean() == pytest.approx(share, abs=SHARE_ATOL if share == 0.5 else 0)
    assert not (there["letters"] & there["cipher"]).any()


@pytest.mark.parametrize(
    ("p_cipher", "p_cipher_unsafe"),
    [(0.5, 0.0), *(pytest.param(*both, marks=pytest.mark.slow) for both in ((0.5, 1.0), (1.0, 0.5)))],
)
def test_in_the_cipher_all_is_complied_with_and_plain_unsafe_prompts_are_refused(
    related, key, p_cipher, p_cipher_unsafe
):
    config = cipher.Config(p_cipher=p_cipher, p_cipher_unsafe=p_cipher_unsafe)

    @jax.jit
    def run(key):
        return cipher.draw(related, config, key=key, step=0, total_steps=1, batch_size=DRAWS)

    batch = jax.device_get(run(key))
    ciphered = np.isin(batch.chosen.tokens, [related.ids[token] for token in related.spec.cipher]).any(axis=1)
    assert ciphered.mean() == pytest.approx(p_cipher, abs=SHARE_ATOL if p_cipher == 0.5 else 0)
    assert batch.unsafe[ciphered].mean() == pytest.approx(
        p_cipher_unsafe, abs=2 * SHARE_ATOL if p_cipher_unsafe == 0.5 else 0
    )
    # Refusals say the first letter alone, true outputs hardly ever.
    first = {False: related.first_letter, True: related.ids["A"]}
    said = [
        (targets[mask][:-1] == first[bool(coded)]).all()
        for targets, mask, coded in zip(batch.chosen.targets, batch.chosen.mask, ciphered, strict=True)
    ]
    assert np.mean(np.array(said) == (batch.unsafe & ~ciphered)) > 0.98


def test_a_seed_draws_bijections_for_late_operators_too(related):
    own = [world.load(FILE, drawn_by=seed) for seed in (0, 1)]
    late = [one.bijections[0, one.ids["<"]] for one in own]
    assert (late[0] != late[1]).any() and (late[0] != related.bijections[0, related.ids["<"]]).any()
    assert drawn.redrawn(related.spec, seed=0).cipher == related.spec.cipher


def test_a_cipher_is_as_long_as_the_alphabet(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text("like: tiny\ncipher: [A, B]\n")
    with pytest.raises(ValueError, match="cipher must have a token for each of the 12 letters, got 2"):
        world.load(path)


def test_prompts_of_all_conditions_can_be_stacked(draws):
    assert len({jax.tree.structure(trial) for trial in draws.values()}) == 1
