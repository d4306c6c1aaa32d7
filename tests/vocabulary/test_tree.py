"""Parameter trees by path, and stacked lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import tree


@pytest.fixture
def params():
    up = jnp.arange(12.0).reshape(2, 2, 3)
    return {"embed": jnp.ones((4, 2)), "blocks": {"mlp": {"up": up, "up_bias": jnp.zeros((2, 3))}}}


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def test_flatten_names_leaves_by_path_and_unflatten_inverts_it(params):
    flat = tree.flatten(params)
    assert set(flat) == {"embed", "blocks/mlp/up", "blocks/mlp/up_bias"}
    assert same(tree.unflatten(flat), params)


def test_select_matches_whole_paths_only(params):
    assert set(tree.select(params, r"blocks/mlp/up")) == {"blocks/mlp/up"}
    assert set(tree.select(params, r".*up.*")) == {"blocks/mlp/up", "blocks/mlp/up_bias"}


def test_select_of_nothing_lists_the_paths(params):
    with pytest.raises(
        ValueError, match=r"no parameter path matches 'up'; the paths are blocks/mlp/up, blocks/mlp/up_b"
    ):
        tree.select(params, "up")


def test_label_sees_path_and_leaf(params):
    labels = tree.label(params, lambda path, leaf: (path, leaf.ndim))
    assert labels["blocks"]["mlp"] == {"up": ("blocks/mlp/up", 3), "up_bias": ("blocks/mlp/up_bias", 2)}


def test_interpolation_runs_from_base_to_tuned_and_beyond(params):
    tuned = jax.tree.map(lambda x: x * 3 + 1, params)
    delta = tree.difference(tuned, params)
    assert same(delta, jax.tree.map(lambda x: x * 2 + 1, params))
    assert same(tree.interpolate(params, delta, 0.0), params)
    assert same(tree.interpolate(params, delta, 1.0), tuned)
    assert same(tree.interpolate(params, delta, jnp.float32(2.0)), jax.tree.map(lambda x: x * 5 + 2, params))


def test_a_lane_of_a_stack_is_what_was_stacked(params):
    others = [jax.tree.map(lambda x, i=i: x + i, params) for i in range(3)]
    stacked = tree.stack(others)
    assert stacked["embed"].shape == (3, 4, 2)
    assert same(tree.lane(stacked, 2), others[2])
    grid = tree.stack([stacked, jax.tree.map(lambda x: -x, stacked)])
    assert same(tree.lane(grid, 1, 0), jax.tree.map(lambda x: -x, params))


def test_count_is_the_number_of_scalars(params):
    assert tree.count(params) == 8 + 12 + 6
