"""The largest entries of an array by magnitude, exactly as many as asked for."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.programs import compiled


@checked
def largest(values: Shaped[Array, "*x"], *, count: int | Int[Array, ""]) -> Bool[Array, "*x"]:
    """Marks the ``count`` largest entries by magnitude; of those that are as large the ones that come first.

    The array has fewer than 2^31 entries; a count outside of [0, size], and so all that may be traced, counts as the
    nearest inside. What is not a number counts as the largest. Marks have no gradient.
    """
    return _largest(values, jnp.clip(jnp.asarray(count), 0, values.size))


@compiled()
def _largest(values: Array, count: Int[Array, ""]) -> Bool[Array, "..."]:
    """Counts entries once for every bit of the threshold.

    That takes a fraction of the time of a sort, and of the memory of one that tells where entries that are as large
    stand.
    """
    size, shape = values.size, values.shape
    if size == 1:  # as all but one are where a model is edited a matrix at a time
        return jnp.broadcast_to(count > 0, shape)
    wide = jax.lax.stop_gradient(values).astype(jnp.promote_types(values.dtype, jnp.float32))
    kind = jnp.iinfo(f"int{8 * wide.dtype.itemsize}")
    # Floats without their sign are in the order of their bits.
    ranks = jax.lax.bitcast_convert_type(wide, kind.dtype) & kind.max
    threshold = _greatest(lambda rank: jnp.sum(ranks >= rank, dtype=jnp.int32) >= count, kind.bits - 1, ranks.dtype)
    level, above = ranks == threshold, ranks > threshold
    left = count - jnp.sum(above, dtype=jnp.int32)

    def before(end: Int[Array, ""]) -> Bool[Array, "..."]:
        return level & (jax.lax.iota(jnp.int32, size).reshape(shape) < end)

    end = _greatest(lambda end: jnp.sum(before(end), dtype=jnp.int32) <= left, size.bit_length(), jnp.dtype("int32"))
    return above | before(end)


def _greatest(holds: Callable[[Array], Array], bits: int, dtype: jnp.dtype) -> Int[Array, ""]:
    """The greatest number of so many bits that something holds for, which then holds for all below it."""

    def step(i: Array, found: Array) -> Array:
        more = found | jnp.left_shift(jnp.asarray(1, dtype), (bits - 1 - i).astype(dtype))
        return jnp.where(holds(more), more, found)

    return jax.lax.fori_loop(0, bits, step, jnp.zeros((), dtype))
