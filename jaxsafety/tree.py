"""Parameter trees by path: select, label, difference, interpolate, and stacked lanes.

A path is the nested keys joined with ``/``, e.g. ``blocks/mlp/up``. Per-layer weights carry a leading ``l`` axis.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from jaxsafety.types import Leaf, Params


def flatten(params: Params) -> dict[str, Leaf]:
    """Returns the tree as a flat dict from path to array."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict[str, Leaf]) -> Params:
    """Inverse of :func:`flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def select(params: Params, pattern: str) -> dict[str, Leaf]:
    """Returns the leaves whose whole path matches the regular expression ``pattern``.

    Raises:
        ValueError: nothing matches; the message lists the paths there are.
    """
    flat = flatten(params)
    chosen = {path: leaf for path, leaf in flat.items() if re.fullmatch(pattern, path)}
    if not chosen:
        raise ValueError(f"no parameter path matches {pattern!r}; the paths are {', '.join(flat)}")
    return chosen


def label(params: Params, rule: Callable[[str, Leaf], Any]) -> Params:
    """Returns the tree with ``rule(path, leaf)`` at every leaf: masks and labels for optax's masked transforms."""
    return unflatten({path: rule(path, leaf) for path, leaf in flatten(params).items()})


def difference(tuned: Params, base: Params) -> Params:
    """Returns ``tuned - base``, the update delta W (any matching leading axes)."""
    return jax.tree.map(jnp.subtract, tuned, base)


def interpolate(base: Params, delta: Params, alpha: float | Float[Array, ""]) -> Params:
    """Returns ``base + alpha * delta``; alpha 0 is the base, 1 the tuned model, above 1 extrapolates."""
    return jax.tree.map(lambda b, d: b + alpha * d, base, delta)


def stack(trees: Sequence[Any]) -> Any:
    """Returns one tree whose leaves carry a new leading axis over ``trees``."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def lane(tree: Any, *index: int) -> Any:
    """Returns one lane of a stacked tree, e.g. ``lane(states, h, s)``."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def count(params: Params) -> int:
    """Returns the number of scalar parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
