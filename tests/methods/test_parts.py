"""A batch taken in parts, or by several devices, has the loss, the metrics and the gradient of the whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsafety import keys, methods, world
from jaxsafety.models import gpt
from jaxsafety.models.through import through
from jaxsafety.training import answers, objective, stepping
from jaxsafety.types import TrainState
from tests.methods.bound import bound, next_token

# Two float32 programs that sum the same terms in another order.
RTOL = 2e-5
WEIGHTS = {"weight_chosen": 0.5, "weight_rejected": 0.2}
LONGER = (
    *("dpo", "npo", "sft", "unlearn", "derta", "constrained_sft", "ipo", "robust_dpo", "simpo", "simnpo", "graddiff"),
    *("rmu", "circuit_breakers", "adversarial"),
)
OPTIONS = {"dpo": WEIGHTS, "unlearn": WEIGHTS | {"ascent_bound": np.inf}, "npo": {"retain": "kl"}}


@pytest.fixture(scope="module")
def batch(tiny_world):
    drawn = partial(world.mixed_at, tiny_world, step=0, batch_size=8, p_unsafe=0.5, mix="prompt")
    return jax.jit(lambda key: world.preferences(drawn(key=key)))(keys.root(0))


@pytest.fixture(scope="module")
def reference(tiny_config):
    return gpt.init(tiny_config, key=keys.root(7))


def state_of(params) -> TrainState:
    return stepping.init_state(params, optax.identity())


@pytest.mark.parametrize(
    "name",
    [
        "deep_alignment",
        *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER),
    ],
)
def test_parts_have_loss_metrics_and_gradient_of_the_whole(tiny_config, tiny_gpt, batch, reference, name):
    model, method = gpt.model(tiny_config), methods.load(name)
    options = OPTIONS.get(name, {})
    config, key = method.Config(**options), keys.root(0)
    given = jax.jit(lambda q, b: objective.prepared(method, model, b, config, reference=q, key=key))(reference, batch)
    begun = objective.init_state(method, tiny_gpt, optax.identity(), config, key=key)
    loss = bound(name, model, reference=reference, aux=begun.aux, **options)
    (expected, wanted), whole = jax.jit(jax.value_and_grad(loss, has_aux=True))(tiny_gpt, batch)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.device_get(jax.tree.leaves(whole))))
    for parts in (1, 4):
        gradient = objective.make_gradient(method, model, config, key=key, total_steps=1, parts=parts)
        value, metrics, grads = jax.jit(gradient)(begun, given)
        np.testing.assert_allclose(value, expected, rtol=RTOL)
        assert metrics.keys() == wanted.keys()
        for metric, own in metrics.items():
            np.testing.assert_allclose(own, wanted[metric], rtol=RTOL, atol=1e-6, err_msg=f"{metric}, {parts} parts")
        for own, other in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(own, other, rtol=RTOL, atol=RTOL * norm)


@pytest.mark.parametrize(
    "name",
    [
        "derta",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("deep_alignment", "constrained_sft", "dpo", "npo")),
    ],
)
def test_devices_have_loss_and_gradient_of_one(tiny_config, tiny_gpt, batch, reference, name):
    """The batch over two and four of them, the model on each."""
    model, method = gpt.model(tiny_config), methods.load(name)
    config, key = method.Config(**OPTIONS.get(name, {})), keys.root(0)

    def run(params, batch, reference):
        given = objective.prepared(method, model, batch, config, reference=reference, key=key)
        gradient = objective.make_gradient(method, model, config, key=key, total_steps=1, parts=1)
        value, _, grads = gradient(state_of(params), given)
        return value, grads

    found = []
    for count in (1, 2, 4):
        mesh = jax.make_mesh((count,), ("b",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        shared, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("b",), ()))
        given = jax.device_put(batch, shared), jax.device_put(reference, whole)
        found.append(jax.device_get(jax.jit(run)(jax.device_put(tiny_gpt, whole), *given)))
    (value, whole), *others = found
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(whole)))
    for other, grads in others:
        np.testing.assert_allclose(other, value, rtol=RTOL)
        for own, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(own, expected, rtol=RTOL, atol=RTOL * norm)


def next_tokens(model, *, parts):
    totals = partial(answers.next_token, model)
    return stepping.make_gradient(lambda p, b, aux, **_: totals(p, b), key=keys.root(0), total_steps=1, parts=parts)


def test_parts_with_few_scored_tokens_weigh_by_their_tokens(tiny_config, tiny_gpt, batch):
    # One part keeps a single scored token: a mean of means would weigh it like all the others.
    mask = np.array(batch.chosen.mask)
    mask[:4] = False
    mask[0, np.flatnonzero(np.asarray(batch.chosen.mask)[0])[0]] = True
    uneven, model = batch.chosen.replace(mask=jnp.asarray(mask)), gpt.model(tiny_config)
    value, _, _ = jax.jit(next_tokens(model, parts=2))(state_of(tiny_gpt), uneven)
    expected, _ = jax.jit(next_token(model))(tiny_gpt, uneven)
    np.testing.assert_allclose(value, expected, rtol=RTOL)


def test_two_terms_with_counts_of_their_own_are_each_over_the_whole_batch():
    """Terms over tokens and over examples: every part divides by the counts of all of them."""
    values, kept = jnp.arange(8.0), jnp.asarray([1, 0, 0, 0, 1, 1, 1, 1], bool)

    def totals(params, part, aux, **_):
        numbers, mask = part
        terms = {
            "some": (jnp.sum(jnp.where(mask, params["x"] * numbers, 0.0)), jnp.sum(mask, dtype=jnp.float32)),
            "all": (jnp.sum(params["x"] ** 2 * numbers), jnp.float32(len(numbers))),
        }
        return terms, {}

    for parts in (1, 2, 4):
        gradient = stepping.make_gradient(totals, key=keys.root(0), total_steps=1, parts=parts)
        value, means, slope = jax.jit(gradient)(state_of({"x": jnp.float32(3.0)}), (values, kept))
        some, every = 22 / 5, 28 / 8
        np.testing.assert_allclose(value, 3 * some + 9 * every, rtol=RTOL)
        np.testing.assert_allclose(slope["x"], some + 6 * every, rtol=RTOL)
        np.testing.assert_allclose([means["loss/some"], means["loss/all"]], [3 * some, 9 * every], rtol=RTOL)


def test_counting_the_whole_batch_costs_no_pass_of_the_model(tiny_config, tiny_gpt, batch):
    """Counts follow from masks, so the compiler drops the model from the pass that takes them."""

    def products(parts):
        program = jax.jit(next_tokens(gpt.model(tiny_config), parts=parts))
        return program.lower(state_of(tiny_gpt), batch.chosen).compile().as_text().count(" dot(")

    assert 0 < products(2) <= products(1)


def test_gradients_of_bfloat16_parameters_are_summed_in_float32(tiny_config, tiny_gpt, batch):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_gpt)
    model = through(gpt.model(tiny_config), lambda p: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p))
    _, _, grads = jax.jit(next_tokens(model, parts=2))(state_of(half), batch.chosen)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
