"""States of answers against what the model itself says of every layer; a lane's direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.training import hidden
from jaxsafety.types import Unsupported
from tests.methods import lists
from tests.methods.gpts import BATCH, MODEL, PARAMS, answer_places, states


@pytest.mark.parametrize(
    ("share", "depth", "index"), [(0.25, 32, 7), (1 / 3, 32, 10), (2 / 3, 32, 20), (1.0, 6, 5), (0.01, 3, 0)]
)
def test_a_layer_is_named_by_the_share_of_the_depth_that_it_ends(share, depth, index):
    assert hidden.layer_at(share, depth=depth) == index


def test_states_of_both_sides_are_those_of_the_layers_asked_for():
    read = jax.jit(lambda params: hidden.states(MODEL, params, BATCH.chosen, BATCH.rejected, shares=(1.0, 0.5, 0.9)))
    for found, side in zip(read(PARAMS), (BATCH.chosen, BATCH.rejected), strict=True):
        # In a batch of another size products are summed in another order.
        np.testing.assert_allclose(found, states(PARAMS, side.tokens).swapaxes(0, 1), rtol=1e-5, atol=1e-5)


def test_a_model_without_an_inside_is_refused():
    with pytest.raises(Unsupported, match="sites: this model was adapted from its logits alone"):
        hidden.states(lists.MODEL, lists.PARAMS, BATCH.chosen, shares=(0.5,))


def test_the_places_of_an_answer_are_those_of_its_tokens():
    found = hidden.answered(BATCH.rejected.mask)
    assert [list(np.flatnonzero(row)) for row in found] == answer_places(BATCH.rejected.mask)
    rows = np.asarray(BATCH.rejected.tokens)
    assert [list(rows[i, own]) for i, own in enumerate(np.asarray(found))] == lists.REPLIES


def test_a_direction_is_the_lanes_own_and_of_norm_one():
    words = [hidden.direction_words({}, key=jax.random.key(seed), config=None) for seed in range(200)]
    drawn = np.asarray(jax.vmap(lambda own: hidden.direction(own, width=5))(jnp.stack(words)))
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, rtol=1e-6)
    # Five standard deviations of a mean of 200, each entry of variance 1/5.
    assert np.abs(drawn.mean(axis=0)).max() < 5 * np.sqrt(1 / 5 / 200) and len(np.unique(drawn[:, 0])) == 200
    np.testing.assert_array_equal(drawn[0], hidden.direction(words[0], width=5))
