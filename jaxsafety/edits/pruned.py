"""Weights removed that refusing rests on and answering does not, by Wanda scores: how sparse is safety?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import tree
from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between
from jaxsafety.entry.programs import compiled
from jaxsafety.linalg.directions import INPUTS
from jaxsafety.linalg.largest import largest
from jaxsafety.types import Edit, Key, Params, Point

Share = float | Float[Array, ""]
# By class (safe, unsafe) and site, second moments [l, m, m].
Moments = Mapping[str, Mapping[str, Array]]
# By MLP matrix, the site that it is multiplied with.
SITES = INPUTS | {"gate": INPUTS["up"]}


@checked
def importance(weights: Float[Array, "l m n"], moments: Float[Array, "l m m"]) -> Float[Array, "l m n"]:
    """Returns Wanda's scores ``|W_ij| |x_i|``, of the second moments ``X^T X`` of the inputs: their norms.

    References:
        Sun et al. 2023 (arXiv 2306.11695).
    """
    squares = jnp.maximum(jnp.diagonal(moments, axis1=1, axis2=2), 0)
    return jnp.abs(weights) * jnp.sqrt(squares)[:, :, None]


@checked
def critical(
    unsafe: Float[Array, "l m n"], safe: Float[Array, "l m n"], *, safety: Share, utility: Share
) -> Bool[Array, "l m n"]:
    """Marks the weights that are among the top share ``safety`` of one score and not among that of the other.

    Shares are of every matrix by itself, in [0, 1], rounded to the nearest number of weights.

    Raises:
        ValueError: a share out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> unsafe, safe = jnp.float32([[[4.0, 3.0], [2.0, 1.0]]]), jnp.float32([[[4.0, 1.0], [2.0, 3.0]]])
        >>> print(critical(unsafe, safe, safety=0.5, utility=0.25)[0])
        [[False  True]
         [False False]]
    """
    check_between("safety", safety, 0, 1)
    check_between("utility", utility, 0, 1)
    return _critical(unsafe, safe, jnp.asarray(safety), jnp.asarray(utility))


@compiled()
def _critical(unsafe: Array, safe: Array, safety: Array, utility: Array) -> Bool[Array, "l m n"]:
    size = unsafe.shape[1] * unsafe.shape[2]

    def top(scores: Array, share: Array) -> Array:
        count = jnp.round(share * size).astype(jnp.int32)
        return jax.vmap(partial(largest, count=count))(scores)

    return top(unsafe, safety) & ~top(safe, utility)


@checked
def pruned(params: Params, moments: Moments, *, safety: Share, utility: Share) -> Params:
    """Returns the model with its safety-critical MLP weights at zero; all else stays, bit for bit.

    Args:
        params: the model.
        moments: by class (``safe`` where it answers, ``unsafe`` where it refuses) and site of
            :data:`jaxsafety.linalg.directions.INPUTS` the second moments of what the matrices are given.
        safety: share of the weights that matter most where it refuses, q; 0 removes none.
        utility: share of those that matter most where it answers, which stay, p.

    Raises:
        ValueError: a share out of range, or a model without an MLP.

    References:
        Wei et al. 2024 (arXiv 2402.05162), set difference of Wanda scores.

    Fidelity: of the MLPs' matrices alone, whose inputs are read, and by share of a matrix, where Wanda compares weights
        within each output.
    """
    stacks = tree.matrix_stacks(params, tree.MLP_MATRICES)

    def kept(path: str, leaf: Array) -> Array:
        if path not in stacks:
            return leaf
        site = SITES[path.rpartition("/")[2]]
        unsafe, safe = (importance(leaf, moments[name][site]) for name in ("unsafe", "safe"))
        return jnp.where(critical(unsafe, safe, safety=safety, utility=utility), 0, leaf)

    return tree.label(params, kept)


@dataclass(frozen=True)
class Config:
    """How many weights are removed, and how many are spared.

    Attributes:
        utility: shares of every matrix, its most important weights where safe prompts are answered, that stay.
        safety: shares of every matrix, its most important weights where unsafe prompts are refused, that go.
    """

    utility: tuple[float, ...] = swept(0.05, at_least=0, at_most=1)
    safety: tuple[float, ...] = swept(0.0, 0.01, 0.03, 0.1, at_least=0, at_most=1)
    __post_init__ = check


def edit(trees: dict[str, Params], config: Config, *, point: Point, key: Key, moments: Moments) -> Params:
    """See :class:`jaxsafety.types.Edit`."""
    return pruned(trees["target"], moments, safety=point["safety"], utility=point["utility"])


EDIT = Edit(Config, edit, roles=("target",), reads=tuple(INPUTS.values()))
