"""Matrices cut to a low rank: the nearest of that rank, in the sum of squares."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between
from jaxsafety.entry.programs import undifferentiated
from jaxsafety.linalg import subspace, svd
from jaxsafety.linalg.update_spaces import Method


@checked
def truncated(
    matrices: Float[Array, "l m n"], *, rank: int | Int[Array, ""], method: Method = "full"
) -> Float[Array, "l m n"]:
    """Returns the leading ``rank`` singular directions of every matrix with their values: ``U_k S_k V_k^T``.

    Args:
        matrices: a stack of them.
        rank: at least 0, which leaves nothing; a matrix that has fewer is kept whole. May be traced.
        method: of the decomposition, see :func:`jaxsafety.linalg.svd.decompose`; a direction that ``gram`` does not
            resolve inside jit or vmap is NaN.

    Raises:
        ValueError: rank below 0, matrices that are not finite, or a gradient.

    References:
        Eckart and Young 1936, Psychometrika 1.
    """
    check_between("rank", rank, 0)
    found = svd.decompose(undifferentiated("truncated", matrices), method=method)
    kept = subspace.leading(jnp.asarray(rank), found.values.shape[-1])[None, None]
    # Both factors: what is not kept may be NaN.
    inputs, outputs = jnp.where(kept, found.inputs * found.values[:, None, :], 0), jnp.where(kept, found.outputs, 0)
    return jnp.matmul(inputs, outputs.mT, precision=jax.lax.Precision.HIGHEST)
