"""Tamper resistance against an attack and a loss of lists in float64; the gradient that goes straight through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.methods import tamper_resistant
from tests.methods.bound import bound
from tests.methods.lists import MODEL, PARAMS, PROMPTS, REFUSALS, REPLIES, SAFE, STATES, TABLE, nll, of_answer, pairs

# float32 sums in another order, and the steps of the attack.
RTOL = 1e-5
UNSAFE = [True, False, True, True, True]
TAUGHT, HELD = (0, 3), (2, 4)
BATCH = pairs(unsafe=UNSAFE)


def attacked(rate, steps):
    """The table after gradient descent on the mean over tokens of two harmful answers."""
    table = TABLE.copy()
    for _ in range(steps):
        slope = np.zeros_like(table)
        for row in TAUGHT:
            for i, token in enumerate(REPLIES[row]):
                before = PROMPTS[row] + REPLIES[row][:i]
                state = sum(place * own for place, own in enumerate(before, 1)) % STATES
                slope[state] += np.exp(table[state]) / np.exp(table[state]).sum()
                slope[state, token] -= 1
        table -= rate * slope / sum(len(REPLIES[row]) for row in TAUGHT)
    return table


def values(table, answers, rows):
    return [nll(PROMPTS[row] + answers[row][:i], token, table) for row in rows for i, token in enumerate(answers[row])]


def entropies(table):
    found = []
    for row in HELD:
        for i in range(len(REPLIES[row])):
            before = PROMPTS[row] + REPLIES[row][:i]
            logits = table[sum(place * own for place, own in enumerate(before, 1)) % STATES]
            shares = np.exp(logits) / np.exp(logits).sum()
            found.append(-(shares * np.log(shares)).sum())
    return found


def value(params, batch=BATCH, **options):
    return bound("tamper_resistant", MODEL, **options)(params, batch)


@pytest.mark.parametrize("resist", ["refusal", "entropy"])
def test_the_loss_matches_lists(resist):
    kept = [of_answer(PROMPTS[i], (REFUSALS if UNSAFE[i] else SAFE)[i]) for i in range(len(PROMPTS))]
    grid = np.array([[2.0, 0.4], [0.0, 5.0], [0.0, 0.7]])
    found, metrics = jax.jit(
        jax.vmap(lambda pair: value(PARAMS, resist=resist, inner_rate=pair[0], weight=pair[1], inner_steps=3))
    )(jnp.float32(grid))
    for lane, (rate, weight) in enumerate(grid):
        table = attacked(rate, 3)
        resisted = np.mean(values(table, REFUSALS, HELD)) if resist == "refusal" else -np.mean(entropies(table))
        np.testing.assert_allclose(found[lane], np.mean(np.concatenate(kept)) + weight * resisted, rtol=RTOL)
        for when, own in (("before", TABLE), ("after", table)):
            expected = np.mean(values(own, REPLIES, TAUGHT))
            np.testing.assert_allclose(metrics[f"harmful_nll/{when}"][lane], expected, rtol=RTOL)


def test_the_gradient_goes_straight_through_the_attack():
    table = jnp.float32(attacked(2.0, 3))
    found = jax.jit(jax.grad(lambda p: value(p, inner_rate=2.0, inner_steps=3, weight=0.4)[0]))(PARAMS)
    held = BATCH.replace(unsafe=jnp.asarray([False, False, True, False, True]))
    held = held.replace(chosen=held.chosen.replace(mask=held.chosen.mask & held.unsafe[:, None]))
    slopes = jax.jit(lambda p, b: jax.grad(lambda p: bound("sft", MODEL)(p, b)[0])(p)["table"])
    expected = slopes(PARAMS, BATCH) + 0.4 * slopes({"table": table}, held)
    np.testing.assert_allclose(found["table"], expected, rtol=RTOL, atol=1e-6)


def test_of_a_quadratic_the_attack_is_a_power():
    params = {"x": jnp.float32([1.0, -2.0]), "y": {"z": jnp.float32(3.0)}}

    def loss(params):
        return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    end, curve = tamper_resistant.attacked(loss, params, rate=0.1, steps=4)
    jax.tree.map(lambda got, own: np.testing.assert_allclose(got, 0.9**4 * own, rtol=RTOL), end, params)
    np.testing.assert_allclose(curve, 7 * 0.81 ** np.arange(4), rtol=RTOL)
    slope = jax.grad(lambda p: tamper_resistant.attacked(loss, p, rate=0.1, steps=4)[0]["y"]["z"] ** 2)(params)
    # Twice where the attack ends, not 0.9^4 times that.
    np.testing.assert_allclose(slope["y"]["z"], 2 * 0.9**4 * 3, rtol=RTOL)
    assert not slope["x"].any()


def test_every_other_unsafe_example_is_attacked():
    found = tamper_resistant.halves(jnp.asarray([False, True, True, False, True, False]))
    np.testing.assert_array_equal(found, [[0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]])


def test_without_unsafe_prompts_it_is_sft_and_with_one_nothing_is_resisted():
    slope = jax.jit(jax.value_and_grad(lambda params, batch: value(params, batch)[0]))
    expected = jax.jit(jax.value_and_grad(lambda params, batch: bound("sft", MODEL)(params, batch)[0]))
    for unsafe in ([False] * 5, [False, True, False, False, False]):
        batch = pairs(unsafe=unsafe)
        for got, own in zip(
            jax.tree.leaves(slope(PARAMS, batch)), jax.tree.leaves(expected(PARAMS, batch)), strict=True
        ):
            np.testing.assert_allclose(got, own, rtol=RTOL, atol=1e-7)


def test_padding_and_what_is_not_scored_change_neither_value_nor_gradient():
    slope = jax.jit(jax.value_and_grad(lambda params, batch: value(params, batch)[0]))
    expected = slope(PARAMS, BATCH)
    np.testing.assert_allclose(slope(PARAMS, pairs(unsafe=UNSAFE, length=40))[0], expected[0], rtol=RTOL)
    sides = (side.replace(targets=jnp.where(side.mask, side.targets, 99)) for side in (BATCH.chosen, BATCH.rejected))
    other = BATCH.replace(**dict(zip(("chosen", "rejected"), sides, strict=True)))
    jax.tree.map(np.testing.assert_array_equal, slope(PARAMS, other), expected)


def test_a_batch_is_taken_whole():
    assert not tamper_resistant.METHOD.needs(tamper_resistant.Config()).divisible
    with pytest.raises(ValueError, match="inner_steps must be >= 1"):
        tamper_resistant.Config(inner_steps=0)
