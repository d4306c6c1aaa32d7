"""Prompts with answers from a file of one's own: what models over a checkpoint learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety import keys
from jaxsafety.config.fields import check
from jaxsafety.types import Key, Pool


@dataclass(frozen=True)
class Config:
    """Which file.

    Attributes:
        file: prompts and answers, as ``subject.pairs`` may be, from the recipe's file on; None is ``subject.pairs``.
    """

    file: str | None = None
    __post_init__ = check


def draw(
    source: Any, config: Config, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> Any:
    """Draws a batch of the ``n`` examples ``[n, ...]``: epoch by epoch all of them in another order.

    It may hold the end of one epoch and the beginning of the next. See :class:`jaxsafety.types.Pool`.

    Raises:
        ValueError: a batch larger than ``n``.
    """
    count = len(jax.tree.leaves(source)[0])
    if batch_size > count:
        raise ValueError(f"batch_size: got {batch_size}, expected at most the number of examples, {count}")
    first, start = jnp.divmod(step * batch_size, count)
    orders = [jax.random.permutation(keys.at_step(key, first + epoch), count) for epoch in (0, 1)]
    rows = jax.lax.dynamic_slice_in_dim(jnp.concatenate(orders), start, batch_size)
    return jax.tree.map(lambda leaf: leaf[rows], source)


POOL = Pool(Config, draw, files=True)
