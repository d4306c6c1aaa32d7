"""What a model says of answers to the same prompts: from one pass, in which a prompt is read once where it can be."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety.types import Batch, Model, Params


def branched(model: Model, params: Params, *sides: Batch) -> tuple[int, list[Float[Array, "b u v"]]]:
    """Returns how many places the sides begin with in common, and the logits ``[b, t, v]`` behind these, of each side.

    That is the shortest :attr:`jaxsafety.types.Batch.stem`. What scores them fills up with :func:`filled`.
    """
    stem = min(side.stem for side in sides)
    if stem and model.branches is not None:
        rest = jnp.concatenate([side.tokens[:, stem:] for side in sides])
        logits = model.branches(params, sides[0].tokens[:, :stem], rest)
    else:
        logits = model.apply(params, jnp.concatenate([side.tokens for side in sides])).logits[:, stem:]
    return stem, jnp.split(logits, len(sides))


def filled(values: Array, *, stem: int, value: Any) -> Array:
    """Returns ``[b, u]`` with as many places of a value before them: what stands where nothing is computed."""
    return jnp.pad(values, ((0, 0), (stem, 0)), constant_values=value)


def whole(examples: Any) -> Any:
    """Returns examples without a stem: what was done to them may have changed any place."""
    return jax.tree.map(
        lambda side: side.replace(stem=0) if isinstance(side, Batch) else side,
        examples,
        is_leaf=lambda node: isinstance(node, Batch),
    )
