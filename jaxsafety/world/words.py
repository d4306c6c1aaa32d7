"""Draws from words of 32 random bits: one call of the generator gives all that a prompt needs.

A call for every coin and number would cost more than all that is done with them, and compile for seconds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsafety.types import Key

Probability = float | Float[Array, ""]

BELOW = 2**16
"""What a bound of :func:`below` stays under."""


def draw(key: Key, *, count: int) -> UInt32[Array, " {count}"]:
    """Returns so many independent words."""
    return jax.random.bits(key, (count,), jnp.uint32)


def below(words: UInt32[Array, "*n"], bound: int | Int[Array, "*n"] | Int[Array, ""]) -> Int[Array, "*n"]:
    """Returns integers uniform in ``range(bound)`` to 2^-32, bound < 2^16: the high word of a 32 x 16 bit product."""
    bound = jnp.asarray(bound).astype(jnp.uint32)
    return (((words >> 16) * bound + (((words & 0xFFFF) * bound) >> 16)) >> 16).astype(jnp.int32)


def uniform(words: UInt32[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns float32 numbers in [0, 1), multiples of 2^-23."""
    return (words >> 9).astype(jnp.float32) * 2.0**-23


def chance(words: UInt32[Array, "*n"], probability: Probability) -> Bool[Array, "*n"]:
    """Returns coins that are True with ``probability``, to 2^-23; 0 and 1 are certain."""
    return uniform(words) < probability


def choice(word: UInt32[Array, ""], weights: Float[Array, " k"]) -> Int[Array, ""]:
    """Returns an index in ``range(k)``, as often as its share of the ``weights``; never one of weight 0."""
    ends = jnp.cumsum(weights)
    # Less than the last end whatever is rounded, and at or beyond the end of every weight 0 that it follows.
    return jnp.sum(uniform(word) * ends[-1] >= ends[:-1])
