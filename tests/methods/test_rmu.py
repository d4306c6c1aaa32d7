"""Representation misdirection against lists in float64; what it trains, and what stays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxsafety import keys, tree
from jaxsafety.methods import rmu
from jaxsafety.models import llama, lora
from jaxsafety.models.through import through
from jaxsafety.training import hidden, objective
from tests.methods.bound import bound
from tests.methods.gpts import BATCH, MODEL, OTHER, PARAMS, UNSAFE, answer_places, states
from tests.methods.lists import LENGTH, VOCAB, pairs

# float32 sums in another order.
RTOL = 1e-5
WORDS = jax.random.key_data(keys.root(3))
_RNG = np.random.default_rng(0)
HARMFUL, SAFE, KEPT = _RNG.normal(size=(3, 2, 4, 3))
GOAL, MASKS = np.array([1.0, -2.0, 0.5]), _RNG.uniform(size=(2, 2, 4)) < 0.6


def of_arrays(harmful=HARMFUL, safe=SAFE, kept=KEPT, alpha=0.7):
    arrays = (jnp.asarray(one, jnp.float32) for one in (harmful, safe, kept))
    masks = {"on_harmful": jnp.asarray(MASKS[0]), "on_safe": jnp.asarray(MASKS[1])}
    return rmu.rmu(*arrays, goal=jnp.float32(GOAL), alpha=alpha, **masks)


def test_terms_match_lists():
    found = of_arrays()
    for name, weight, pairs_, mask in (
        ("forget", 1, [(h, GOAL) for h in HARMFUL.reshape(-1, 3)], MASKS[0]),
        ("retain", 0.7, list(zip(SAFE.reshape(-1, 3), KEPT.reshape(-1, 3), strict=True)), MASKS[1]),
    ):
        values = [sum((a - b) ** 2) for (a, b), on in zip(pairs_, mask.ravel(), strict=True) if on]
        np.testing.assert_allclose(found[name], (weight * sum(values), len(values)), rtol=RTOL)


def test_there_and_where_it_was_it_is_zero_and_what_is_left_out_may_be_anything():
    found = of_arrays(np.broadcast_to(GOAL, HARMFUL.shape), KEPT)
    assert [float(total) for total, _ in found.values()] == [0, 0]
    off = ~MASKS[..., None]
    whole = jax.jit(lambda *arrays: sum(total for total, _ in of_arrays(*arrays).values()))
    holed = (np.where(mask, np.nan, one) for one, mask in ((HARMFUL, off[0]), (SAFE, off[1]), (KEPT, off[1])))
    got, expected = (jax.value_and_grad(whole)(*map(jnp.float32, given)) for given in (holed, (HARMFUL, SAFE, KEPT)))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    check_grads(whole, tuple(map(jnp.float32, (HARMFUL, SAFE, KEPT))), order=1, modes=("rev",), rtol=1e-2)


def loss(params, batch=BATCH, **options):
    return bound("rmu", MODEL, reference=OTHER, aux=WORDS, layer=0.5, **options)(params, batch)[0]


def test_the_loss_is_that_of_the_answers_own_tokens():
    unit = np.asarray(hidden.direction(WORDS, width=8), float)
    harmful, safe, kept = (
        np.asarray(states(params, side.tokens)[0], float)
        for params, side in ((PARAMS, BATCH.rejected), (PARAMS, BATCH.chosen), (OTHER, BATCH.chosen))
    )
    pushed, held = [], []
    for row, unsafe in enumerate(UNSAFE):
        if unsafe:
            pushed += [((harmful[row, i] - 3 * unit) ** 2).sum() for i in answer_places(BATCH.rejected.mask)[row]]
        else:
            held += [((safe[row, i] - kept[row, i]) ** 2).sum() for i in answer_places(BATCH.chosen.mask)[row]]
    grid = jnp.float32([[3, 2], [0, 0.5]])
    made = jax.jit(jax.vmap(lambda pair: loss(PARAMS, coefficient=pair[0], alpha=pair[1])))(grid)
    np.testing.assert_allclose(made[0], np.mean(pushed) + 2 * np.mean(held), rtol=RTOL)
    assert made[1] != made[0] and rmu.METHOD.needs(rmu.Config()).unsafe


def test_padding_changes_nothing():
    value = jax.jit(lambda batch: loss(PARAMS, batch))
    np.testing.assert_allclose(value(pairs(unsafe=UNSAFE, length=LENGTH + 6)), value(BATCH), rtol=RTOL)


@pytest.mark.parametrize(("depth", "share", "layers"), [(32, 0.25, [5, 6, 7]), (3, 1.0, [0, 1, 2]), (2, 0.5, [0])])
def test_the_layer_and_the_two_before_it_are_trained(depth, share, layers):
    assert list(rmu.trained_layers(depth, share=share)) == layers


@pytest.mark.slow
def test_an_adapter_moves_at_these_layers_alone_and_nothing_else_decays():
    """Over a Llama, whose sizes the factors do not tell."""
    config = llama.LlamaConfig(
        vocab_size=VOCAB, max_tokens=LENGTH, layers=5, heads=2, kv_heads=1, width=8, mlp_width=6, head_width=4
    )
    frozen = jax.jit(lambda key: llama.init(config, key=key))(keys.root(0))
    trained = lora.init(frozen, rank=2, targets=("q", "down"), key=keys.root(1))
    model = through(llama.model(config), lambda own: lora.joined(frozen, own, scale=2.0))
    method, options = rmu.METHOD, rmu.Config(layer=0.8)
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    state = objective.init_state(method, trained, optimizer, options, key=keys.root(0))
    batch = objective.prepared(method, model, BATCH, options, reference=trained, key=keys.root(0))
    step = objective.make_step(method, model, optimizer, options, key=keys.root(0), total_steps=2)
    moved = jax.jit(lambda state: step(step(state, batch)[0], batch)[0])(state)
    for path, leaf in tree.flatten(moved.params).items():
        same = (np.asarray(leaf) == np.asarray(tree.flatten(trained)[path])).reshape(5, -1)
        kept = [0, 4] if "down" in path else range(5)
        assert same[list(kept)].all() and not same[[i for i in range(5) if i not in kept]].any(axis=None)
    np.testing.assert_array_equal(moved.aux, state.aux)


def test_without_a_matrix_of_these_in_its_adapter_it_is_refused():
    with pytest.raises(ValueError, match="no parameter path matches 'blocks/mlp/down', which the method trains"):
        objective.init_state(
            rmu.METHOD, {"blocks": {"attn": {"q_lora_a": jnp.ones((1, 2, 1))}}}, optax.sgd(1.0), rmu.Config(),
            key=keys.root(0),
        )  # fmt: skip
