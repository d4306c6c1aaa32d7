"""Local sensitivity of a model's first answer token to its prompt: the paper's local Lipschitz constant, two ways.

Both are taken at the embeddings of one prompt, positions not added. ``forward`` has its parameters bound, and no row of
a batch may influence another. ``position`` is the index in ``[0, t)`` of the input that predicts the first answer
token; what stands behind it, padding that may hold anything, costs time and changes nothing in a causal model: cut it.
Of the embeddings ``prompt`` marks those that are varied; the others are held. Norms are logits per unit of embedding.
Called eagerly, a ``forward`` that is a :class:`jax.tree_util.Partial` of its parameters is compiled once, any other in
every call: what it closes over may change.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between, check_finite, check_indices, check_positive, known
from jaxsafety.entry.programs import compiled, undifferentiated
from jaxsafety.linalg.masked import norm
from jaxsafety.linalg.power import TopSingular, largest_singular_value
from jaxsafety.types import ForwardEmbeddings, Key


@checked
def gradient_norm(
    forward: ForwardEmbeddings,
    embeddings: Float[Array, "b t d"],
    *,
    position: Int[Array, " b"],
    prompt: Bool[Array, "b t"],
) -> Float[Array, " b"]:
    """Frobenius norm of the gradient of the top logit, ``|d max_v z_v / d E|_F`` over the prompt's embeddings.

    One backward pass for the whole batch.

    Returns:
        At least float32. Of tied top logits the first counts. NaN for an empty prompt or a position out of range where
        these are traced.

    Raises:
        ValueError: an empty batch, or (unless traced) an empty prompt, a position out of range, or embeddings up to
            that position that are not finite.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.3 and figure 6.

    Fidelity: faithful where ``prompt`` marks what stands before the last prompt token, as in the released code. What
        that code has after the prompt, the complied answer, is without effect in a causal model.
    """
    _check(embeddings, position=position, prompt=prompt)
    return _gradient_norm(forward, embeddings, position, prompt)


@compiled()
def _gradient_norm(
    forward: ForwardEmbeddings,
    embeddings: Float[Array, "b t d"],
    position: Int[Array, " b"],
    prompt: Bool[Array, "b t"],
) -> Float[Array, " b"]:
    embeddings, defined = _prepared(embeddings, position, prompt)

    def top(embeddings: Float[Array, "b t d"]) -> Float[Array, ""]:
        logits = jnp.take_along_axis(forward(embeddings), position[:, None, None], axis=1)[:, 0]
        # A maximum would share the gradient out among ties, whose mean is no logit's gradient.
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        # Rows are independent: the gradient of the sum holds each row's own.
        return jnp.sum(jnp.take_along_axis(logits, best, axis=-1))

    gradient = jnp.where(prompt[..., None], jax.grad(top)(embeddings), 0.0)
    return jnp.where(defined, norm(gradient.reshape(gradient.shape[0], -1), axis=-1), jnp.nan)


@checked
def jacobian_norm(
    forward: ForwardEmbeddings,
    embeddings: Float[Array, "b t d"],
    *,
    position: Int[Array, " b"],
    prompt: Bool[Array, "b t"],
    key: Key,
    iterations: int | Int[Array, ""] = 20,
    tolerance: float | Float[Array, ""] = 1e-2,
) -> TopSingular:
    """Largest singular value of the Jacobian from the prompt's embeddings to the logits of the first answer token.

    The local Lipschitz constant of all logits at once, where :func:`gradient_norm` is the row of one logit: never below
    it. Matrix-free; the samples share one loop, whose products are as large as those of one batch, until the last has
    converged.

    Args:
        forward: differentiable in forward mode.
        key: of the random starts.
        iterations: products with the Jacobian and its transpose at most, at least 1.
        tolerance: relative residual to stop at, > 0; the value's own relative error is about its square over the
            spectral gap.

    Returns:
        Record of ``[b]`` each. NaN and not converged for an empty prompt or a position out of range where these are
        traced.

    Raises:
        ValueError: iterations or tolerance out of range, as :func:`gradient_norm`, or a gradient is asked; it has none.

    Fidelity: not in the paper, whose local Lipschitz constant is :func:`gradient_norm`, a lower bound of this one.
    """
    _check(embeddings, position=position, prompt=prompt)
    check_between("iterations", iterations, 1)
    check_positive("tolerance", tolerance)
    embeddings = undifferentiated("jacobian_norm", embeddings)
    return _jacobian_norm(forward, embeddings, position, prompt, key, iterations, tolerance)


@compiled()
def _jacobian_norm(
    forward: ForwardEmbeddings,
    embeddings: Array,
    position: Array,
    prompt: Array,
    key: Key,
    iterations: Any,
    tolerance: Any,
) -> TopSingular:  # fmt: skip
    embeddings, defined = _prepared(embeddings, position, prompt)

    def one(row: Float[Array, "t d"], at: Int[Array, ""], varied: Bool[Array, " t"], key: Key) -> TopSingular:
        def logits(row: Float[Array, "t d"]) -> Float[Array, " v"]:
            return forward(jnp.where(varied[:, None], row, jax.lax.stop_gradient(row))[None])[0, at].astype(row.dtype)

        image, push = jax.linearize(logits, row)
        pull = jax.linear_transpose(push, row)
        # The transpose has the same singular values, and vectors of v numbers, not t d: a tenth less time.
        return largest_singular_value(
            lambda cotangent: pull(cotangent)[0],
            jnp.zeros_like(image),
            key=key,
            iterations=iterations,
            tolerance=tolerance,
        )

    found = jax.vmap(one)(embeddings, position, prompt, jax.random.split(key, embeddings.shape[0]))
    return found.replace(
        value=jnp.where(defined, found.value, jnp.nan),
        residual=jnp.where(defined, found.residual, jnp.nan),
        converged=found.converged & defined,
    )


def _check(embeddings: Array, *, position: Array, prompt: Array) -> None:
    count, size, _ = embeddings.shape
    if count == 0:
        raise ValueError("embeddings hold 0 prompts, expected at least 1")
    check_indices("position", position, size, of="an index of the embeddings")
    varied, last, values = known(prompt), known(position), known(embeddings)
    if varied is not None and not (filled := varied.any(axis=1)).all():
        raise ValueError(f"prompt {filled.argmin()} of the batch is empty, expected at least one position to vary")
    if values is not None:
        places = np.arange(size)[None]
        used = True if varied is None or last is None else varied | (places <= last[:, None])
        check_finite(embeddings=np.where(np.asarray(used)[..., None], values, 0))


def _prepared(
    embeddings: Float[Array, "b t d"], position: Int[Array, " b"], prompt: Bool[Array, "b t"]
) -> tuple[Float[Array, "b t d"], Bool[Array, " b"]]:
    """Embeddings of at least float32, numbers where they do not matter, and the rows with a prompt and a position."""
    size = embeddings.shape[1]
    defined = jnp.any(prompt, axis=1) & (position >= 0) & (position < size)
    used = prompt | (jnp.arange(size)[None] <= position[:, None])
    embeddings = jnp.where(used[..., None], embeddings, 0)
    return embeddings.astype(jnp.promote_types(embeddings.dtype, jnp.float32)), defined
