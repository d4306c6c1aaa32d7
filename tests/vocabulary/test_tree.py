"""Parameter trees by path, and stacked lanes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from jaxsafety import tree
from jaxsafety.edits import layer_part, rank_part, scaled, space_part, transferred
from jaxsafety.linalg import alignment


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


@jax.tree_util.register_dataclass
@dataclass
class Module:
    """A module as equinox has them: a dataclass that is a tree."""

    w: Any
    inner: Any


W = np.random.default_rng(0).integers(-9, 9, size=(2, 3, 4)).astype(np.float32)
# What other libraries keep their parameters in, and the path of the one stack of matrices.
CONTAINERS = {
    "haiku": ({"mlp/~/linear_0": {"w": W, "b": W[:, 0]}}, "mlp/~/linear_0/w"),
    "FrozenDict": (freeze({"mlp": {"w": W}}), "mlp/w"),
    "empty subtrees and None": ({"a": W, "b": {}, "c": None, "d": ()}, "a"),
    "list of layers": ({"layers": [{"w": W}, {"b": W[0]}]}, "layers/0/w"),
    "nnx.State": (nnx.State({"linear": {"kernel": nnx.Param(W)}}), "linear/kernel/value"),
    "dataclass": (Module(W, [W[0], Module(None, {"b": W[:, 0]})]), "w"),
    "an array alone": (W, ""),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_trees_of_other_libraries_keep_their_structure(name):
    base, path = CONTAINERS[name]
    base = jax.tree.map(jnp.asarray, base)
    tuned = jax.tree.map(lambda x: x * 3 + 1, base)
    delta = tree.difference(tuned, base)
    assert same(delta, jax.tree.map(lambda x: x * 2 + 1, base))
    assert same(tree.label(base, lambda path, leaf: leaf), base)
    for moved in (scaled.scaled(base, delta, alpha=1.0), transferred.transferred(base, delta, alpha=1.0)):
        assert same(moved, tuned)
    split = {"pattern": path, "keep": "only"}
    parts = [space_part.space_part(base, delta, space, **split) for space in ("null_space", "range")]
    assert all(jax.tree.structure(part) == jax.tree.structure(base) for part in parts)
    whole = tree.flatten(delta)[path]
    np.testing.assert_allclose(sum(tree.flatten(part)[path] for part in parts), whole, atol=1e-5)
    cut = rank_part.rank_part(delta, rank=3, pattern=path)
    assert jax.tree.structure(cut) == jax.tree.structure(base)
    np.testing.assert_allclose(tree.flatten(cut)[path], whole, atol=1e-5)
    np.testing.assert_allclose(alignment.tree_cosine(delta, delta), 1.0, atol=1e-6)


def test_a_layer_of_a_module_is_cut_out_of_it():
    found = layer_part.layer_part({"blocks": Module(jnp.asarray(W), None)}, layer=1)["blocks"]
    np.testing.assert_array_equal(found.w, [np.zeros_like(W[0]), W[1]])


@pytest.mark.parametrize(
    "alpha", [0.5, np.float32(0.5), np.array(0.5), jnp.float32(0.5)], ids=["float", "f32", "f64", "jax"]
)
def test_an_alpha_of_any_type_leaves_the_weights_theirs(alpha, unchecked):
    base = {"a": jnp.asarray([1.0, 256.0], jnp.bfloat16)}
    delta = {"a": jnp.asarray([2.0, 3.0], jnp.bfloat16)}
    for move in (lambda: scaled.scaled(base, delta, alpha=alpha), lambda: tree.interpolate(base, delta, alpha)):
        assert move()["a"].dtype == jnp.bfloat16
        # Rounded once, from float32: 257.5 lies between 256 and 258.
        np.testing.assert_array_equal(move()["a"].astype(np.float32), [2.0, 258.0])
    assert tree.interpolate(base, {"a": np.ones(2, np.float32)}, alpha)["a"].dtype == jnp.float32


def test_counters_of_a_module_stay_whole():
    """An interpolated state is one that the module takes."""
    base, tuned = ({"count": np.int32(count), "w": np.float32(count)} for count in (2, 5))
    delta = tree.difference(tuned, base)
    for alpha, count in ((0.0, 2), (0.5, 4), (1.0, 5), (2.0, 8)):  # 3.5 goes to the even 4
        moved = jax.jit(tree.interpolate)(base, delta, alpha)
        assert (moved["count"], moved["count"].dtype) == (count, jnp.int32)
        assert moved["w"] == 2 + 3 * alpha


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int8, np.uint8])
def test_counters_that_fall_or_are_large_are_moved_exactly(dtype, unchecked):
    """A difference of unsigned numbers wraps, and beyond 2^24 float32 has no room for all digits."""
    large = np.iinfo(dtype).max - 1
    base, tuned = ({"n": np.array(values, dtype)} for values in ((5, large, large - 3), (3, large - 3, large)))
    delta = tree.difference(tuned, base)
    for alpha, expected in ((1.0, tuned["n"]), (0.0, base["n"])):
        np.testing.assert_array_equal(tree.interpolate(base, delta, alpha)["n"], expected)
    assert tree.interpolate(base, delta, 2.0)["n"][0] == 1


def test_numbers_of_python_are_leaves():
    params = {"w": jnp.ones(3), "s": 2.0}
    assert (tree.count(params), float(alignment.tree_cosine(params, params))) == (4, 1.0)
    with pytest.raises(ValueError, match=r"matches s of shape \(\), expected matrices"):
        tree.matrix_stacks(params, ".*")
    with pytest.raises(ValueError, match="a and b hold no leaves, expected at least one"):
        alignment.tree_cosine({}, {})
    with pytest.raises(ValueError, match="alpha holds values that are not finite"):
        tree.interpolate(params, params, np.nan)


def test_what_is_no_tree_of_numbers_is_named():
    ones = {"a": jnp.ones(2)}
    for other, message in [
        ({"a": jax.nn.relu}, "a of tuned is a .*, expected arrays of numbers alone"),
        ({"a": jax.random.key(0)}, r"a of tuned is of type key<fry>, expected arrays of numbers alone"),
        ({"a": np.ones(2, bool)}, "a of tuned is of type bool, expected arrays of numbers alone"),
        ({"a": True}, "a of tuned is a bool, expected arrays of numbers alone"),
        (freeze(ones), "the same paths lie in different containers in tuned, a FrozenDict, and base, a dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            tree.difference(other, ones)
    with pytest.raises(ValueError, match="got 2 leaves at 1 paths, expected one at each"):
        tree.flatten({"a/b": {"c": 1.0}, "a": {"b": {"c": 2.0}}})
