"""Do the methods pull a model the same way? Cosines of their losses' gradients, on one batch for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import jax.numpy as jnp

from jaxsafety.config.fields import check, static
from jaxsafety.linalg import alignment
from jaxsafety.types import Analysis, Key, Measured, View


@dataclass(frozen=True)
class Config:
    """Of how many prompts.

    Attributes:
        prompts: safe prompts, and as many unsafe ones.
    """

    prompts: int = static(64, at_least=1)
    __post_init__ = check


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns the cosine of every two methods' gradients at the model, with its base as their reference."""
    found = view.gradients(config.prompts)
    cosines = [alignment.tree_cosine(one, other) for one, other in combinations(found.values(), 2)]
    return {("gradient_cosine", "pair"): jnp.stack(cosines)} if cosines else {}


ANALYSIS = Analysis(Config, measure)
