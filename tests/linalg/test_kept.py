"""Energy kept in leading spaces, intruders, and the order of an update's directions, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.linalg import directions, kept

# float32 decompositions of matrices of order 1.
ATOL = 2e-5
LAYERS, INPUTS, OUTPUTS = 2, 6, 4
KEY = jax.random.key(3)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


DELTA, BASE = draw(0, LAYERS, INPUTS, OUTPUTS), draw(1, LAYERS, INPUTS, OUTPUTS)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_energy_kept_is_that_of_the_projection(side):
    dimension = INPUTS if side == "inputs" else OUTPUTS
    basis = np.linalg.qr(draw(2, LAYERS, dimension, 4))[0]
    found = kept.energy_kept(jnp.float32(DELTA), jnp.float32(basis), side=side, counts=jnp.arange(6))
    for layer, delta in enumerate(DELTA):
        for count in range(6):
            own = basis[layer][:, :count] @ basis[layer][:, :count].T
            projected = own @ delta if side == "inputs" else delta @ own
            share = np.sum(projected**2) / np.sum(delta**2)
            # Of more columns than there are.
            expected = share if count <= 4 else np.nan
            np.testing.assert_allclose(found[layer, count], expected, atol=ATOL)


def test_an_update_of_nothing_keeps_nothing():
    zeros, counts = jnp.zeros((1, INPUTS, OUTPUTS)), jnp.array([2])
    basis = jnp.eye(OUTPUTS)[None]
    assert np.isnan(kept.energy_kept(zeros, basis, side="outputs", counts=counts)).all()
    # However small it is otherwise.
    tiny = kept.energy_kept(zeros.at[0, 0, 0].set(1e-25), basis, side="outputs", counts=counts)
    np.testing.assert_array_equal(tiny, [[1.0]])


def test_a_basis_of_the_other_side_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"basis: got \(2, 6, 4\), expected columns of the outputs, \[2, 4, r\]"):
        kept.energy_kept(jnp.float32(DELTA), jnp.zeros((2, INPUTS, 4)), side="outputs", counts=jnp.array([1]))


def test_a_direction_that_was_there_is_known_and_a_new_one_is_an_intruder():
    """A diagonal base; the update adds the largest direction, halfway between two that there were, or of its own."""
    before = np.zeros((1, 6, 6), np.float32)
    before[0, range(4), range(4)] = [4.0, 3.0, 2.0, 1.0]
    after = before.copy()
    after[0, 5, 5] = 9.0
    found = kept.known_directions(jnp.asarray(before), jnp.asarray(after), count=3)
    # The base has no direction there but those of its null space, of which a basis means nothing.
    np.testing.assert_allclose(found[0], [0.0, 1.0, 1.0], atol=ATOL)
    turned = before.copy()
    turned[0, 0, :2] = 4 / np.sqrt(2)
    turned[0, 1, :2] = [-3 / np.sqrt(2), 3 / np.sqrt(2)]
    found = kept.known_directions(jnp.asarray(before), jnp.asarray(turned), count=2)
    np.testing.assert_allclose(found[0], np.full(2, 1 / np.sqrt(2)), atol=ATOL)


def test_a_meaningless_update_has_the_spectrum_and_nothing_else():
    found = kept.like(jnp.float32(DELTA), key=KEY)
    values = [np.linalg.svd(np.asarray(one, np.float64), compute_uv=False) for one in (found, DELTA)]
    np.testing.assert_allclose(*values, atol=ATOL)
    cosine = np.sum(found * DELTA) / np.sum(DELTA**2)
    assert abs(cosine) < 0.9 and not np.array_equal(found[0], found[1])


def nearest(delta, inputs, rank):
    """The matrix of a rank whose products with the inputs are nearest, by NumPy's SVD of these products."""
    right = np.linalg.svd(inputs @ delta)[2][:rank].T
    return delta @ right @ right.T


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_directions_by_activations_are_actsvds(rank):
    inputs = draw(5, LAYERS, 40, INPUTS) * np.array([9, 3, 1, 1, 0.3, 0.1])
    moments = np.einsum("lrm,lrn->lmn", inputs, inputs)
    basis = directions.ordered(jnp.float32(DELTA), "activations", moments=jnp.float32(moments))[..., :rank]
    cut = np.asarray(DELTA @ basis @ basis.mT, np.float64)
    for layer in range(LAYERS):
        expected = nearest(DELTA[layer], inputs[layer], rank)
        np.testing.assert_allclose(cut[layer], expected, atol=2e-3)
        # On these inputs it is nearer than the nearest matrix of that rank, and on others it is not.
        plain = nearest(DELTA[layer], np.eye(INPUTS), rank)
        for rows, sign in ((inputs[layer], 1), (np.eye(INPUTS), -1)):
            losses = [np.sum((rows @ (one - DELTA[layer])) ** 2) for one in (cut[layer], plain)]
            assert rank == OUTPUTS or sign * (losses[1] - losses[0]) > 0.01 * losses[1]


def test_directions_by_size_are_the_singular_ones():
    basis = np.asarray(directions.ordered(jnp.float32(DELTA), "singular"))[..., :2]
    for layer in range(LAYERS):
        cut = DELTA[layer] @ basis[layer] @ basis[layer].T
        np.testing.assert_allclose(cut, nearest(DELTA[layer], np.eye(INPUTS), 2), atol=ATOL)


def test_random_directions_keep_their_share_in_the_mean_and_all_of_it_at_last():
    delta = jnp.float32(DELTA[:1])
    found = jax.vmap(lambda key: directions.ordered(delta, "random", key=key))(jax.random.split(KEY, 400))
    energy = jnp.sum(jnp.square(delta @ found), axis=2) / jnp.sum(delta**2)
    np.testing.assert_allclose(jnp.sum(energy, axis=-1), np.ones((400, 1)), atol=ATOL)
    # Each of four directions a quarter; five standard errors of 400 draws.
    means, errors = energy.mean(axis=(0, 1)), energy.std(axis=(0, 1)) / 20
    assert np.all(np.abs(means - 0.25) < 5 * errors)


def test_random_directions_of_an_update_of_low_rank_stay_in_its_span():
    low = jnp.float32(DELTA[:1, :, :2] @ draw(6, 1, 2, OUTPUTS))
    basis = directions.ordered(low, "random", key=KEY)
    energy = jnp.sum(jnp.square(low @ basis), axis=1) / jnp.sum(low**2)
    np.testing.assert_allclose(jnp.sum(energy[0, :2]), 1.0, atol=ATOL)
    assert 0.01 < energy[0, 0] < 0.99


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"choice": "activations"}, "choice 'activations' got no moments"),
        ({"choice": "random"}, "choice 'random' got no key"),
        ({"choice": "singula"}, "unknown choice 'singula': expected .*did you mean 'singular'"),
    ],
)
def test_what_is_missing_is_said(given, message, unchecked):
    with pytest.raises(ValueError, match=message):
        directions.ordered(jnp.float32(DELTA), **given)
