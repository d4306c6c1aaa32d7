"""Trimmed, merged and thinned updates, and those of harm removed: against sorts and loops in NumPy, and sampling."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import tree
from jaxsafety.edits import dare, hdr, ties, trim

LAYERS, WIDTH, WIDER = 3, 4, 6
KEY = jax.random.key(7)
# Products and quotients of order one in float32 against float64.
RTOL, ATOL = 1e-6, 1e-7
SHARES = (0.01, 0.1, 0.375, 0.5, 0.99, 1.0)
UP, EMBED = "blocks/mlp/up", "embed"


def draw(seed, digits=2):
    """A small tree whose values have few digits, so that many are as large, and some zero."""
    rng = np.random.default_rng(seed)
    mlp = {"up": rng.normal(size=(LAYERS, WIDTH, WIDER)), "up_bias": rng.normal(size=(LAYERS, WIDER))}
    params = {"embed": rng.normal(size=(5, WIDTH)), "blocks": {"mlp": mlp, "gain": rng.normal(size=LAYERS)}}
    return jax.tree.map(lambda leaf: np.asarray(np.round(leaf, digits), np.float32), params)


@pytest.fixture(scope="module")
def deltas():
    # One digit, and signs: of 24 entries of a matrix some are always as large as others.
    return [draw(seed, digits=1) for seed in range(3)]


def sorted_out(values, keep):
    """The largest of some entries by a stable sort."""
    count = max(1, int(np.rint(np.float32(keep) * np.float32(values.size))))
    first = np.argsort(-np.abs(values.ravel().astype(np.float64)), kind="stable")[:count]
    kept = np.zeros(values.size, bool)
    kept[first] = True
    return kept.reshape(values.shape)


def plain_trimmed(delta, keep):
    def rule(path, leaf):
        pieces = leaf if path.startswith("blocks/") else leaf[None]
        kept = np.stack([sorted_out(np.asarray(piece), keep) for piece in pieces])
        return np.where(kept.reshape(leaf.shape), leaf, 0)

    return tree.label(delta, rule)


def equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, leaf in tree.flatten(left).items():
        np.testing.assert_array_equal(leaf, tree.flatten(right)[path], err_msg=path)


def close(left, right):
    for path, leaf in tree.flatten(left).items():
        np.testing.assert_allclose(leaf, tree.flatten(right)[path], rtol=RTOL, atol=ATOL, err_msg=path)


@pytest.fixture(scope="module")
def every_share(deltas):
    """One program for all shares, which are traced."""
    mapped = jax.jit(jax.vmap(lambda delta, keep: trim.trimmed(delta, keep=keep), in_axes=(None, 0)))
    return jax.device_get(mapped(deltas[0], np.asarray(SHARES, np.float32)))


@pytest.mark.parametrize("place", range(len(SHARES)))
def test_the_largest_entries_are_kept_as_many_as_the_share(deltas, every_share, place):
    found = tree.lane(every_share, place)
    equal(found, plain_trimmed(deltas[0], SHARES[place]))
    equal(found, trim.trimmed(deltas[0], keep=SHARES[place]))


def test_the_whole_update_is_kept_bit_for_bit(deltas):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), deltas[0])
    for delta in (deltas[0], half):
        found = trim.trimmed(delta, keep=1.0)
        equal(found, delta)
        assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(delta), strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_entries_that_are_as_large_are_kept_from_the_first_on(dtype, scale):
    values = np.asarray([1, -2, 2, 0.5, -2, 0, 2, -0.25]) * scale
    leaf = jnp.asarray(values, dtype)
    for keep, kept in ((0.25, [1, 2]), (0.375, [1, 2, 4]), (0.5, [1, 2, 4, 6]), (0.625, [0, 1, 2, 4, 6])):
        found = trim.trimmed({"a": leaf}, keep=keep)["a"]
        assert found.dtype == leaf.dtype and np.flatnonzero(found).tolist() == kept
        np.testing.assert_array_equal(found[np.asarray(kept)], leaf[np.asarray(kept)])


@pytest.mark.slow
def test_of_many_entries_as_many_are_kept_as_of_few():
    """More than float32 counts one by one."""
    size = 2**24 + 3
    values = jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.bfloat16)
    for keep, count in ((1.0, size), (0.5, size // 2)):
        found = trim.trimmed({"a": values}, keep=keep)["a"]
        # float32 holds every second whole number there.
        assert abs(int(jnp.sum(found != 0)) - count) <= (0 if keep == 1 else 2)
        assert float(jnp.min(jnp.where(found != 0, abs(found), jnp.inf))) >= float(
            jnp.max(jnp.where(found == 0, abs(values), 0))
        )


def test_integers_and_denormal_numbers_have_an_order():
    found = trim.trimmed({"a": np.asarray([3, -7, 0, 5])}, keep=0.5)["a"]
    assert found.tolist() == [0, -7, 0, 5]
    tiny = np.asarray([1e-45, -3e-45, 2e-45, 0], np.float32)
    assert np.asarray(trim.trimmed({"a": tiny}, keep=0.25)["a"]).view(np.int32).tolist() == [0, -(2**31) + 2, 0, 0]


def test_what_is_not_finite_is_refused_or_when_traced_the_largest():
    values = np.asarray([1, np.nan, 3, -np.inf], np.float32)
    with pytest.raises(ValueError, match="delta: a holds values that are not finite"):
        trim.trimmed({"a": values}, keep=0.5)
    found = jax.jit(partial(trim.trimmed, keep=0.5))({"a": values})["a"]
    np.testing.assert_array_equal(found, [0, np.nan, 0, -np.inf])
    sides = [{"a": values}, {"a": np.ones(4, np.float32)}]
    np.testing.assert_array_equal(
        jax.jit(lambda deltas: ties.merged(deltas, keep=1.0))(sides)["a"], [1, np.nan, 2, -np.inf]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda delta: trim.trimmed(delta, keep=0.0), r"keep: got 0.0, expected a share in \(0, 1\]"),
        (lambda delta: trim.trimmed(delta, keep=1.5), r"keep: got 1.5, expected a share in \(0, 1\]"),
        (lambda delta: trim.trimmed(delta, keep=float("nan")), r"keep: got nan, expected a share in \(0, 1\]"),
        (lambda delta: hdr.harm_removed(delta, delta, keep=2.0, scale=1.0), r"keep: got 2.0, expected a share"),
        (lambda delta: hdr.harm_removed(delta, delta, keep=1.0, scale=float("inf")), "alpha holds values that are not"),
        (lambda delta: hdr.harm_removed(delta, {"a": 1}, keep=1.0, scale=1.0), "a is in harm_delta but not in target"),
        (lambda delta: ties.merged([], keep=0.5), "deltas: got none, expected at least one update"),
        (lambda delta: ties.merged([delta, {"a": 1}], keep=0.5), r"a is in deltas\[1\] but not in deltas\[0\]"),
        (lambda delta: dare.dropped(delta, drop=1.0, key=KEY), r"drop: got 1.0, expected a probability in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_one_sentence(deltas, call, message):
    with pytest.raises(ValueError, match=message):
        call(deltas[0])


def test_harm_is_removed_as_far_as_asked(deltas):
    target, harm = draw(9), deltas[1]
    remove = jax.jit(hdr.harm_removed)
    for keep, scale in ((0.1, 2.0), (1.0, 0.3), (0.5, -1.0)):
        expected = jax.tree.map(lambda t, h, by=scale: t - by * h.astype(np.float64), target, plain_trimmed(harm, keep))
        close(remove(target, harm, keep=np.float32(keep), scale=np.float32(scale)), expected)
    equal(remove(target, harm, keep=np.float32(0.1), scale=np.float32(0)), target)
    equal(hdr.harm_removed(target, harm, keep=0.1, scale=0.0), target)


def plain_merged(deltas, keep):
    """Entry by entry."""

    def one(*values):
        positive, negative = (sum(abs(v) for v in values if v * sign > 0) for sign in (1, -1))
        if positive == negative:
            return 0.0
        kept = [v for v in values if v * (positive - negative) > 0]
        return sum(kept) / len(kept)

    return jax.tree.map(
        lambda *leaves: np.vectorize(one, otypes=[float])(*(np.asarray(leaf, np.float64) for leaf in leaves)),
        *(plain_trimmed(delta, keep) for delta in deltas),
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_merged_updates_are_means_of_what_agrees(deltas, count):
    merge = jax.jit(ties.merged)
    for keep in (0.2, 0.7, 1.0):
        found = merge(deltas[:count], keep=np.float32(keep))
        close(found, plain_merged(deltas[:count], keep))
    assert any(np.any(leaf == 0) for leaf in jax.tree.leaves(found))


def test_updates_that_cancel_merge_to_nothing_and_equal_ones_to_themselves(deltas):
    negated = jax.tree.map(np.negative, deltas[0])
    equal(ties.merged([deltas[0], negated], keep=1.0), jax.tree.map(np.zeros_like, deltas[0]))
    equal(ties.merged([deltas[0], deltas[0]], keep=1.0), deltas[0])
    mixed = ties.merged([{"a": jnp.ones(2, jnp.bfloat16)}, {"a": jnp.full(2, 2.0, jnp.bfloat16)}], keep=1.0)["a"]
    assert mixed.dtype == jnp.bfloat16 and mixed.tolist() == [1.5, 1.5]


def test_what_is_dropped_is_a_share_and_the_rest_makes_up_for_it():
    # Entries differ, so that what stays is told apart from what takes its place.
    values = np.arange(1, 40001, dtype=np.float32).reshape(2, 200, 100)
    delta, drop = {"blocks": {"up": values}, "embed": values[0]}, 0.9
    found = jax.jit(partial(dare.dropped, key=KEY))(delta, drop=np.float32(drop))
    for path, leaf in tree.flatten(found).items():
        own, stays = tree.flatten(delta)[path], np.asarray(leaf) != 0
        np.testing.assert_allclose(leaf[stays], own[stays] / (1 - drop), rtol=RTOL)
        # Five standard errors.
        assert abs(stays.mean() - (1 - drop)) < 5 * np.sqrt(drop * (1 - drop) / stays.size)
    # A third of the entries of 0.1 would stay in both were layers or parameters to draw the same: 0.01 of all do.
    first, second, embed = (np.asarray(leaf) != 0 for leaf in (*found["blocks"]["up"], found["embed"]))
    for one, other in ((first, second), (first, embed)):
        assert abs((one & other).mean() - 0.01) < 5 * np.sqrt(0.01 * 0.99 / one.size)


def test_nothing_dropped_is_the_update_bit_for_bit(deltas):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), deltas[0])
    for delta in (deltas[0], half):
        equal(dare.dropped(delta, drop=0.0, key=KEY), delta)
    halved = dare.dropped(half, drop=0.5, key=KEY)
    for path, leaf in tree.flatten(halved).items():
        own = tree.flatten(half)[path]
        assert leaf.dtype == jnp.bfloat16 and bool(jnp.all((leaf == 0) | (leaf == 2 * own)))


def test_draws_are_of_the_key_the_path_and_the_layer_alone(deltas):
    drop = jax.jit(dare.dropped)
    whole = drop(deltas[0], drop=0.5, key=KEY)
    equal(drop(deltas[0], drop=0.5, key=KEY), whole)
    for layer in range(LAYERS):
        part = {"blocks": {"mlp": {"up": deltas[0]["blocks"]["mlp"]["up"][layer : layer + 1]}}}
        found = drop(part, drop=0.5, key=KEY, layer=layer)["blocks"]["mlp"]["up"]
        np.testing.assert_array_equal(found[0], whole["blocks"]["mlp"]["up"][layer])
    other = drop(deltas[0], drop=0.5, key=jax.random.key(8))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True))
    more = drop(deltas[0], drop=0.8, key=KEY)
    assert all(np.all((a != 0) | (b == 0)) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(more), strict=True))
