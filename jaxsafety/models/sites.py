"""Captured activations: which sites and layers a caller may ask for, and the positions picked out of them."""

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety.suggest import check_name


def chosen_layers(
    layers: tuple[int, ...] | None, *, depth: int, sites: tuple[str, ...], known: Iterable[str]
) -> tuple[int, ...]:
    """Returns the layers that a request means, after checking it.

    Args:
        layers: ascending layer indices; None is all of them.
        depth: layers of the model ``l``.
        sites: the names asked for.
        known: the names that the model has.

    Raises:
        ValueError: unknown site, or layers that are not ascending indices of this model.
    """
    for site in sites:
        check_name("site", site, known)
    chosen = tuple(range(depth)) if layers is None else layers
    if not chosen or list(chosen) != sorted(set(chosen) & set(range(depth))):
        raise ValueError(f"layers: got {layers}, expected ascending indices from 0 to {depth - 1}")
    return chosen


def pick(
    rows: Float[Array, "rows d"], *, tokens: int, positions: Int[Array, "b p"] | None
) -> Float[Array, "rows//{tokens} _ d"]:
    """Returns the rows of a batch of sequences at the positions asked for.

    Args:
        rows: ``[b*t, d]``, one row per token.
        tokens: ``t``.
        positions: ``[b, p]`` indices into ``t``; None is every position.

    Returns:
        ``[b, p, d]``, ``t`` in the place of ``p`` without positions; NaN where a position is out of range.
    """
    activations = rows.reshape(-1, tokens, rows.shape[-1])
    return activations if positions is None else jnp.take_along_axis(activations, positions[..., None], axis=1)
