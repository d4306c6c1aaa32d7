"""Pretraining: the likelihood of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from jaxsafety.training import answers
from jaxsafety.types import Batch, Key, Method, Model, Needs, Params, Terms


@dataclass(frozen=True)
class Config:
    """Mean negative log-likelihood of the scored tokens; it has no fields."""


def totals(
    model: Model, params: Params, batch: Batch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    return answers.next_token(model, params, batch)


METHOD = Method(Config, totals, needs=lambda config: Needs(rejected=False), examples="text")
