"""Directions of contrast in the residual stream, such as from safe to unsafe prompts: found, and projected out.

References: Arditi et al. 2024 (arXiv 2406.11717); Hazra et al. 2024 (arXiv 2406.11801).
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.programs import undifferentiated
from jaxsafety.linalg import svd
from jaxsafety.linalg.descent import unit
from jaxsafety.types import RESIDUAL, Model, Params, Trial

Component = Literal["mean", "first"]


@checked
def direction(differences: Float[Array, "l b d"], *, component: Component = "mean") -> Float[Array, "l d"]:
    """Returns a unit direction per layer of the differences of pairs: what they have in common.

    It is their ``mean``, or their ``first`` principal component about zero, the unit vector that has most of their
    squares, turned so that its product with the mean is not negative. Zero where all differences are.

    Raises:
        ValueError: an unknown component, differences that are not finite, or a gradient.

    References:
        Hazra et al. 2024 (arXiv 2406.11801), section 3.2, in-context safety vector; Arditi et al. 2024 (arXiv
        2406.11717), difference of means. Fidelity: of the first the text, whose code adds the mean to a component about
        it.
    """
    mean = differences.mean(axis=1)
    if component == "first":
        found = svd.decompose(undifferentiated("direction", differences), rank=1).outputs[..., 0]
        turned = jnp.where(jnp.sum(found * mean, axis=-1, keepdims=True) < 0, -found, found)
        mean = jnp.where(jnp.any(differences != 0, axis=(1, 2))[:, None], turned, 0)
    return unit(mean)


@checked
def ablated(
    values: Float[Array, "*x d"], unit: Float[Array, " d"], *, strength: float | Float[Array, ""] = 1.0
) -> Float[Array, "*x d"]:
    """Returns ``x - strength (x . unit) unit``: 1 projects the direction out, 0 is ``x``, bit for bit, 2 reflects.

    Args:
        values: activations, or weights ``[in, out]`` whose outputs are to lose the direction.
        unit: of norm 1, or zero, which changes nothing.
        strength: how much of the component goes.

    References:
        Arditi et al. 2024 (arXiv 2406.11717), directional ablation and weight orthogonalisation.
    """
    wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    along = jnp.sum(wide * unit.reshape((1,) * (wide.ndim - 1) + unit.shape), axis=-1, keepdims=True)
    left = wide - strength * along * unit.reshape((1,) * (wide.ndim - 1) + unit.shape)
    return jnp.where(jnp.asarray(strength) == 0, values, left.astype(values.dtype))


@checked
def at_last(model: Model, params: Params, trial: Trial, *, count: int = 1) -> Float[Array, "l b {count} d"]:
    """Returns activations at the last ``count`` prompt tokens, the last one first."""
    places = trial.last[:, None] - jnp.arange(count)[None]
    return model.apply(params, trial.complied.tokens, sites=(RESIDUAL,), positions=places).activations[RESIDUAL]
