"""Safe LoRA: where fine-tuning leaves the directions that alignment changed, it is projected onto them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry import checks
from jaxsafety.entry.annotations import checked
from jaxsafety.types import Edit, Key, Params, Point


@checked
def onto_alignment(update: Float[Array, "l m n"], alignment: Float[Array, "l m n"]) -> Float[Array, "l m n"]:
    """Returns ``dW V^T V / |V|_F``: fine-tuning updates ``dW`` in the output directions of the alignment updates V.

    It is no projector, and has V's unit: of ``c V`` it is c times as much. Along an output direction of V with singular
    value s it multiplies by ``s^2 / |V|_F``, which may be above or below 1. Zero where V is.

    References:
        Hsu et al. 2024 (arXiv 2405.16833): ``C dW`` with ``C = V V^T / |V|_F`` of weights ``[out, in]``; ours are
        ``[in, out]``.

    Example:
        >>> import jax.numpy as jnp
        >>> update, alignment = jnp.float32([[[1.0, 1.0]]]), jnp.float32([[[2.0, 0.0]]])
        >>> print(onto_alignment(update, alignment), similarity(update, alignment).round(3))
        [[[2. 0.]]] [0.707]
    """
    norm = jnp.sqrt(jnp.sum(alignment**2, axis=(1, 2), keepdims=True))
    unit = alignment / jnp.where(norm > 0, norm, 1)
    inside = jnp.matmul(update, unit.mT, precision=jax.lax.Precision.HIGHEST)
    return jnp.matmul(inside, alignment, precision=jax.lax.Precision.HIGHEST)


@checked
def similarity(update: Float[Array, "l m n"], alignment: Float[Array, "l m n"]) -> Float[Array, " l"]:
    """Returns the cosine of each update and what :func:`onto_alignment` makes of it, in [0, 1]; 1 where either is 0."""
    kept = onto_alignment(update, alignment)
    product, *squares = (jnp.sum(a * b, axis=(1, 2)) for a, b in ((kept, update), (kept, kept), (update, update)))
    norms = jnp.sqrt(squares[0]) * jnp.sqrt(squares[1])
    return jnp.where(norms > 0, product / jnp.where(norms > 0, norms, 1), 1)


@checked
def projected(
    tuned: Params, aligned: Params, base: Params, *, threshold: float | Float[Array, ""], pattern: str = tree.MATRICES
) -> Params:
    """Returns the tuned model with those matrices' updates projected whose :func:`similarity` is below a threshold.

    All else is as tuned, and so are matrices that are not below it, bit for bit. Where the alignment changed nothing
    there is nothing to project onto, and the update is kept.

    Args:
        tuned: the model tuned from the aligned one, whose structure the result has.
        aligned: the aligned model.
        base: what it was aligned from.
        threshold: towards 0 nothing is projected, above 1 everything is.
        pattern: paths of the ``[l, m, n]`` stacks.

    Raises:
        ValueError: a threshold that is not finite, trees that differ in structure or shape, values that are not finite,
            or a pattern that matches nothing or something else than stacks of matrices.

    References:
        Hsu et al. 2024 (arXiv 2405.16833).

    Fidelity: the rule is the paper's, without any normalisation beside its own (see :func:`onto_alignment`); the paper
        has it of LoRA's products, here it is of every matrix's update, whatever was trained.
    """
    checks.check_finite(threshold=threshold)
    tree.check_match(tuned, aligned, names=("tuned", "aligned"), finite=True)
    tree.check_match(aligned, base, names=("aligned", "base"), finite=True)
    middle, start, parts = tree.flatten(aligned), tree.flatten(base), {}
    for path, stack in tree.matrix_stacks(tuned, pattern).items():
        wide = jnp.promote_types(stack.dtype, jnp.float32)
        after, between, before = (leaf.astype(wide) for leaf in (stack, middle[path], start[path]))
        update, alignment = after - between, between - before
        moved = (between + onto_alignment(update, alignment)).astype(stack.dtype)
        parts[path] = jnp.where((similarity(update, alignment) < threshold)[:, None, None], moved, stack)
    return tree.label(tuned, lambda path, leaf: parts.get(path, leaf))


@dataclass(frozen=True)
class Config:
    """Which matrices' updates are projected.

    Attributes:
        threshold: the cosine below which they are.
    """

    threshold: tuple[float, ...] = swept(0.35)
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    return projected(trees["target"], trees["aligned"], trees["base"], threshold=point["threshold"])


EDIT = Edit(Config, edit, roles=("target", "aligned", "base"), leafwise=True)
