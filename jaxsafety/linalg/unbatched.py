"""LAPACK calls that cannot lock up a CPU.

On a CPU jaxlib spreads a batch of decompositions over XLA's thread pool, and waits for it in a thread of that pool.
Once every thread waits so - several devices at work, or two decompositions of one program - nothing runs any more: the
program hangs for good. A call for one matrix takes no thread from the pool, so here a CPU's batches are loops.

SciPy's OpenBLAS, which does the work, has threads of its own: with several CPU devices set ``OPENBLAS_NUM_THREADS=1``
before SciPy is first loaded (the command line does), or they slow each other down tenfold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety.entry.programs import compiled, undifferentiated


def unbatched(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a kernel of positional arrays that ``jax.vmap`` turns into a loop on a CPU, and batches elsewhere.

    It has no gradient, on no device: a loop's could not be taken, and an SVD's is NaN at repeated values.
    """
    run = jax.custom_batching.sequential_vmap(kernel) if jax.default_backend() == "cpu" else kernel
    return lambda *arrays: run(*undifferentiated("a decomposition", arrays))


def over_batch(kernel: Callable[..., Any], *arrays: Array, batch: int) -> Any:
    """Maps an :func:`unbatched` kernel over the first ``batch`` axes of all arrays."""
    mapped = unbatched(kernel)
    for _ in range(batch):
        mapped = jax.vmap(mapped)
    return mapped(*arrays)


@compiled()
def singular_values(matrices: Float[Array, "*batch m n"]) -> Float[Array, "*batch r"]:
    """Returns the singular values of a stack, descending, without their directions."""
    # LAPACK is many times slower on wide matrices.
    tall = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
    return over_batch(partial(jnp.linalg.svd, compute_uv=False), tall, batch=matrices.ndim - 2)


@compiled()
def orthonormal(columns: Float[Array, "*batch m n"]) -> Float[Array, "*batch m r"]:
    """Returns orthonormal bases of the columns' spans by Householder reflections, r = min(m, n)."""
    return over_batch(lambda a: jnp.linalg.qr(a)[0], columns, batch=columns.ndim - 2)
