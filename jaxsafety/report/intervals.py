"""Mean and Student-t interval of rates over seeds, without a statistics library."""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

# Rates are quotients of counts, some of them averaged in float32.
RATE_TOLERANCE = 1e-5


class Interval(NamedTuple):
    """Mean of ``n`` rates with its 95 % interval; ``low`` and ``high`` are None below two rates."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def mean_interval(values: Iterable[float | None]) -> Interval:
    """Mean and 95 % Student-t interval of rates over seeds, ``mean +- t_{.975, n-1} s / sqrt(n)``, clipped to [0, 1].

    Clipping keeps the interval meaningful near 0 and 1, where the t interval of a bounded rate leaves the range; it
    never moves the mean. None and non-finite values are left out; compare ``n`` with the number given to count them.

    Args:
        values: ``[s]`` rates in [0, 1].

    Returns:
        ``(mean, low, high, n)`` of the finite rates; no interval below two, no mean below one.

    Raises:
        ValueError: a finite value outside [0, 1].
    """
    rates = [value for value in values if value is not None and math.isfinite(value)]
    if bad := [rate for rate in rates if not 0 <= rate <= 1 + RATE_TOLERANCE]:
        raise ValueError(f"rate {bad[0]:g} is out of range: expected a value in [0, 1]")
    rates = [min(rate, 1.0) for rate in rates]
    n = len(rates)
    if n == 0:
        return Interval(None, None, None, 0)
    mean = math.fsum(rates) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((rate - mean) ** 2 for rate in rates) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half), n)


@functools.cache
def t_quantile(df: int) -> float:
    """The 0.975 quantile of Student's t for an integer number of degrees of freedom, >= 1.

    Bisects the closed form of ``P(|T| < sqrt(df) tan(theta))``, a finite trigonometric series.

    References:
        Abramowitz and Stegun (1964), equations 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, df) < 0.95 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _central_probability(theta: float, df: int) -> float:
    """``P(|T| < sqrt(df) tan(theta))``."""
    cosine, odd = math.cos(theta), df % 2
    term = cosine if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(2 + odd, df, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return (theta + math.sin(theta) * total) * 2 / math.pi if odd else math.sin(theta) * total
