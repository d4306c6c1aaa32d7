"""Linear probes: what a layer's activations say of a property, read by one direction."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_positive
from jaxsafety.entry.programs import undifferentiated
from jaxsafety.types import Leaf

Scalar = float | Float[Array, ""]


@flax.struct.dataclass
class Probe:
    """A direction and an offset per layer: a sample's score is ``activations @ direction + offset``.

    Attributes:
        direction: ``[l, d]``.
        offset: ``[l]``.
    """

    direction: Leaf
    offset: Leaf


@checked
def fit(activations: Float[Array, "l b d"], labels: Bool[Array, " b"], *, ridge: Scalar = 0.1) -> Probe:
    """Fits least squares to ``+1`` where labelled and ``-1`` elsewhere, with a penalty on the direction.

    Either class weighs one half, however many samples it has.

    Args:
        activations: samples by layer.
        labels: which of them have the property.
        ridge: penalty over the mean variance of the features, above 0: the more, the nearer to the difference of means.

    Returns:
        A :class:`Probe`, whose score is above 0 where the property is likelier; NaN where a class has no sample.

    Raises:
        ValueError: a ridge that is not above 0, or a gradient.

    References:
        Alain and Bengio 2016 (arXiv 1610.01644). Fidelity: least squares, which has a closed form, for logistic
        regression.
    """
    check_positive("ridge", ridge)
    rows = undifferentiated("fit", activations)
    kinds = jnp.stack([labels, ~labels]).astype(rows.dtype)
    weights = jnp.sum(kinds / jnp.sum(kinds, axis=1, keepdims=True), axis=0) / 2
    signs = jnp.where(labels, 1.0, -1.0).astype(rows.dtype)
    mean = jnp.einsum("b,lbd->ld", weights, rows)
    apart = rows - mean[:, None]
    scatter = jnp.einsum("b,lbd,lbe->lde", weights, apart, apart)
    size = scatter.shape[-1]
    penalty = ridge * jnp.trace(scatter, axis1=1, axis2=2)[:, None, None] / size
    # Where all samples are one there is no direction.
    penalty = jnp.where(penalty > 0, penalty, 1) * jnp.eye(size)[None]
    wanted = jnp.einsum("b,lbd,b->ld", weights, apart, signs)
    direction = jnp.linalg.solve(scatter + penalty, wanted[..., None])[..., 0]
    return Probe(direction, -jnp.sum(direction * mean, axis=-1))


@checked
def scores(probe: Probe, activations: Float[Array, "l b d"]) -> Float[Array, "l b"]:
    """Returns how much a probe sees its property in samples."""
    return jnp.einsum("ld,lbd->lb", probe.direction, activations) + probe.offset[:, None]


@checked
def auc(scores: Float[Array, "*l b"], labels: Bool[Array, " b"]) -> Float[Array, "*l"]:
    """Area under the ROC curve: how often one of the labelled samples scores above one of the others, a tie half.

    In [0, 1], 0.5 by chance; NaN where a class has no sample, or a score is NaN.

    References:
        Hanley and McNeil 1982, Radiology 143: the area is that of the Mann-Whitney statistic.
    """
    pairs = (labels[:, None] & ~labels[None, :]).astype(scores.dtype)
    above = jnp.sign(scores[..., :, None] - scores[..., None, :])
    # A NaN times 0 is NaN.
    return jnp.einsum("...pn,pn->...", (above + 1) / 2, pairs) / jnp.sum(pairs)
