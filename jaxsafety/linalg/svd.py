"""Singular value decompositions of stacks of matrices, each value with an estimate of its error.

A weight is stored ``[in, out]`` (``x @ w``) and decomposed as ``w = inputs @ diag(values) @ outputs.T``: the columns of
``inputs`` are orthonormal directions of the input space, those of ``outputs`` of the output space. The paper and
PyTorch store ``[out, in]``: their column space is the output space here, their row space the input space.

Compare directions by projectors or principal angles, never entry by entry: signs are arbitrary, and so is the basis of
a repeated value. Nothing here has a gradient, and a ValueError says so: that of an SVD is NaN at repeated values.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_finite, known, whole_number
from jaxsafety.entry.programs import compiled, undifferentiated
from jaxsafety.linalg.unbatched import over_batch, unbatched
from jaxsafety.types import Key, Leaf

Method = Literal["full", "gram", "randomized"]

# The relative error that a triplet from the Gram matrix may have. Squaring the matrix squares its condition number, so
# a direction with values[i] = s_1 / c is off by about c^2 roundings: in float32 2e-6 at c = 10, 1e-4 at 100, 2e-2 at
# 1000, and nothing is left at 10^4.
GRAM_ERROR = 1e-3

# Each pass of shifted Cholesky QR divides the condition number by some 300 in float32.
_PASSES = 3
# Conditioned columns have singular values near 1; one below this is rounding that the passes have not raised.
_DEPENDENT = 0.03
# Columns that ``randomized`` multiplies a matrix with at once, at least: fewer take a processor as long.
_WIDTH = 32

_HIGHEST = jax.lax.Precision.HIGHEST
_product = partial(jnp.matmul, precision=_HIGHEST)
_alone = jax.lax.optimization_barrier


def rounding(dtype: DTypeLike) -> float:
    """Share of the largest singular value below which one of a small matrix is but rounding."""
    return 16 * float(jnp.finfo(dtype).eps)


@flax.struct.dataclass
class SVD:
    """Singular triplets, largest value first; any leading batch axes.

    Attributes:
        inputs: ``[*batch, m, r]`` orthonormal directions of the input space, in columns.
        values: ``[*batch, r]`` singular values, descending, at least 0.
        outputs: ``[*batch, n, r]`` orthonormal directions of the output space, in columns.
        errors: ``[*batch, r]`` residual ``max(|A^T u - s v|, |A v - s u|)`` of each triplet in the unit of its value: a
            true singular value lies within it, up to the rounding of the residual itself (about ``eps * s_1``).
    """

    inputs: Leaf
    values: Leaf
    outputs: Leaf
    errors: Leaf


@checked
def decompose(
    matrices: Float[Array, "*batch m n"],
    *,
    method: Method = "full",
    rank: int | None = None,
    chunk: int | None = None,
    key: Key | None = None,
    oversample: int | None = None,
    power_iterations: int = 5,
) -> SVD:
    """Leading singular triplets of every matrix of a stack, ``A = sum_i s_i u_i v_i^T``.

    ``full`` is LAPACK's or the device's own SVD: right for null spaces and small values. ``gram`` is an
    eigendecomposition of the smaller Gram matrix: several times faster, and accurate for triplets down to
    :func:`gram_limit` of the largest value. Below it a triplet is refused: outside of jit and vmap the stack is
    decomposed with ``full`` instead, with a warning; inside them its value, error and directions are NaN.
    ``randomized`` projects on what a random block of vectors and its power iterations span together (block Krylov): for
    a few leading triplets of large matrices; ``errors`` says how good they are. ``full`` and ``gram`` compute in the
    orientation with more rows than columns, which LAPACK serves faster than the other.

    Args:
        matrices: ``[*batch, m, n]``; 16-bit floats are decomposed in float32, float64 in float64.
        method: see above.
        rank: how many triplets, in ``[1, min(m, n)]``; None for all.
        chunk: matrices decomposed at once, through ``jax.lax.map``; None for the whole stack.
        key: for ``randomized``; each matrix draws its own subspace.
        oversample: dimensions that ``randomized`` carries beyond ``rank``, at least 0; None for half of the rank, at
            least 10.
        power_iterations: how often ``randomized`` multiplies its block with ``A^T A``, at least 0. The ``rank`` and
            ``oversample`` dimensions are shared by the block and its images, and each image sharpens the decay by two
            powers. A value that is repeated exactly, or to rounding, is found as often as a block is wide: min(rank,
            32) at least.

    Returns:
        The triplets. A zero matrix has zero values without error. ``gram`` sets values at rounding level (below
        ``4 eps sqrt(max(m, n)) s_1``) to exactly 0, and their directions on the longer side to zero vectors. ``full``
        and ``randomized`` leave values of the size of a rounding; the directions of ``full`` are always complete, those
        of ``randomized`` may be zero vectors where the matrix has fewer dimensions than asked for.

    Raises:
        ValueError: an unknown method, fewer than two axes, rank, chunk, oversample or power_iterations out of range,
            ``randomized`` without a key, (unless traced) values that are not finite, or a gradient: it has none.
        Warning: RuntimeWarning where ``gram`` falls back to ``full``.

    References: Musco and Musco 2015 (arXiv 1504.05477), algorithm 2; Golub, Luk and Overton 1981 (block Lanczos);
        Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), on what a random block misses.
    """
    size = min(matrices.shape[-2:])
    rank = size if rank is None else rank
    counts = {
        "rank": whole_number("rank", rank, 1, size, what=", the smaller side"),
        "chunk": None if chunk is None else whole_number("chunk", chunk, 1),
        "oversample": whole_number("oversample", max(10, rank // 2) if oversample is None else oversample, 0),
        "power_iterations": whole_number("power_iterations", power_iterations, 0),
    }
    if method == "randomized" and key is None:
        raise ValueError("method 'randomized' got no key, expected key=jax.random.key(...)")
    check_finite(matrices=matrices)
    matrices = undifferentiated("decompose", matrices)
    found = _triplets(matrices, key if method == "randomized" else None, method=method, **counts)
    errors = known(found.errors) if method == "gram" else None
    if errors is None or not (refused := np.isnan(errors)).any():
        return found
    exact = _triplets(matrices, None, method="full", **counts)
    values = np.asarray(exact.values)
    condition = np.max(np.broadcast_to(values[..., :1], values.shape)[refused] / values[refused])
    warnings.warn(
        f"the Gram matrix resolves condition numbers up to {1 / gram_limit(values.dtype):.0f} in {values.dtype}, "
        f"these matrices have {condition:.1e} within the first {values.shape[-1]} values: decomposed with method "
        "'full' instead",
        RuntimeWarning,
        stacklevel=3,
    )
    return exact


def gram_limit(dtype: DTypeLike) -> float:
    """Returns the smallest ``s_i / s_1`` that method ``gram`` is trusted with: 1.1e-2 in float32, 4.7e-7 in float64."""
    return math.sqrt(float(jnp.finfo(dtype).eps) / GRAM_ERROR)


@compiled("method", "rank", "chunk", "oversample", "power_iterations")
def _triplets(
    matrices: Float[Array, "*batch m n"], key: Key | None, *, method: Method, rank: int, chunk: int | None,
    oversample: int, power_iterations: int,
) -> SVD:  # fmt: skip
    matrices = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))
    if method == "randomized":
        keys = jax.random.split(key, matrices.shape[:-2])
        kernel = partial(_randomized, rank=rank, oversample=oversample, power_iterations=power_iterations)
        return _over_stack(kernel, matrices, keys, chunk=chunk)
    kernel = partial(_full if method == "full" else _gram, rank=rank)
    return _over_stack(partial(_tall, kernel), matrices, chunk=chunk)


def _over_stack(kernel: Callable[..., SVD], matrices: Array, *keys: Array, chunk: int | None) -> SVD:
    """Runs a kernel for one matrix over the stack."""
    batch = matrices.shape[:-2]
    if chunk is None and math.prod(batch) > 1:
        return over_batch(kernel, matrices, *keys, batch=len(batch))
    kernel = unbatched(kernel)
    flat = tuple(jnp.reshape(a, (-1, *a.shape[len(batch) :])) for a in (matrices, *keys))
    # One at a time there is no batch axis, which costs a copy of each matrix.
    at_once = None if chunk is None or chunk == 1 else chunk
    found = jax.lax.map(lambda given: kernel(*given), flat, batch_size=at_once)
    return jax.tree.map(lambda a: jnp.reshape(a, (*batch, *a.shape[1:])), found)


def _tall(kernel: Callable[[Array], SVD], matrix: Array) -> SVD:
    """Runs a kernel for a matrix with at least as many rows as columns."""
    if matrix.shape[0] >= matrix.shape[1]:
        return kernel(matrix)
    found = kernel(matrix.T)
    return found.replace(inputs=found.outputs, outputs=found.inputs)


def _exponent(matrix: Array) -> Array:
    """The power of two that brings the entries to at most 1: squares of a small update's would underflow."""
    return jnp.frexp(jnp.max(jnp.abs(matrix)))[1]


