"""The constrained likelihood against lists of tokens in float64, and a multiplier that finds the constraint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxsafety import keys
from jaxsafety.config import fields
from jaxsafety.methods import primal_dual
from jaxsafety.training import objective
from tests.methods.bound import bound
from tests.methods.lists import MODEL, PARAMS, PROMPTS, REFUSALS, SAFE, of_answer, pairs

# float32 sums in another order; of gradients, whose terms cancel.
RTOL, ATOL = 5e-6, 1e-6
METHOD = primal_dual.METHOD
UNSAFE = [True, False, True, False, True]
BATCH = pairs(unsafe=UNSAFE).replace(rejected=None)
NLL = {
    wanted: np.concatenate(
        [
            of_answer(PROMPTS[i], (REFUSALS if wanted else SAFE)[i])
            for i, unsafe in enumerate(UNSAFE)
            if unsafe == wanted
        ]
    )
    for wanted in (True, False)
}


def loss(params, batch=BATCH, *, multiplier=3.0, **options):
    config = METHOD.Config(**options)
    aux = jnp.log(jnp.float32(multiplier))
    return objective.make_loss(METHOD, MODEL, config, aux=aux, key=keys.root(0))(params, batch)


def stepped(batch=BATCH, *, parts=1, steps=1, **options):
    """A state before and after some steps, and the last one's means."""
    config, key, optimizer = METHOD.Config(**options), keys.root(0), optax.sgd(0.5)
    before = objective.init_state(METHOD, PARAMS, optimizer, config, key=key)
    step = objective.make_step(METHOD, MODEL, optimizer, config, key=key, total_steps=steps, parts=parts)
    run = jax.jit(lambda state: jax.lax.scan(lambda state, _: step(state, batch), state, length=steps))
    after, means = run(before)
    return before, after, {name: values[-1] for name, values in means.items()}


@pytest.mark.parametrize("multiplier", [0.01, 3.0])
def test_both_terms_match_lists(multiplier):
    value, metrics = loss(PARAMS, multiplier=multiplier, threshold=0.2)
    expected = (np.mean(NLL[False]) + multiplier * np.mean(NLL[True])) / (1 + multiplier)
    np.testing.assert_allclose(value, expected, rtol=RTOL)
    np.testing.assert_allclose(metrics["cost"], np.mean(NLL[True]), rtol=RTOL)
    np.testing.assert_allclose(metrics["excess"], np.mean(NLL[True]) - 0.2, rtol=RTOL)
    np.testing.assert_allclose(metrics["multiplier"], multiplier, rtol=RTOL)


def test_a_multiplier_of_one_weighs_both_means_alike_and_a_large_one_is_the_cost():
    np.testing.assert_allclose(loss(PARAMS, multiplier=1.0)[0], np.mean([*map(np.mean, NLL.values())]), rtol=RTOL)
    np.testing.assert_allclose(loss(PARAMS, multiplier=1e30)[0], np.mean(NLL[True]), rtol=RTOL)


@pytest.mark.parametrize("parts", [1, 5])
def test_a_step_multiplies_by_what_the_cost_exceeds(parts):
    """Of the whole batch, also where parts of it have no refusal."""
    _, after, _ = stepped(parts=parts, threshold=0.2, multiplier=2.0, multiplier_rate=0.3)
    np.testing.assert_allclose(np.exp(after.aux), 2 * np.exp(0.3 * (np.mean(NLL[True]) - 0.2)), rtol=RTOL)


def test_a_batch_without_refusals_leaves_the_multiplier_and_so_does_no_rate():
    none = pairs(unsafe=[False] * len(PROMPTS)).replace(rejected=None)
    for given, options in ((none, {}), (BATCH, {"multiplier_rate": 0.0})):
        before, after, _ = stepped(given, **options)
        assert before.aux == after.aux == 0 and not np.array_equal(before.params["table"], after.params["table"])


def test_the_constraint_is_met_where_a_fixed_penalty_of_the_same_beginning_misses_it():
    given = {"threshold": 0.3, "multiplier": 0.02, "steps": 150}
    _, _, short = stepped(multiplier_rate=0.0, **given)
    _, state, means = stepped(multiplier_rate=0.3, **given)
    assert short["cost"] > 2 * 0.3 and means["cost"] < 1.1 * 0.3
    assert np.exp(state.aux) > 0.02


def test_what_is_not_scored_and_padding_change_nothing():
    wild = jnp.where(BATCH.chosen.mask, BATCH.chosen.targets, 99)
    other = BATCH.replace(chosen=BATCH.chosen.replace(targets=wild))
    got, expected = (jax.value_and_grad(lambda params, b=batch: loss(params, b)[0])(PARAMS) for batch in (other, BATCH))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    longer = pairs(unsafe=UNSAFE, length=40).replace(rejected=None)
    np.testing.assert_allclose(loss(PARAMS, longer)[0], expected[0], rtol=RTOL)


def test_gradients_are_finite_differences_and_with_little_multiplier_those_of_sft_on_safe_answers():
    value = jax.jit(lambda params: loss(params)[0])
    check_grads(value, (PARAMS,), order=1, modes=("rev",), atol=2e-3, rtol=2e-2, eps=1e-2)
    kept = BATCH.chosen.replace(mask=BATCH.chosen.mask & ~BATCH.unsafe[:, None])
    sft = jax.grad(lambda params: bound("sft", MODEL)(params, BATCH.replace(chosen=kept))[0])(PARAMS)
    found = jax.grad(lambda params: loss(params, multiplier=1e-9)[0])(PARAMS)
    np.testing.assert_allclose(found["table"], sft["table"], rtol=RTOL, atol=ATOL)


def test_lanes_have_multipliers_of_their_own():
    optimizer, key, rates = optax.sgd(0.5), keys.root(0), jnp.asarray([0.0, 0.3])

    def end(rate):
        config = fields.at_point(METHOD.Config(), {"multiplier_rate": rate})
        state = objective.init_state(METHOD, PARAMS, optimizer, config, key=key)
        return objective.make_step(METHOD, MODEL, optimizer, config, key=key, total_steps=1)(state, BATCH)[0].aux

    found = jax.jit(jax.vmap(end))(rates)
    np.testing.assert_allclose(found, rates * (np.mean(NLL[True]) - 0.1), rtol=RTOL)
