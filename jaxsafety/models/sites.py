"""Activations of a model's layers: which a caller may ask for, where they are edited, and the positions picked out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety.config.names import check_name
from jaxsafety.types import Hook

# (site, rows [b*t, d] of one layer) to the rows that flow on.
RowEdit = Callable[[str, Array], Array]


def chosen_layers(
    layers: tuple[int, ...] | None, *, depth: int, sites: tuple[str, ...], known: Iterable[str]
) -> tuple[int, ...]:
    """Returns the layers ``[0, depth)`` that a request means, all of them for None, after checking it.

    Raises:
        ValueError: a site that is not ``known``, or layers that are not ascending indices of this model.
    """
    for site in sites:
        check_name("site", site, known)
    chosen = tuple(range(depth)) if layers is None else layers
    if not chosen or list(chosen) != sorted(set(chosen) & set(range(depth))):
        raise ValueError(f"layers: got {layers}, expected ascending indices from 0 to {depth - 1}")
    return tuple(chosen)


def pick(
    rows: Float[Array, "rows d"], *, tokens: int, positions: Int[Array, "b p"] | None
) -> Float[Array, "rows//{tokens} _ d"]:
    """Returns the rows ``[b*t, d]`` of a batch of sequences at the positions asked for, None for every one.

    They are ``[b, p, d]``, or ``[b, t, d]`` without positions; NaN where a position is out of range.
    """
    activations = rows.reshape(-1, tokens, rows.shape[-1])
    if positions is None:
        return activations
    # An index below zero would count from the end.
    return jnp.take_along_axis(activations, jnp.where(positions < 0, tokens, positions)[..., None], axis=1)


def scored(rows: Float[Array, "rows d"], *, tokens: int, at: Int[Array, "b p"] | None) -> Float[Array, "_ d"]:
    """Returns the rows ``[b*p, d]`` of ``[b*t, d]`` whose logits are asked for; all of them without ``at``."""
    return rows if at is None else pick(rows, tokens=tokens, positions=at).reshape(-1, rows.shape[-1])


def of_layer(
    edit: Hook | None, *, layer: Int[Array, ""] | None, positions: Int[Array, "#b t"] | None
) -> RowEdit | None:
    """Returns a hook as a function of the rows of one layer; None without one, which needs no other argument.

    Raises:
        ValueError: when called, if the hook changes a shape or type.
    """
    if edit is None:
        return None

    def run(site: str, rows: Array) -> Array:
        h = rows.reshape(-1, positions.shape[1], rows.shape[-1])
        new = edit(site, layer, jnp.broadcast_to(positions, h.shape[:2]), h)
        if (new.shape, new.dtype) != (h.shape, h.dtype):
            got, expected = (f"{x.dtype}{list(x.shape)}" for x in (new, h))
            raise ValueError(f"edit: got {got} at {site}, expected {expected}")
        return new.reshape(rows.shape)

    return run


def watched(edit: RowEdit | None) -> tuple[RowEdit, dict[str, Array]]:
    """Returns what a layer hands its rows to at every site, and the dict in which that keeps what flows on."""
    seen = {}

    def see(site: str, rows: Array) -> Array:
        seen[site] = rows if edit is None else edit(site, rows)
        return seen[site]

    return see, seen