def _rescaled(found: SVD, exponent: Array) -> SVD:
    return found.replace(values=jnp.ldexp(found.values, exponent), errors=jnp.ldexp(found.errors, exponent))


def _full(matrix: Array, *, rank: int) -> SVD:
    # The default algorithm is the only one that every backend has.
    matrix = jnp.ldexp(matrix, -(exponent := _exponent(matrix)))
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    u, s, v = left[:, :rank], values[:rank], right[:rank].T
    residuals = _norms(_product(matrix.T, u) - s[None] * v), _norms(_product(matrix, v) - s[None] * u)
    return _rescaled(SVD(inputs=u, values=s, outputs=v, errors=jnp.maximum(*residuals)), exponent)


def _gram(matrix: Array, *, rank: int) -> SVD:
    matrix = jnp.ldexp(matrix, -(exponent := _exponent(matrix)))
    _, vectors = jnp.linalg.eigh(_product(matrix.T, matrix))
    v = vectors[:, ::-1][:, :rank]
    image = _product(matrix, v)
    # |A v| is the root of a Rayleigh quotient, whose error is the square of the direction's; the eigenvalue is worse.
    s = _norms(image)
    order = jnp.argsort(s, descending=True)
    v, image, s = v[:, order], image[:, order], s[order]
    # A unit v with |A v| at rounding level shows that a true value is that small, whatever the direction's error.
    rounding = 4 * math.sqrt(matrix.shape[0]) * float(jnp.finfo(matrix.dtype).eps)
    zero = s <= rounding * s[0]
    refused = ~zero & (s < gram_limit(matrix.dtype) * s[0])
    u = jnp.where(zero[None], 0.0, image / jnp.where(zero, 1.0, s)[None])
    # A v = s u by construction, so one of the two residuals is left; where s counts as zero it is |A v|.
    errors = jnp.where(zero, s, _norms(_product(matrix.T, u) - s[None] * v))
    found = _rescaled(SVD(inputs=u, values=jnp.where(zero, 0.0, s), outputs=v, errors=errors), exponent)
    return jax.tree.map(lambda a: jnp.where(refused if a.ndim == 1 else refused[None], jnp.nan, a), found)


