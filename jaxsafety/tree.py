"""Parameter trees by path: select, label, difference, interpolate, and stacked lanes.

A tree is any pytree of arrays: nested dicts, Haiku's and flax's, lists of layers, states and modules that are
dataclasses; what comes back has its structure. A path is the keys, names and indices on the way to a leaf joined with
``/``, e.g. ``blocks/mlp/up``. Per-layer weights carry a leading ``l`` axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from jaxsafety.config.names import nearest
from jaxsafety.entry import checks
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import is_finite
from jaxsafety.types import Leaf, Params

# Paths of the layers' stacks of matrices, of the MLPs alone and of attention as well.
MLP_MATRICES = "blocks/mlp/(up|down|gate)"
MATRICES = "blocks/(attn/[qkvo]|mlp/(up|down|gate))"


def is_stacked(path: str) -> bool:
    """Whether a parameter has a leading axis of layers."""
    return path.startswith("blocks/")


def flatten(params: Params) -> dict[str, Leaf]:
    """Returns the tree as a flat dict from path to array.

    Raises:
        ValueError: two leaves have the same path, as a name with a ``/`` may bring about.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    flat = {_path(keys): leaf for keys, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError(f"params: got {len(leaves)} leaves at {len(flat)} paths, expected one at each: rename a key")
    return flat


def unflatten(flat: dict[str, Leaf]) -> Params:
    """Inverse of :func:`flatten` for nested dicts whose keys have no ``/``."""
    return traverse_util.unflatten_dict(flat, sep="/")


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


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
        if np.ndim(leaf) != 3:
            shape = np.shape(leaf)
            raise ValueError(f"pattern {pattern!r} matches {path} of shape {shape}, expected matrices [l, m, n]")
    return stacks


def label(params: Params, rule: Callable[[str, Leaf], Any]) -> Params:
    """Returns the tree with ``rule(path, leaf)`` at every leaf: masks and labels for optax's masked transforms."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: rule(_path(keys), leaf), params)


def check_structure(tuned: Params, base: Params, *, names: tuple[str, str] = ("tuned", "base")) -> None:
    """Checks that two trees have one structure.

    Raises:
        ValueError: they differ; the path is named, with what ``names`` call the trees.
    """
    left, right = flatten(tuned), flatten(base)
    for path in sorted(left.keys() ^ right.keys()):
        there, absent = names if path in left else names[::-1]
        others = right if path in left else left
        hint = nearest(path, others)
        raise ValueError(f"{path} is in {there} but not in {absent}: expected trees of the same structure{hint}")
    if jax.tree.structure(tuned) != jax.tree.structure(base):
        kinds = f"{names[0]}, a {type(tuned).__name__}, and {names[1]}, a {type(base).__name__}"
        raise ValueError(f"the same paths lie in different containers in {kinds}: expected trees of the same structure")


def check_match(
    tuned: Params, base: Params, *, names: tuple[str, str] = ("tuned", "base"), finite: bool = False
) -> None:
    """Checks that two trees of arrays have one structure and, leaf by leaf, the same shapes; whether ``finite``, too.

    Raises:
        ValueError: they differ, a leaf is no array, or one is not finite; the path is named, with what ``names`` call
            the trees.
    """
    check_structure(tuned, base, names=names)
    left, right = flatten(tuned), flatten(base)
    for path in left:
        for name, leaf in zip(names, (left[path], right[path]), strict=True):
            if not _is_numeric(leaf):
                kind = f"of type {leaf.dtype}" if hasattr(leaf, "dtype") else f"a {type(leaf).__name__}"
                raise ValueError(
                    f"{path} of {name} is {kind}, expected arrays of numbers alone: take the parameters without it, as "
                    "nnx.state(module, nnx.Param) does"
                )
        if jnp.shape(left[path]) != jnp.shape(right[path]):
            shapes = f"{names[0]} {jnp.shape(left[path])} and {names[1]} {jnp.shape(right[path])}"
            raise ValueError(f"{path} has shape {shapes}: expected the same")
    for name, params in zip(names, (tuned, base), strict=True) if finite else ():
        check_finite(params, name=name)


def _is_numeric(leaf: Any) -> bool:
    if not hasattr(leaf, "dtype"):
        return isinstance(leaf, int | float) and not isinstance(leaf, bool)
    return leaf.dtype != bool and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)


def check_finite(params: Params, *, name: str = "params") -> None:
    """Checks that no leaf holds a NaN or an infinity; leaves that are being traced are passed over.

    Raises:
        ValueError: a leaf does; its path is named.
    """
    for path, leaf in flatten(params).items():
        if not is_finite(leaf):
            raise ValueError(f"{name}: {path} holds values that are not finite, expected numbers only")


def difference(tuned: Params, base: Params) -> Params:
    """Returns ``tuned - base``, the update delta W (any matching leading axes).

    Raises:
        ValueError: the trees differ in structure or shape, or one is not finite; the path is named.
    """
    check_match(tuned, base, finite=True)
    return jax.tree.map(jnp.subtract, tuned, base)


@checked
def interpolate(base: Params, delta: Params, alpha: float | Float[Array, ""]) -> Params:
    """Returns ``base + alpha * delta``; alpha 0 is the base, 1 the tuned model, above 1 extrapolates.

    Types are those of ``base + delta``, whatever that of alpha: it may be traced, or of any library. Integers, such as
    counters in a module's state, are rounded to the nearest.

    Raises:
        ValueError: the trees differ in structure or shape, or one is not finite; the path is named. Or alpha is not.
    """
    check_match(base, delta, names=("base", "delta"), finite=True)
    checks.check_finite(alpha=alpha)
    return jax.tree.map(partial(_moved, alpha=alpha), base, delta)


def _moved(base: Leaf, delta: Leaf, *, alpha: Any) -> Leaf:
    dtype = jnp.result_type(base, delta)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return _moved_count(base, delta, alpha=alpha, dtype=dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    # NumPy's weights stay on the host.
    base, delta = (leaf.astype(wide) if hasattr(leaf, "astype") else jnp.asarray(leaf, wide) for leaf in (base, delta))
    return (base + alpha * delta).astype(dtype)


def _moved_count(base: Leaf, delta: Leaf, *, alpha: Any, dtype: Any) -> Leaf:
    """An integer moved, exactly for alpha 0 and 1; the difference of unsigned ones has a sign that has wrapped."""
    signed = jnp.asarray(delta).astype(dtype).view(jnp.dtype(f"int{8 * jnp.dtype(dtype).itemsize}"))
    short = jnp.round(alpha * signed).astype(signed.dtype)
    long = signed + jnp.round((alpha - 1) * signed).astype(signed.dtype)
    return jnp.asarray(base).astype(dtype) + jnp.where(alpha <= 0.5, short, long).astype(dtype)


def stack(trees: Sequence[Any]) -> Any:
    """Returns one tree whose leaves carry a new leading axis over ``trees``."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def lane(tree: Any, *index: int) -> Any:
    """Returns one lane of a stacked tree, e.g. ``lane(states, h, s)``."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def count(params: Params) -> int:
    """Returns the number of scalar parameters."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(params))
