"""Named PRNG streams. A run owns one root key; every consumer folds in the constant of its own stream.

Streams never share keys, so training data, evaluation data and initialisation are independent by construction.
"""

from __future__ import annotations

import zlib
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Integer

from jaxsafety.config.names import check_name
from jaxsafety.entry.checks import check_between, known
from jaxsafety.types import Key

Stream = Literal["init", "pretrain", "tune", "evaluate", "attack", "analysis", "method", "validate"]

# Position in Stream is the constant that is folded in: append only, or every published number changes.
_STREAMS = get_args(Stream)


def root(seed: int | Integer[Array, ""]) -> Key:
    """Returns the typed root key of one seed.

    Raises:
        ValueError: a number that is not in [0, 2^32), of which jax would take the last 32 bits.
    """
    value = known(seed)
    if value is not None and (value.dtype.kind not in "iu" or value.ndim):
        raise ValueError(f"a seed must be a whole number, got {seed}")
    if value is not None and not 0 <= int(value) < 2**32:
        raise ValueError(f"a seed must be >= 0 and < 2^32, got {seed}")
    return jax.random.key(seed)


def stream(key: Key, name: Stream) -> Key:
    """Returns the key of one named stream below ``key``.

    Raises:
        ValueError: ``name`` is not a known stream.
    """
    check_name("stream", name, _STREAMS)
    return jax.random.fold_in(key, _STREAMS.index(name))


def named(key: Key, name: str) -> Key:
    """Returns the key of what has a name of somebody's choice: an attack, an edit, an analysis.

    Raises:
        ValueError: a name that is no string.
    """
    if not isinstance(name, str):
        raise ValueError(f"name of a stream: got {name!r}, expected a string")
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def of_layers(key: Key, count: int, *, first: int | Int[Array, ""] = 0) -> Key:
    """Returns ``[l]`` keys of layers, each by its index in the whole model, of which ``first`` is the first one's."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(count))


def at_step(key: Key, step: int | Int[Array, ""]) -> Key:
    """Returns the key of one step of a stream: a pure function of position, so resuming is exact.

    Raises:
        ValueError: a step below zero (a traced one counts from 2^32).
    """
    check_between("step", step, 0)
    return jax.random.fold_in(key, step)
