"""Every parameter is trained, as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxsafety.types import Key, Parametrisation, Params


@dataclass(frozen=True)
class Config:
    """It has no fields."""


def init(trees: dict[str, Params], *, config: Config, key: Key) -> Params:
    """See :class:`jaxsafety.types.Parametrisation`."""
    return trees["parent"]


def join(trees: dict[str, Params], trained: Any, *, config: Config, key: Key | None = None) -> Params:
    """See :class:`jaxsafety.types.Parametrisation`."""
    return trained


PARAMETRISATION = Parametrisation(Config, init, join)
