"""The part of an update that lies in the base's null space, in its range, or in a random subspace: causal tests.

A *part* is a tree of the same structure with zeros in place of what is left out, so every part is added to the base in
the same way, and ``only`` a part plus ``all_but`` it is the whole update. ``base`` holds the parameters that the update
``delta`` was made to; ``pattern`` matches the paths of the ``[l, m, n]`` stacks to split; ``energy`` in (0, 1] is the
share of a base matrix's squared spectrum that counts as its range; ``method`` is that of its decomposition, see
:func:`jaxsafety.linalg.update_spaces.range_basis`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, static
from jaxsafety.config.names import check_name
from jaxsafety.linalg import update_spaces
from jaxsafety.linalg.unbatched import orthonormal
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Edit, Key, Params, Point

Keep = Literal["only", "all_but"]


def null_part(
    base: Params,
    delta: Params,
    *,
    pattern: str = tree.MLP_MATRICES,
    energy: float = 0.9,
    keep: Keep,
    method: Method = "full",
) -> Params:
    """The part of an update whose outputs the base hardly uses, ``dW (I - P)``; or the update without it.

    ``P`` projects on the base matrix's range, its leading output directions, layer by layer. If safety fine-tuning
    works by what it adds outside the base's range, then ``only`` this part makes a model refuse and ``all_but`` it does
    not, beyond what :func:`random_part` does with as large a subspace.

    ``keep`` is ``only`` this part of those matrices and zeros everywhere else, or the whole update ``all_but`` it.

    Raises:
        ValueError: energy out of range, an unknown ``keep``, a pattern that matches nothing or something else than
            stacks of matrices, trees that differ in structure or shape, or a base that is not finite.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.2 and Figure 4: the claim that this tests.

    Fidelity: the intervention is ours; P is the paper's, in its clean definition (no centring, whole columns).
    """
    ranges = _ranges(base, delta, pattern=pattern, energy=energy, method=method)
    return _kept(delta, {path: _outside(tree.flatten(delta)[path], basis) for path, basis in ranges.items()}, keep)


def range_part(
    base: Params,
    delta: Params,
    *,
    pattern: str = tree.MLP_MATRICES,
    energy: float = 0.9,
    keep: Keep,
    method: Method = "full",
) -> Params:
    """The part of an update whose outputs lie in the base's range, ``dW P``; or the update without it.

    Together with :func:`null_part`, whose arguments and errors it has, it makes up those matrices' update.
    """
    ranges = _ranges(base, delta, pattern=pattern, energy=energy, method=method)
    return _kept(delta, {path: _inside(tree.flatten(delta)[path], basis) for path, basis in ranges.items()}, keep)


def random_part(
    base: Params,
    delta: Params,
    *,
    pattern: str = tree.MLP_MATRICES,
    energy: float = 0.9,
    keep: Keep,
    method: Method = "full",
    key: Key,
) -> Params:
    """The control of :func:`null_part`: a uniformly random subspace of the null space's dimension, layer by layer.

    Of an update's energy, ``1 - k / n`` is expected in a random subspace that leaves out k of n dimensions. What the
    null-space part does beyond this one is due to where the null space lies, not to how large it is. Every matrix draws
    its own subspace. Arguments and errors are those of :func:`null_part`.
    """
    ranges = _ranges(base, delta, pattern=pattern, energy=energy, method=method)
    keys = jax.random.split(key, len(ranges))
    parts = {}
    for key, (path, basis) in zip(keys, ranges.items(), strict=True):
        # The complement of a random k-dimensional subspace is a random (n - k)-dimensional one, and the cheaper draw.
        drawn = orthonormal(jax.random.normal(key, basis.shape, basis.dtype))
        used = jnp.any(basis != 0, axis=1, keepdims=True)
        parts[path] = _outside(tree.flatten(delta)[path], jnp.where(used, drawn, 0))
    return _kept(delta, parts, keep)


def _ranges(
    base: Params, delta: Params, *, pattern: str, energy: float, method: Method
) -> dict[str, Float[Array, "l n r"]]:
    tree.check_match(base, delta, names=("base", "delta"), finite=True)
    stacks = tree.matrix_stacks(base, pattern)
    return {path: update_spaces.range_basis(stack, energy=energy, method=method) for path, stack in stacks.items()}


def _inside(matrices: Float[Array, "l m n"], basis: Float[Array, "l n r"]) -> Float[Array, "l m n"]:
    return _product(_product(matrices.astype(basis.dtype), basis), basis.mT)


def _outside(matrices: Float[Array, "l m n"], basis: Float[Array, "l n r"]) -> Float[Array, "l m n"]:
    return matrices.astype(basis.dtype) - _inside(matrices, basis)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _kept(delta: Params, parts: dict[str, Float[Array, "l m n"]], keep: Keep) -> Params:
    """Returns the parts alone or the update without them; parts may be wider than the leaves that they belong to."""
    check_name("keep", keep, get_args(Keep))

    def leaf_of(path: str, leaf: Array) -> Array:
        if path not in parts:
            return jnp.zeros_like(leaf) if keep == "only" else leaf
        part = parts[path] if keep == "only" else leaf.astype(parts[path].dtype) - parts[path]
        return part.astype(leaf.dtype)

    return tree.label(delta, leaf_of)


@dataclass(frozen=True)
class Config:
    """Which part of the MLP matrices' update, alone or left out.

    Attributes:
        space: ``null_space`` (what the base hardly writes), ``range`` (the rest) or ``random``, as large.
        keep: ``only`` the part, or the whole update ``all_but`` it.
        energy: share of a base matrix's squared spectrum that counts as its range.
        method: of the base's decompositions; what ``gram`` does not resolve becomes NaN.
    """

    space: Literal["null_space", "range", "random"] = "null_space"
    keep: Keep = "only"
    energy: float = static(0.9, above=0, at_most=1)
    method: Method = "full"
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    base, delta = trees["base"], tree.difference(trees["target"], trees["base"])
    given = {"energy": config.energy, "keep": config.keep, "method": config.method}
    if config.space == "random":
        return tree.interpolate(base, random_part(base, delta, key=key, **given), 1.0)
    part = null_part if config.space == "null_space" else range_part
    return tree.interpolate(base, part(base, delta, **given), 1.0)


EDIT = Edit(Config, edit)
