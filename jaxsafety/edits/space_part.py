"""The part of an update that lies in the base's null space, in its range, or in a random subspace: causal tests.

If safety fine-tuning works by what it adds outside the base's range, then ``only`` the part in the null space makes a
model refuse and ``all_but`` it does not, beyond what a random subspace as large does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, static
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_share
from jaxsafety.entry.programs import undifferentiated
from jaxsafety.linalg import update_spaces
from jaxsafety.linalg.unbatched import orthonormal
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Edit, Key, Params, Point

Space = Literal["null_space", "range", "random"]
Keep = Literal["only", "all_but"]


@checked
def space_part(
    base: Params,
    delta: Params,
    space: Space,
    *,
    pattern: str = tree.MLP_MATRICES,
    energy: update_spaces.Share = 0.9,
    keep: Keep,
    method: Method = "full",
    key: Key | None = None,
) -> Params:
    """The part of an update whose outputs lie in a space, layer by layer; or the update without it.

    ``null_space`` is ``dW (I - P)``, what the base hardly writes, where ``P`` projects on the base matrix's range, its
    leading output directions; ``range`` is ``dW P``, the rest of those matrices' update. ``random`` is the control: a
    uniformly random subspace of the null space's dimension, in which ``1 - k / n`` of an update's energy is expected
    where k of n dimensions are the range. Every matrix draws its own.

    Args:
        base: the parameters that the update was made to.
        delta: the update, whose structure the result has.
        space: see above.
        pattern: paths of the ``[l, m, n]`` stacks to split.
        energy: share in (0, 1] of a base matrix's squared spectrum that counts as its range.
        keep: ``only`` this part of those matrices and zeros everywhere else, or the whole update ``all_but`` it.
        method: of the base's decomposition, see :func:`jaxsafety.linalg.update_spaces.range_basis`.
        key: for ``random``.

    Raises:
        ValueError: energy out of range, an unknown ``space``, ``keep`` or ``method``, a pattern that matches nothing or
            something else than stacks of matrices, trees that differ in structure or shape, values that are not finite,
            or a gradient with respect to the base, while the update has one; ``random`` without a key.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.2 and Figure 4: the claim that this tests.

    Fidelity: the intervention is ours; P is the paper's, in its clean definition (no centring, whole columns).
    """
    check_share("energy", energy)
    if space == "random" and key is None:
        raise ValueError("space 'random' got no key, expected key=jax.random.key(...)")
    tree.check_match(base, delta, names=("base", "delta"), finite=True)
    stacks, updates = undifferentiated("space_part: the base", tree.matrix_stacks(base, pattern)), tree.flatten(delta)
    keys = [None] * len(stacks) if key is None else jax.random.split(key, len(stacks))
    parts = {}
    for (path, stack), own in zip(stacks.items(), keys, strict=True):
        basis = update_spaces.range_basis(stack, energy=energy, method=method)
        basis = _random(basis, key=own) if space == "random" else basis
        update = updates[path].astype(basis.dtype)
        inside = _product(_product(update, basis), basis.mT)
        parts[path] = inside if space == "range" else update - inside
    return tree.label(delta, lambda path, leaf: _kept(leaf, parts.get(path), keep))


def _random(basis: Float[Array, "l n r"], *, key: Key) -> Float[Array, "l n r"]:
    """As many random orthonormal directions: what is left of n of them is random, too, and this is the cheaper draw."""
    drawn = orthonormal(jax.random.normal(key, basis.shape, basis.dtype))
    used = jnp.any(basis != 0, axis=1, keepdims=True)
    return jnp.where(jnp.isnan(basis), jnp.nan, jnp.where(used, drawn, 0))


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _kept(leaf: Array, part: Array | None, keep: Keep) -> Array:
    """A leaf of the result; its part may be wider than it."""
    if part is None:
        return jnp.zeros_like(leaf) if keep == "only" else leaf
    return (part if keep == "only" else leaf.astype(part.dtype) - part).astype(leaf.dtype)


@dataclass(frozen=True)
class Config:
    """Which part of the MLP matrices' update, alone or left out.

    Attributes:
        space: ``null_space`` (what the base hardly writes), ``range`` (the rest) or ``random``, as large.
        keep: ``only`` the part, or the whole update ``all_but`` it.
        energy: share of a base matrix's squared spectrum that counts as its range.
        method: of the base's decompositions; what ``gram`` does not resolve becomes NaN.
    """

    space: Space = "null_space"
    keep: Keep = "only"
    energy: float = static(0.9, above=0, at_most=1)
    method: Method = "full"
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    base, delta = trees["base"], tree.difference(trees["target"], trees["base"])
    given = {"energy": config.energy, "keep": config.keep, "method": config.method}
    return tree.interpolate(base, space_part(base, delta, config.space, key=key, **given), 1.0)


EDIT = Edit(Config, edit, leafwise=True)
