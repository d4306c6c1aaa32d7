"""The update with its MLP matrices cut to a few output directions: which of them carry what tuning taught?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between
from jaxsafety.entry.programs import undifferentiated
from jaxsafety.linalg import directions, subspace
from jaxsafety.linalg.directions import INPUTS, Choice
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Edit, Key, Params, Point


@checked
def directions_part(
    delta: Params,
    choice: Choice,
    *,
    rank: int | Int[Array, ""],
    moments: Mapping[str, Float[Array, "l _m _m"]] | None = None,
    method: Method = "full",
    key: Key | None = None,
) -> Params:
    """The update with its MLP matrices cut to their first ``rank`` output directions; everything else is kept whole.

    Args:
        delta: the update, whose structure the result has.
        choice: the order of directions, see :func:`jaxsafety.linalg.directions.ordered`.
        rank: directions kept in every layer, from 0 (none of the MLP matrices' update) to the most that one of them
            has; may be traced, so that one program serves every rank.
        moments: for ``activations``, by site of :data:`jaxsafety.linalg.directions.INPUTS` the second moments of what
            the matrix is given.
        method: of the decompositions.
        key: for ``random``.

    Raises:
        ValueError: rank out of range, an unknown choice, moments or a key that is missing, an update that is not finite
            or has no MLP, or a gradient with respect to what is cut; what is kept whole has one.
    """
    tree.check_finite(delta, name="delta")
    stacks = undifferentiated("directions_part", tree.matrix_stacks(delta, f"blocks/mlp/({'|'.join(INPUTS)})"))
    check_between("rank", rank, 0, max(min(stack.shape[1:]) for stack in stacks.values()))
    keys = [None] * len(stacks) if key is None else jax.random.split(key, len(stacks))
    parts = {}
    for (path, stack), own in zip(stacks.items(), keys, strict=True):
        given = None if moments is None else moments[INPUTS[path.rpartition("/")[2]]]
        basis = directions.ordered(stack, choice, moments=given, method=method, key=own)
        basis = jnp.where(subspace.leading(jnp.asarray(rank), basis.shape[-1]), basis, 0)
        parts[path] = _product(_product(stack, basis), basis.mT)
    return tree.label(delta, lambda path, leaf: parts[path].astype(leaf.dtype) if path in parts else leaf)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Config:
    """Which directions of the MLP matrices' update are kept, and how many.

    Attributes:
        choice: ``singular`` (of the update's own spectrum), ``activations`` (by what it does to the inputs of held-out
            unsafe prompts and their refusals) or ``random``.
        rank: output directions of every matrix; 0 keeps none, and everything else of the update.
        method: of the update's decompositions; a kept direction that ``gram`` does not resolve is NaN.
    """

    choice: Choice = "singular"
    rank: tuple[int, ...] = swept(0, 1, 2, 4, 8, 16, 32, at_least=0)
    method: Method = "full"
    __post_init__ = check


def edit(
    trees: dict[str, Params], config: Config, *, point: Point, key: Key, moments: Mapping[str, Mapping[str, Array]]
) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    delta = tree.difference(trees["target"], trees["base"])
    given = {"rank": point["rank"], "moments": moments["unsafe"], "method": config.method, "key": key}
    return tree.interpolate(trees["base"], directions_part(delta, config.choice, **given), 1.0)


EDIT = Edit(Config, edit, reads=tuple(INPUTS.values()))