def _randomized(matrix: Array, key: Key, *, rank: int, oversample: int, power_iterations: int) -> SVD:
    """Block Golub-Kahan: an orthonormal basis U of every ``A (A^T A)^i G``, one V of what A^T maps it to.

    Of the images nothing is thrown away, so that a few narrow blocks tell as much as a wide one refined as often.
    """
    (m, n), size = matrix.shape, min(matrix.shape)
    width = min(size, max(min(rank, _WIDTH), -(-(rank + oversample) // (power_iterations + 1))))
    blocks = min(power_iterations + 1, -(-size // width))
    exponent = _exponent(matrix)

    # A scaled or transposed copy of a large matrix takes as long as a product with it: the thin results are scaled.
    # A barrier keeps XLA from making one loop of a product and what is beside it, several times as long on a processor.
    def forward(columns: Array) -> Array:
        return jnp.ldexp(_alone(_product(matrix, _alone(columns))), -exponent)

    def backward(columns: Array) -> Array:
        return jnp.ldexp(_alone(_product(_alone(columns.T), matrix)).T, -exponent)

    def step(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds a block to U, and the next one to V; the others are what A and A^T made of blocks of V and U."""
        v, image, u, back = carry
        place = i * width
        newest = jax.lax.dynamic_slice_in_dim(v, place, width, axis=1)
        ahead = forward(newest)
        # Of the first there is none before: its place holds zeros still.
        before = jax.lax.dynamic_slice_in_dim(u, jnp.maximum(place - width, 0), width, axis=1)
        block = _beside(u, ahead, near=before)
        behind = backward(block)
        v = _put(v, _beside(v, behind, near=newest), place + width)
        return v, _put(image, ahead, place), _put(u, block, place), _put(back, behind, place)

    start = _orthonormal(jax.random.normal(key, (n, width), matrix.dtype))
    kept = tuple(jnp.zeros((side, blocks * width), matrix.dtype) for side in (m, m, n))
    v, image, u, back = jax.lax.fori_loop(0, blocks, step, (_widened(start, blocks * width), *kept))
    left, values, right = jnp.linalg.svd(_product(v.T, back), full_matrices=False)
    left, s = left[:, :rank], values[:rank]
    inputs, outputs = _product(u, right[:rank].T), _product(v, left)
    # A^T u = s v holds to rounding by construction; of A v all but the last block's part is there.
    reached = jnp.concatenate([image, forward(v[:, -width:])], axis=1)
    errors = _norms(_product(reached, left) - s[None] * inputs)
    return _rescaled(SVD(inputs=inputs, values=s, outputs=outputs, errors=errors), exponent)


def _widened(columns: Array, by: int) -> Array:
    return jnp.pad(columns, ((0, 0), (0, by)))


def _put(whole: Array, block: Array, place: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, block, place, axis=1)


def _beside(basis: Array, columns: Array, *, near: Array) -> Array:
    """What columns add to an orthonormal basis, as orthonormal columns; directions of rounding where they add none.

    ``near`` is the block of the basis that, but for rounding, they have a part in; when what they add is small, that
    rounding is large beside it, and lies anywhere in the basis. Twice is enough (Giraud et al. 2005): after once errors
    were ten times as large where a matrix has few dimensions.
    """
    columns = _conditioned(columns - _product(near, _product(near.T, columns)))
    for _ in range(2):
        columns = columns - _product(basis, _product(basis.T, columns))
    return _complete(columns)


def _orthonormal(columns: Array) -> Array:
    """A basis of the columns' span: orthonormal columns, some of them zeros where it has fewer dimensions."""
    return _complete(_conditioned(columns))


def _complete(columns: Array) -> Array:
    """Makes well conditioned columns orthonormal, and those at rounding level zeros."""
    squares, vectors = jnp.linalg.eigh(_product(columns.T, columns))
    lengths = jnp.sqrt(jnp.maximum(squares, 0.0))
    kept = lengths > _DEPENDENT
    return _product(columns, vectors) * jnp.where(kept, 1 / jnp.where(kept, lengths, 1.0), 0.0)[None]


def _conditioned(columns: Array) -> Array:
    """Well conditioned columns of the same span: ``Y R^-1`` with the Cholesky factor R of ``Y^T Y``, a few times.

    Matrix products, for LAPACK's Householder QR of a tall matrix is slow on accelerators and on busy CPUs (30 to 500 ms
    for 11008 x 138 on two cores, against 13 ms a pass). A shift keeps the factor real whatever the columns; the further
    passes undo what it leaves (Fukaya et al. 2020, "Shifted Cholesky QR").
    """
    identity = jnp.eye(columns.shape[1], dtype=columns.dtype)

    def once(_: Array, columns: Array) -> Array:
        gram = _product(columns.T, columns)
        energy = jnp.trace(gram)
        shift = jnp.where(energy > 0, 10 * jnp.finfo(columns.dtype).eps * energy, 1.0)
        factor = jnp.linalg.cholesky(gram + shift * identity)
        # The small inverse and a product: solving for long columns takes a processor four times as long.
        inverse = jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
        return _product(columns, inverse.T)

    return jax.lax.fori_loop(0, _PASSES, once, columns)


def _norms(columns: Array) -> Array:
    return jnp.linalg.norm(columns, axis=0)
