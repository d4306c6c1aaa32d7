"""A walk along an update, ``W + alpha * part(dW)``: less of it, more of it, or a part alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.types import Edit, Key, Params, Point

Part = Literal["whole", "mlp", "mlp_matrices", "up", "down", "attention"]

# The paths of every part.
PATTERNS: dict[str, str] = {
    "whole": ".*",
    "mlp": "blocks/mlp/.*",
    "mlp_matrices": tree.MLP_MATRICES,
    "up": "blocks/mlp/up(_bias)?",
    "down": "blocks/mlp/down(_bias)?",
    "attention": "blocks/attn/.*",
}


@checked
def part_delta(delta: Params, part: Part) -> Params:
    """Returns the named part of an update, zeros elsewhere; matrices go with their biases but in ``mlp_matrices``.

    Raises:
        ValueError: unknown part, or a tree that has no such leaves.
    """
    return tree_part(delta, PATTERNS[part])


@checked
def tree_part(delta: Params, pattern: str) -> Params:
    """Returns the leaves whose whole path matches the regular expression ``pattern``, zeros elsewhere.

    Raises:
        ValueError: nothing matches; the message lists the paths there are.
    """
    chosen = tree.select(delta, pattern)
    return tree.label(delta, lambda path, leaf: leaf if path in chosen else jnp.zeros_like(leaf))


@checked
def scaled(base: Params, delta: Params, *, alpha: float | Float[Array, ""], part: Part = "whole") -> Params:
    """Walks along an update ``tree.difference(tuned, base)``: ``W + alpha * part(delta W)``.

    Alpha 0 is the base, 1 the tuned model (of that part), above 1 extrapolates.

    Raises:
        ValueError: unknown part, or trees that differ in structure or shape.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.2, interventions along delta W.

    Fidelity: faithful for ``whole`` (every parameter, norms and embeddings included); the other parts are ours.
    """
    return tree.interpolate(base, part_delta(delta, part), alpha)


@dataclass(frozen=True)
class Config:
    """Which part of the update moves, and how far.

    Attributes:
        part: ``whole``, ``mlp``, ``mlp_matrices`` (without the biases), ``up``, ``down`` or ``attention``.
        alpha: multiples of that part.
    """

    part: Part = "whole"
    alpha: tuple[float, ...] = swept(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    delta = tree.difference(trees["target"], trees["base"])
    return scaled(trees["base"], delta, alpha=point["alpha"], part=config.part)


EDIT = Edit(Config, edit, leafwise=True)
