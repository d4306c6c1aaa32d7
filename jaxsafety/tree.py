"""Parameter trees by path: select, label, difference, interpolate, and stacked lanes.

A path is the nested keys joined with ``/``, e.g. ``blocks/mlp/up``. Per-layer weights carry a leading ``l`` axis.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from jaxsafety.config.names import nearest
from jaxsafety.types import Leaf, Params

# Paths of the layers' stacks of matrices, of the MLPs alone and of attention as well.
MLP_MATRICES = "blocks/mlp/(up|down|gate)"
MATRICES = "blocks/(attn/[qkvo]|mlp/(up|down|gate))"


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


def matrix_stacks(params: Params, pattern: str) -> dict[str, Float[Array, "l m n"]]:
    """Returns the stacks of matrices whose whole path matches the regular expression ``pattern``.

    Raises:
        ValueError: nothing matches, or a leaf that is not ``[l, m, n]`` (a bias ``[l, n]`` would pass for one matrix).
    """
    stacks = select(params, pattern)
    for path, leaf in stacks.items():
        if leaf.ndim != 3:
            raise ValueError(f"pattern {pattern!r} matches {path} of shape {leaf.shape}, expected matrices [l, m, n]")
    return stacks


def label(params: Params, rule: Callable[[str, Leaf], Any]) -> Params:
    """Returns the tree with ``rule(path, leaf)`` at every leaf: masks and labels for optax's masked transforms."""
    return unflatten({path: rule(path, leaf) for path, leaf in flatten(params).items()})


def check_match(
    tuned: Params, base: Params, *, names: tuple[str, str] = ("tuned", "base"), finite: bool = False
) -> None:
    """Checks that two trees have the same paths and, leaf by leaf, the same shapes, and whether they are ``finite``.

    Raises:
        ValueError: they differ, or one is not finite; the path is named, with what ``names`` call the trees.
    """
    left, right = flatten(tuned), flatten(base)
    for path in sorted(left.keys() ^ right.keys()):
        there, absent = names if path in left else names[::-1]
        others = right if path in left else left
        hint = nearest(path, others)
        raise ValueError(f"{path} is in {there} but not in {absent}: expected trees of the same structure{hint}")
    for path in left:
        if jnp.shape(left[path]) != jnp.shape(right[path]):
            shapes = f"{names[0]} {jnp.shape(left[path])} and {names[1]} {jnp.shape(right[path])}"
            raise ValueError(f"{path} has shape {shapes}: expected the same")
    for name, params in zip(names, (tuned, base), strict=True) if finite else ():
        check_finite(params, name=name)


def is_finite(array: Leaf) -> bool:
    """Whether no value is a NaN or an infinity; what is being traced is taken to have none."""
    # NumPy: a concrete array that a traced function closes over must not be traced for this.
    return isinstance(array, jax.core.Tracer) or bool(np.isfinite(np.asarray(array)).all())


def check_finite(params: Params, *, name: str = "params") -> None:
    """Checks that no leaf holds a NaN or an infinity; leaves that are being traced are passed over.

    Raises:
        ValueError: a leaf does; its path is named.
    """
    for path, leaf in flatten(params).items():
        if not is_finite(leaf):
            raise ValueError(f"{name}: {path} holds values that are not finite, expected numbers only")


def check_between(name: str, value: Any, low: int, high: int | None = None, *, what: str = "") -> None:
    """Checks a number; one that is being traced is passed over. Raises ValueError: it is out of range."""
    if isinstance(value, jax.core.Tracer):
        return
    # As a Python number: comparing an array inside a traced function would be traced, even if it is a constant there.
    number = np.asarray(value).item()
    if not (low <= number and (high is None or number <= high)):
        expected = f"at least {low}" if high is None else f"from {low} to {high}{what}"
        raise ValueError(f"{name}: got {number}, expected {expected}")


def difference(tuned: Params, base: Params) -> Params:
    """Returns ``tuned - base``, the update delta W (any matching leading axes).

    Raises:
        ValueError: the trees differ in structure or shape, or one is not finite; the path is named.
    """
    check_match(tuned, base, finite=True)
    return jax.tree.map(jnp.subtract, tuned, base)


def interpolate(base: Params, delta: Params, alpha: float | Float[Array, ""]) -> Params:
    """Returns ``base + alpha * delta``; alpha 0 is the base, 1 the tuned model, above 1 extrapolates.

    Raises:
        ValueError: the trees differ in structure or shape, or one is not finite; the path is named.
    """
    check_match(base, delta, names=("base", "delta"), finite=True)
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
