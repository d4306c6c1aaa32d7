"""Output directions of an update in order of importance: by its own spectrum, by what it does to activations, or none.

References: Wei et al. 2024 (arXiv 2402.05162), section 3.2 (ActSVD).
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety.config.names import check_name
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.programs import undifferentiated
from jaxsafety.linalg import subspace, svd
from jaxsafety.linalg.unbatched import orthonormal
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Key

Choice = Literal["singular", "activations", "random"]
# By the MLP matrix, the site that it is multiplied with.
INPUTS = {"up": "mlp.hook_in", "down": "mlp.hook_post"}
_HIGHEST = jax.lax.Precision.HIGHEST


@checked
def ordered(
    delta: Float[Array, "l m n"],
    choice: Choice,
    *,
    moments: Float[Array, "l m m"] | None = None,
    method: Method = "full",
    key: Key | None = None,
) -> Float[Array, "l n r"]:
    """Orthonormal output directions of updates ``dW``, r = min(m, n), the most important first.

    Projected on the first k of them, ``dW Q_k Q_k^T``, an update has rank k. ``singular`` are its right singular
    vectors: that projection is the nearest matrix of rank k. ``activations`` are those of ``X dW``, so that it is the
    nearest on the inputs ``X``, in the sum of squares over them (ActSVD). ``random`` is the control: a uniformly random
    basis of the span of the update's outputs, of an update of rank q its first q columns, in which k <= q of them keep
    k / q of the energy in the mean.

    Args:
        delta: updates of a stack of matrices, ``[in, out]`` each.
        choice: see above.
        moments: for ``activations``, the second moments ``X^T X`` of the inputs, which need not be centred.
        method: of the update's decomposition, see :func:`jaxsafety.linalg.svd.decompose`; directions that ``gram`` does
            not resolve are NaN.
        key: for ``random``; each matrix draws its own.

    Raises:
        ValueError: an unknown choice or method, ``activations`` without moments, ``random`` without a key, or a
            gradient: it has none.

    Fidelity: Wei et al. decompose ``W X`` of the weights, here ``X dW`` of the update; their U is this basis.
    """
    check_name("choice of directions", choice, get_args(Choice))
    delta = undifferentiated("ordered", delta)
    if choice == "activations":
        if moments is None:
            raise ValueError("choice 'activations' got no moments, expected the second moments of the inputs")
        found = svd.decompose(moments)
        # A square root of the moments stands for the inputs: products with either have the same right singular vectors.
        root = jnp.sqrt(found.values)[..., :, None] * found.outputs.mT
        return svd.decompose(jnp.matmul(root, delta, precision=_HIGHEST), method=method).outputs
    found = svd.decompose(delta, method=method)
    own = found.outputs
    if choice == "singular":
        return own
    if key is None:
        raise ValueError("choice 'random' got no key, expected key=jax.random.key(...)")
    size = own.shape[-1]
    drawn = jax.random.normal(key, (*own.shape[:-2], size, size), own.dtype)
    # Apart from directions that are but rounding: a basis of both together would leave the span.
    rank = subspace.rank_at_tolerance(found.values, tolerance=svd.rounding(own.dtype))
    there = subspace.leading(rank, size)
    turned = orthonormal(jnp.where(there[..., :, None] == there[..., None, :], drawn, 0))
    return jnp.matmul(own, turned, precision=_HIGHEST)
