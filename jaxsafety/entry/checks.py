"""Checks of values that are known: Python's, NumPy's, and arrays that no transformation stands for.

They are made with NumPy, for inside somebody's trace an operation of jax on a constant is traced. What is being traced
is passed over: docstrings say what comes of bad values there.
"""

from typing import Any

import jax
import numpy as np

from jaxsafety.types import Batch, Leaf


def known(value: Any) -> np.ndarray | None:
    """Returns a value for NumPy to look at; None for one that is being traced, or lies on other hosts."""
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(value)


def is_finite(array: Leaf) -> bool:
    """Whether no value that is known is a NaN or an infinity."""
    values = known(array)
    return values is None or bool(np.isfinite(values).all())


def check_finite(**arrays: Leaf) -> None:
    """Refuses arrays that hold a NaN or an infinity, in a ValueError with their name."""
    for name, array in arrays.items():
        if not is_finite(array):
            raise ValueError(f"{name} holds values that are not finite, expected numbers only")


def check_between(name: str, value: Any, low: int, high: int | None = None, *, what: str = "") -> None:
    """Refuses a number, or an array of them, outside ``[low, high]``, in a ValueError; ``what`` says what bounds it."""
    values = known(value)
    if values is None or ((values >= low) & (high is None or values <= high)).all():
        return
    bad = values[~((values >= low) & (high is None or values <= high))].flat[0]
    expected = f"at least {low}" if high is None else f"from {low} to {high}{what}"
    raise ValueError(f"{name}: got {bad}, expected {expected}")


def check_positive(name: str, value: Any) -> None:
    """Refuses a number that is not above 0, in a ValueError."""
    values = known(value)
    if values is not None and not values > 0:
        raise ValueError(f"{name}: got {value}, expected a number greater than 0")


def check_share(name: str, value: Any, *, whole: str = "(0, 1]", what: str = "a share") -> None:
    """Refuses a number outside ``(0, 1]``, or ``[0, 1)``, in a ValueError."""
    values = known(value)
    if values is not None and not ((0 < values <= 1) if whole == "(0, 1]" else (0 <= values < 1)):
        raise ValueError(f"{name}: got {value}, expected {what} in {whole}")


def whole_number(name: str, value: Any, low: int, high: int | None = None, *, what: str = "") -> int:
    """Returns a number that a program is compiled for. Raises ValueError: it is traced, or out of range."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name}: got a value that is traced, expected a number that is known before")
    check_between(name, value, low, high, what=what)
    if np.asarray(value).dtype.kind not in "iu":
        raise ValueError(f"{name}: got {value}, expected a whole number")
    return int(value)


def check_indices(name: str, indices: Leaf, size: int, *, of: str, mask: Leaf | None = None) -> None:
    """Refuses integers outside ``[0, size)``, but those that a ``mask`` leaves out; ``of`` is what they index."""
    values, kept = known(indices), np.True_ if mask is None else known(mask)
    if values is None or kept is None:
        return
    outside = values[((values < 0) | (values >= size)) & kept]
    if outside.size:
        raise ValueError(f"{name}: got {outside.flat[0]}, expected from 0 to {size - 1}, {of}")


def check_alike(**sides: Batch | Leaf) -> None:
    """Refuses batches, or arrays ``[b, t]``, of different shapes, and batches whose mask is not boolean."""
    (first, expected), *_ = found = [(name, _shape(name, side)) for name, side in sides.items()]
    for name, shape in found:
        if shape != expected:
            raise ValueError(f"{first} has shape {expected} and {name} {shape}: expected answers to the same prompts")


def _shape(name: str, side: Batch | Leaf) -> tuple[int, ...]:
    if not isinstance(side, Batch):
        return np.shape(side)
    if side.mask.dtype != bool or not np.shape(side.mask) == np.shape(side.targets) == np.shape(side.tokens):
        shapes = f"tokens {np.shape(side.tokens)}, targets {np.shape(side.targets)}, {side.mask.dtype} mask"
        raise ValueError(f"{name} has {shapes} {np.shape(side.mask)}: expected one shape, and a mask that is boolean")
    return np.shape(side.tokens)
