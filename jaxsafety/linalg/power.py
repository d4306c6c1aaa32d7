"""The largest singular value of a Jacobian that is never formed: products with it and with its transpose.

Plain power iteration needs about ``log(1 / tolerance) / gap`` products; here each step also searches along the residual
and the previous direction, which takes the square root of that for the same products (Knyazev 2001).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between, check_positive
from jaxsafety.entry.programs import compiled, undifferentiated
from jaxsafety.linalg.unbatched import unbatched
from jaxsafety.types import Key, Leaf

_HIGHEST = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class TopSingular:
    """The largest singular value of a linear map J, as far as the iteration came.

    Attributes:
        value: ``[]`` ``|J v|`` of a unit vector v, in the unit of output over input: never above the true value.
        residual: ``[]`` ``|J^T J v - s^2 v| / s^2``; some squared singular value lies within this share of ``value^2``.
        iterations: ``[]`` int32, products with ``J^T J``.
        converged: ``[]`` bool, the residual reached the tolerance.
    """

    value: Leaf
    residual: Leaf
    iterations: Leaf
    converged: Leaf


@flax.struct.dataclass
class _Search:
    """Where the iteration stands.

    ``estimate`` is a unit vector x ``[n]`` and ``J^T J`` of it; ``previous`` the same of a unit vector across it
    towards the estimate before, or zeros. ``squared`` is the Rayleigh quotient ``s^2`` of the estimate, ``gradient`` is
    ``J^T J x - s^2 x`` and ``residual`` its norm relative to ``s^2``, after so many products.
    """

    estimate: tuple[Leaf, Leaf]
    previous: tuple[Leaf, Leaf]
    squared: Leaf
    gradient: Leaf
    residual: Leaf
    iterations: Leaf


@checked
def largest_singular_value(
    function: Callable[[Array], Array],
    point: Float[Array, "..."],
    *,
    key: Key,
    iterations: int | Int[Array, ""] = 50,
    tolerance: float | Float[Array, ""] = 1e-3,
) -> TopSingular:
    """Largest singular value of the Jacobian of ``function`` at ``point``: its local Lipschitz constant, matrix-free.

    The function goes from array to array, of any shapes, and is differentiable in forward mode. The Jacobian is
    linearised once; a step multiplies by it and by its transpose (one jvp and one vjp) and stops once the relative
    residual is at most ``tolerance`` > 0, or after ``iterations`` >= 1 products with ``J^T J``. The value's own
    relative error is about the square of the residual over the spectral gap. The start is random, drawn with ``key``.
    Under vmap the lanes share one loop, until the last has converged. Called eagerly, a function that is a
    :class:`jax.tree_util.Partial` of arrays is compiled once, any other in every call: what it closes over may change.

    Returns:
        float32 (float64 for a float64 point). A zero Jacobian has the value 0, converged, and so has one whose square
        underflows (norm below 1e-19 in float32); a Jacobian that is not finite has NaN, not converged.

    Raises:
        ValueError: iterations or tolerance out of range (unless traced), or a gradient is asked; it has none.

    References: Knyazev 2001, "Toward the optimal preconditioned eigensolver" (LOPCG, one vector, no preconditioner).
    """
    check_between("iterations", iterations, 1)
    check_positive("tolerance", tolerance)
    point = undifferentiated("largest_singular_value", point)
    return _searched(function, point, key, iterations, tolerance)


@compiled()
def _searched(
    function: Callable[[Array], Array], point: Array, key: Key, iterations: Any, tolerance: Any
) -> TopSingular:
    dtype = jnp.promote_types(point.dtype, jnp.float32)
    _, forward = jax.linearize(function, point)
    backward = jax.linear_transpose(forward, point)

    def gram(v: Array) -> Array:
        (image,) = backward(forward(v.reshape(point.shape).astype(point.dtype)))
        return image.reshape(-1).astype(dtype)

    def unfinished(search: _Search) -> Array:
        return (search.residual > tolerance) & (search.iterations < iterations)

    start = _scaled(jax.random.normal(key, (point.size,), dtype))
    nothing = jnp.zeros_like(start)
    first = _assessed((start, gram(start)), previous=(nothing, nothing), iterations=jnp.int32(1))
    last = jax.lax.while_loop(unfinished, lambda search: _step(gram, search), first)
    return TopSingular(
        value=jnp.sqrt(jnp.maximum(last.squared, 0.0)),
        residual=last.residual,
        iterations=last.iterations,
        converged=last.residual <= tolerance,
    )


def _assessed(estimate: tuple[Array, Array], *, previous: tuple[Array, Array], iterations: Array) -> _Search:
    vector, image = estimate
    squared = _dot(vector, image)
    gradient = image - squared * vector
    # A zero map has no direction to look for.
    residual = jnp.where(squared == 0, 0.0, _norm(gradient) / squared)
    return _Search(estimate, previous, squared, gradient, residual, iterations)


def _step(gram: Callable[[Array], Array], search: _Search) -> _Search:
    """The best vector in the span of the estimate, its residual and the last step: one more product.

    Only orthonormal combinations of earlier images are taken, so their rounding adds up and is never amplified.
    """
    (x, image_x), (p, image_p) = search.estimate, search.previous
    w = _scaled(search.gradient)
    for _ in range(2):  # the first pass cancels most of a residual that is rounding by now
        w = w - _dot(x, w) * x - _dot(p, w) * p
        length = _norm(w)
        w = w * jnp.where(length > jnp.sqrt(jnp.finfo(w.dtype).eps), 1 / length, 0.0)
    basis, images = jnp.stack([x, w, p]), jnp.stack([image_x, gram(w), image_p])
    # Parameters that the function closes over have none either.
    small = undifferentiated(
        "the largest singular value of a Jacobian", jnp.matmul(basis, images.T, precision=_HIGHEST)
    )
    vectors = unbatched(lambda gram: jnp.linalg.eigh(gram)[1])(small)
    best = vectors[:, -1]
    # The last step, turned within the plane of both until it is orthogonal to the new estimate.
    length = _norm(best[1:])
    turned = best * jnp.where(length > 0, best[0] / length, 0.0)
    weights = jnp.stack([best, turned.at[0].set(-length)])
    estimate, previous = zip(*(jnp.matmul(weights, rows, precision=_HIGHEST) for rows in (basis, images)), strict=True)
    return _assessed(estimate, previous=previous, iterations=search.iterations + 1)


def _scaled(vector: Array) -> Array:
    length = _norm(vector)
    return vector / jnp.where(length > 0, length, 1.0)


def _norm(vector: Array) -> Array:
    return jnp.sqrt(_dot(vector, vector))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b)
