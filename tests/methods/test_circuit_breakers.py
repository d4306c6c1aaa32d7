"""Representation rerouting against NumPy in float64; how it begins, and what it does not look at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety import keys
from jaxsafety.methods import circuit_breakers
from jaxsafety.training import hidden
from tests.methods.bound import bound
from tests.methods.gpts import BATCH, MODEL, OTHER, PARAMS, UNSAFE, answer_places, states
from tests.methods.lists import LENGTH, pairs

# float32 sums in another order.
RTOL = 1e-5
WORDS = jax.random.key_data(keys.root(3))
_RNG = np.random.default_rng(0)
A, B = _RNG.normal(size=(2, 2, 3, 5))
MASK = _RNG.uniform(size=(2, 3)) < 0.7


def cosine(a, b):
    return a @ b / np.sqrt(a @ a * (b @ b))


def test_cosines_match_numpy_and_are_zero_of_what_is_zero_or_left_out():
    zeroed = np.where(np.arange(3)[None, :, None] == 1, 0, A)
    expected = [[MASK[i, j] and j != 1 and cosine(A[i, j], B[i, j]) for j in range(3)] for i in range(2)]
    holed = np.where(MASK[..., None], B, np.nan)
    found = circuit_breakers.cosine(*map(jnp.float32, (zeroed, holed)), jnp.asarray(MASK))
    np.testing.assert_allclose(found, np.float64(expected), rtol=RTOL)


def test_cosines_have_gradients_of_finite_differences_and_none_that_is_nan():
    def total(a, b):
        return jnp.sum(circuit_breakers.cosine(jnp.asarray(a), jnp.asarray(b), jnp.asarray(MASK)))

    check_grads(jax.jit(total), (jnp.float32(A), jnp.float32(B)), order=1, modes=("rev",), rtol=1e-2, atol=1e-3)
    found = jax.grad(total, argnums=(0, 1))(
        jnp.zeros_like(jnp.float32(A)), jnp.float32(np.where(MASK[..., None], B, np.nan))
    )
    assert all(np.isfinite(leaf).all() for leaf in found)


@pytest.mark.parametrize(("progress", "weights"), [(0.0, (4.0, 0.0)), (0.5, (3.0, 1.0)), (1.0, (2.0, 2.0))])
def test_the_weights_cross_and_what_points_away_is_left(progress, weights):
    cosines, distances = np.clip(A[..., :2], -1, 1), np.abs(B[..., :2])
    masks = {"on_harmful": jnp.asarray([[True, False], [True, True]]), "on_kept": jnp.asarray([[True] * 2] * 2)}
    found = circuit_breakers.circuit_breakers(
        *map(jnp.float32, (cosines, distances)), **masks, alpha=4.0, progress=progress
    )
    rerouted = [max(cosines[i, layer, t], 0) for i, t in ((0, 0), (1, 0), (1, 1)) for layer in range(3)]
    np.testing.assert_allclose(found["reroute"], (weights[0] * np.sum(rerouted), 9), rtol=RTOL)
    np.testing.assert_allclose(found["retain"], (weights[1] * distances.sum(), 12), rtol=RTOL)


def value(params, batch=BATCH, **options):
    given = {"reference": OTHER, "aux": WORDS, "layers": (0.5, 1.0), "progress": 0.5}
    return bound("circuit_breakers", MODEL, **(given | options))(params, batch)


def test_the_loss_is_that_of_the_answers_own_tokens():
    """Of refusals what is kept, too."""
    unit = np.asarray(hidden.direction(WORDS, width=8), float)
    (harmful, harmful_before), (kept, kept_before) = (
        [np.asarray(states(params, side.tokens), float) for params in (PARAMS, OTHER)]
        for side in (BATCH.rejected, BATCH.chosen)
    )
    rerouted, retained = [], []
    for row, unsafe in enumerate(UNSAFE):
        for layer in range(2):
            for i in answer_places(BATCH.rejected.mask)[row] if unsafe else ():
                own = harmful[layer, row, i]
                nudged = own + 0.2 * np.sqrt(own @ own) * unit
                rerouted.append(max(cosine(nudged, harmful_before[layer, row, i]), 0))
            for i in answer_places(BATCH.chosen.mask)[row]:
                retained.append(np.linalg.norm(kept[layer, row, i] - kept_before[layer, row, i]))
    grid = jnp.float32([[3, 0.2], [3, 0]])
    made = jax.jit(jax.vmap(lambda pair: value(PARAMS, alpha=pair[0], nudge=pair[1])[0]))(grid)
    np.testing.assert_allclose(made[0], 3 * (0.75 * np.mean(rerouted) + 0.25 * np.mean(retained)), rtol=RTOL)
    assert made[1] != made[0]


def test_it_begins_at_alpha_where_only_the_nudge_has_a_gradient():
    """That of a cosine of one is zero, and a step would be rounding's."""
    slope = jax.jit(
        lambda nudge: jax.value_and_grad(lambda p: value(p, reference=PARAMS, progress=0.0, nudge=nudge)[0])(PARAMS)
    )
    norms = []
    for nudge in (0.0, 0.1):
        begun, found = slope(jnp.float32(nudge))
        # The cosine of an angle that is at most a tenth.
        assert 10 * np.sqrt(1 - nudge**2) - 1e-4 <= begun <= 10 + 1e-4
        norms.append(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(found))))
    # Rounding in a sum of some hundreds.
    assert norms[0] < 1e-4 and norms[1] > 0.1


def test_padding_and_what_is_not_scored_change_nothing():
    read = jax.jit(lambda batch: value(PARAMS, batch)[0])
    np.testing.assert_allclose(read(pairs(unsafe=UNSAFE, length=LENGTH + 6)), read(BATCH), rtol=RTOL)


def test_bad_layers_are_refused():
    with pytest.raises(ValueError, match="layers must name at least one share of the depth, got none"):
        circuit_breakers.Config(layers=())
    with pytest.raises(ValueError, match=r"layers must be > 0 and <= 1 and finite, got 10\.0"):
        circuit_breakers.Config(layers=(10.0,))
