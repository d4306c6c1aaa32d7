"""The constrained policy against enumeration and closed forms, and what either method of trajectories leaves alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsafety import keys
from jaxsafety.methods import classify, constrained
from jaxsafety.pools import labelled
from jaxsafety.subjects import trajectory
from jaxsafety.training import objective

# float64, and float32 that is summed in another order.
EXACT, RTOL = 1e-12, 2e-5
SMALL = trajectory.Config(trajectory=2, symbols=3, tempting=2, limit=2, width=4)
RETURNS, COSTS = np.array([[2.0, 8.0], [3.5, 3.5]]), np.array([[0.0, 1.0], [0.25, 0.5]])


@pytest.mark.parametrize("multiplier", [0.01, 1.0, 30.0])
def test_the_lagrangian_is_return_minus_multiplied_cost_over_one_and_the_multiplier(multiplier):
    with jax.enable_x64(True):
        given = jnp.asarray(RETURNS), jnp.asarray(COSTS)
        found = constrained.lagrangian(*given, log_multiplier=jnp.log(multiplier))
    np.testing.assert_allclose(found, (RETURNS - multiplier * COSTS) / (1 + multiplier), rtol=EXACT)


def test_a_multiplier_beyond_all_numbers_leaves_the_cost():
    found = constrained.lagrangian(jnp.asarray(RETURNS), jnp.asarray(COSTS), log_multiplier=1e4)
    np.testing.assert_array_equal(found, -COSTS)


@pytest.mark.parametrize("k", [2, 3])
def test_the_expected_gradient_is_that_of_the_expected_value(k):
    """Over all draws of k trajectories, each as likely as the policy has it: exact, no sample."""
    every = np.array(list(itertools.product(range(3), repeat=2)))
    draws = np.array(list(itertools.product(range(len(every)), repeat=k)))
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), trajectory.init(SMALL, keys.root(0))
        )
        values = rng.normal(size=len(every))

        def logprobs(policy):
            return trajectory.said(SMALL.task, params | {"policy": policy}, jnp.asarray(every)).logprobs

        def estimated(policy):
            said = logprobs(policy)[draws]
            likely = jax.lax.stop_gradient(jnp.exp(jnp.sum(said, axis=1)))
            return jnp.sum(likely * constrained.score_function(said, jnp.asarray(values[draws])))

        found = jax.grad(estimated)(params["policy"])
        exact = jax.grad(lambda policy: -jnp.sum(jnp.exp(logprobs(policy)) * values))(params["policy"])
    assert np.abs(exact).max() > 0.1
    np.testing.assert_allclose(found, exact, atol=EXACT)


def test_no_gradient_flows_into_values_and_equal_ones_have_none():
    values, said = jnp.asarray(RETURNS), -jnp.asarray(COSTS)
    loss = lambda said, values: jnp.sum(constrained.score_function(said, values))  # noqa: E731
    to_said, to_values = jax.grad(loss, argnums=(0, 1))(said, values)
    np.testing.assert_array_equal(to_values, 0)
    np.testing.assert_array_equal(to_said[1], 0)
    # Of two, each has half of the distance to the other.
    np.testing.assert_array_equal(to_said[0], [3, -3])


def test_the_multiplier_is_a_product_of_what_every_step_exceeded():
    config, costs = constrained.Config(threshold=0.1, multiplier=10.0, multiplier_rate=0.5), [1.0, 0.0, 0.3]
    aux = constrained.init_aux({}, key=keys.root(0), config=config)
    for cost in costs:
        aux = constrained.update_aux(aux, {"cost": jnp.float32(cost)}, config=config)
    np.testing.assert_allclose(np.exp(aux), 10 * np.exp(0.5 * sum(cost - 0.1 for cost in costs)), rtol=RTOL)
    fixed = constrained.Config(multiplier_rate=0.0)
    start = constrained.init_aux({}, key=keys.root(0), config=fixed)
    assert constrained.update_aux(start, {"cost": jnp.float32(1)}, config=fixed) == start


def test_the_cross_entropy_is_that_of_the_label():
    logits, labels = np.array([2.0, -1.0, 0.5]), np.array([True, True, False])
    with jax.enable_x64(True):
        found = classify.classify(jnp.asarray(logits), jnp.asarray(labels))
    probability = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(found, -np.log(np.where(labels, probability, 1 - probability)), rtol=EXACT)


def stepped(method, config, *, parts=1):
    """A state before and after a step on eight examples, and the means."""
    subject, key = trajectory.opened(SMALL), keys.root(3)
    params = subject.init(key)
    batch = labelled.draw(
        subject.source, labelled.Config(), key=keys.stream(key, "tune"), step=0, total_steps=1, batch_size=8
    )
    before = objective.init_state(method, params, optax.sgd(0.1), config, key=key)
    step = objective.make_step(
        method, subject.training, optax.sgd(0.1), config, key=key, total_steps=1, parts=parts
    )  # fmt: skip
    batch = objective.prepared(method, subject.training, batch, config, reference=None, key=key)
    return (before, *jax.jit(step)(before, batch))


@pytest.mark.parametrize(
    ("method", "moved", "kept"), [(classify, "classifier", "policy"), (constrained, "policy", "classifier")]
)
def test_each_method_trains_its_part_alone(method, moved, kept):
    before, after, _ = stepped(method.METHOD, method.Config())
    same = jax.tree.map(lambda one, other: bool(jnp.all(one == other)), before.params, after.params)
    assert all(jax.tree.leaves(same[kept])) and not any(jax.tree.leaves(same[moved]))


@pytest.mark.parametrize("cost", ["classifier", "tempting"])
def test_a_batch_in_parts_moves_policy_and_multiplier_as_the_whole(cost):
    config = constrained.Config(cost=cost, multiplier=2.0)
    (_, whole, means), (_, parts, others) = (stepped(constrained.METHOD, config, parts=count) for count in (1, 4))
    np.testing.assert_allclose(parts.params["policy"], whole.params["policy"], rtol=RTOL, atol=1e-6)
    np.testing.assert_allclose(parts.aux, whole.aux, rtol=RTOL)
    for name, value in means.items():
        np.testing.assert_allclose(others[name], value, rtol=RTOL, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(
        whole.aux, np.log(2) + config.multiplier_rate * (means["cost"] - config.threshold), rtol=RTOL
    )
