"""How much of an update lies in the leading part of some space, and which of a matrix's directions are new.

References: the energy kept in a subspace, arXiv 2505.14185 (section 3); intruder dimensions, arXiv 2410.21228
(section 3, algorithm 1). In our own words, and beside what chance gives, which neither has for these matrices.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_finite
from jaxsafety.entry.programs import undifferentiated
from jaxsafety.linalg import subspace, svd
from jaxsafety.linalg.unbatched import orthonormal
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Key

Side = Literal["inputs", "outputs"]
_HIGHEST = jax.lax.Precision.HIGHEST


@checked
def energy_kept(
    delta: Float[Array, "l m n"], basis: Float[Array, "l d r"], *, side: Side, counts: Int[Array, " k"]
) -> Float[Array, "l k"]:
    """Shares of updates' squared Frobenius norms in the span of a basis' first columns, in [0, 1].

    Args:
        delta: updates, ``[in, out]`` each; one of zeros keeps NaN.
        basis: orthonormal columns, the leading ones first: of the ``inputs``, d = m, or the ``outputs``, d = n. A
            random one keeps ``count / d`` in the mean.
        side: see there.
        counts: how many columns, at least 0; of more than there are the share is NaN.

    Raises:
        ValueError: a basis of another side or number of layers, or values that are not finite.
    """
    sides = {"inputs": delta.mT, "outputs": delta}
    written, layers = sides[side], delta.shape[0]
    if basis.shape[:2] != (layers, written.shape[-1]):
        raise ValueError(
            f"basis: got {basis.shape}, expected columns of the {side}, [{layers}, {written.shape[-1]}, r] for updates "
            f"{delta.shape}"
        )
    check_finite(delta=delta, basis=basis)
    largest = jnp.max(jnp.abs(written), axis=(-2, -1), keepdims=True)
    written = written / jnp.where(largest > 0, largest, jnp.nan)
    along = jnp.sum(jnp.square(jnp.matmul(written, basis, precision=_HIGHEST)), axis=-2)
    kept = jnp.concatenate([jnp.zeros_like(along[:, :1]), jnp.cumsum(along, axis=-1)], axis=-1)
    shares = kept[:, jnp.clip(counts, 0, basis.shape[-1])] / jnp.sum(jnp.square(written), axis=(-2, -1))[:, None]
    return jnp.where(counts > basis.shape[-1], jnp.nan, jnp.minimum(shares, 1.0))


@checked
def known_directions(
    before: Float[Array, "l m n"], after: Float[Array, "l m n"], *, count: int, method: Method = "full"
) -> Float[Array, "l k"]:
    """The largest absolute cosine of each of the leading output directions after tuning with any one from before.

    One whose cosine is small is an intruder: tuning put it among the leading ones, and no single direction was like it.
    Directions at rounding level of ``before`` are none: in its null space a basis is arbitrary. Where a spectrum has
    nearly equal values its directions turn freely, so compare with :func:`like`.

    Args:
        before: weights, ``[in, out]`` each.
        after: the same after tuning.
        count: leading directions of ``after``, k, at least 1 and at most min(m, n).
        method: of the decomposition after tuning; a direction that ``gram`` does not resolve is NaN.

    Raises:
        ValueError: count out of range, an unknown method, values that are not finite, or a gradient: it has none.

    Fidelity: theirs are singular vectors of ``[out, in]`` matrices on the output side, as here; they take the cosine
        with its sign, which a singular vector does not have.
    """
    before, after = undifferentiated("known_directions", (before, after))
    own = svd.decompose(after, method=method, rank=count).outputs
    first = svd.decompose(before)
    cosines = jnp.abs(jnp.matmul(first.outputs.mT, own, precision=_HIGHEST))
    rank = subspace.rank_at_tolerance(first.values, tolerance=svd.rounding(first.values.dtype))
    there = subspace.leading(rank, first.values.shape[-1])
    return jnp.minimum(jnp.max(jnp.where(there[..., None], cosines, 0), axis=-2), 1.0)


@checked
def like(delta: Float[Array, "l m n"], *, key: Key, method: Method = "full") -> Float[Array, "l m n"]:
    """Updates of the same singular values in uniformly random directions: what an update of no meaning would do."""
    values = svd.decompose(undifferentiated("like", delta), method=method).values
    left, right = jax.random.split(key)
    shape, rank = delta.shape[:-2], values.shape[-1]
    inputs = orthonormal(jax.random.normal(left, (*shape, delta.shape[-2], rank), delta.dtype))
    outputs = orthonormal(jax.random.normal(right, (*shape, delta.shape[-1], rank), delta.dtype))
    return jnp.matmul(inputs * values[..., None, :], outputs.mT, precision=_HIGHEST)
