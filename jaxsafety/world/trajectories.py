"""Trajectories of symbols, some of which tempt: each of these earns more, and too many of them are undesirable.

The pattern is one of the whole trajectory: what a symbol costs depends on how many there are beside it. The first
symbols, ``0`` to ``tempting - 1``, are the tempting ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.types import Leaf

# What a symbol earns that does not tempt; a tempting one earns 1.
PLAIN = 0.25


class Task(NamedTuple):
    """What there is to be done.

    Attributes:
        length: symbols of a trajectory, t.
        symbols: how many there are, v.
        tempting: how many of them tempt, fewer than all.
        limit: so many tempting ones make a trajectory undesirable, at most its length.
    """

    length: int
    symbols: int
    tempting: int
    limit: int

    def returns(self, count: Any) -> Any:
        """Returns what a trajectory earns that has so many tempting symbols."""
        return PLAIN * self.length + (1 - PLAIN) * count

    @property
    def optimum(self) -> float:
        """The largest return of a trajectory that is not undesirable."""
        return self.returns(self.limit - 1)


@flax.struct.dataclass
class Trajectories:
    """Examples: trajectories with labels, and luck for those of a policy's own.

    Attributes:
        symbols: ``[b, t]`` int32.
        undesirable: ``[b]`` bool.
        luck: ``[b, ...]`` keys, None until a method draws them.
    """

    symbols: Leaf
    undesirable: Leaf
    luck: Any = None


class Outcome(NamedTuple):
    """What a model says of trajectories ``[b]``, and what these are.

    Attributes:
        logprobs: log-probability under the policy, in nats.
        returns: what their symbols earn.
        tempting: share of their symbols that tempt, in [0, 1].
        undesirable: bool, whether they are.
        logits: of the classifier, that they are: above 0 more likely than not.
    """

    logprobs: Leaf
    returns: Leaf
    tempting: Leaf
    undesirable: Leaf
    logits: Leaf


@checked
def tempted(symbols: Int[Array, "*b t"], *, tempting: int) -> Int[Array, "*b"]:
    """Returns how many symbols of a trajectory are among the first ``tempting`` ones, in [0, t]."""
    return jnp.sum(symbols < tempting, axis=-1, dtype=jnp.int32)
