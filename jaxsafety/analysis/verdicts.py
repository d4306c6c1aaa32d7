"""How often a model complies with prompts of every condition, refuses them, or does neither."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jaxsafety.types import Analysis, Key, Measured, View


@dataclass(frozen=True)
class Config:
    """It has no options."""


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns the rates of the verdicts per condition, and how many attacks succeeded."""
    found = view.verdicts
    other = ~(found.complied | found.refused)
    flags = {"complied": found.complied, "refused": found.refused, "other": other, "exact_match": found.exact_match}
    rates = {(name, "condition"): jnp.mean(flag, axis=1) for name, flag in flags.items()}
    return rates | {("n_successful", "condition"): jnp.sum(found.subsets[:, 1], axis=1, dtype=jnp.float32)}


ANALYSIS = Analysis(Config, measure)
