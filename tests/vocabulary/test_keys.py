"""Named PRNG streams: fixed constants, never shared, pure functions of position."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_stream_constants_are_frozen():
    """Another order would silently change every published number."""
    names = ("init", "pretrain", "tune", "evaluate", "attack", "analysis", "method", "validate")
    assert get_args(keys.Stream) == names
    for i, name in enumerate(get_args(keys.Stream)):
        assert bits(keys.stream(keys.root(3), name)) == bits(jax.random.fold_in(jax.random.key(3), i))


def test_no_two_positions_of_any_stream_or_seed_share_a_key():
    seen = [
        bits(keys.at_step(keys.stream(keys.root(seed), name), step))
        for seed in range(4)
        for name in get_args(keys.Stream)
        for step in (0, 1, 2, 1000, 1 << 20)
    ]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("seed", [-1, 2**32, np.int64(2**32)])
@pytest.mark.usefixtures("unchecked")
def test_a_seed_that_jax_would_cut_is_refused(seed):
    with pytest.raises(ValueError, match=rf"^a seed must be >= 0 and < 2\^32, got {seed}$"):
        keys.root(seed)


def test_keys_are_typed_and_the_seed_may_be_traced():
    assert jax.dtypes.issubdtype(keys.root(0).dtype, jax.dtypes.prng_key)
    roots = jax.jit(jax.vmap(keys.root))(jnp.asarray([0, 7], jnp.uint32))
    assert [bits(key) for key in roots] == [bits(keys.root(0)), bits(keys.root(7))]


def test_a_traced_step_gives_the_key_of_the_same_number(key):
    assert bits(jax.jit(keys.at_step)(key, jnp.int32(5))) == bits(keys.at_step(key, 5))


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_stream_lists_the_known_ones(key):
    with pytest.raises(ValueError, match=r"unknown stream 'evalute': expected one of init, .*evaluate"):
        keys.stream(key, "evalute")
