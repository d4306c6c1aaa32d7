"""Mean and Student-t interval of one value per seed, or of one per prompt.

Seeds are few, so the interval is the exact one of Student's t, at any level; what is not finite is left out and shows
in ``n``. Rates in [0, 1] have a function of their own, which refuses what is no rate and clips.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import variance
from typing import NamedTuple

import scipy  # its parts, most of a second, are imported where one is first used

# Rates are quotients of counts, some of them averaged in float32.
RATE_TOLERANCE = 1e-5


class Interval(NamedTuple):
    """Mean of ``n`` values with its interval; ``low`` and ``high`` are None below two values, ``mean`` below one."""

    mean: float | None
    low: float | None
    high: float | None
    n: int

    def clipped(self) -> "Interval":
        """The interval of a share: in [0, 1], around the same mean."""
        return self if self.low is None else self._replace(low=max(0.0, self.low), high=min(1.0, self.high))


def student_interval(values: Iterable[float | None], *, level: float = 0.95) -> Interval:
    """Mean and two-sided Student-t interval over seeds, ``mean +- t_{(1 + level) / 2, n - 1} s / sqrt(n)``.

    Equal values make an interval of one point. None and non-finite values are left out; compare ``n`` with the number
    given to count them.

    Raises:
        ValueError: the coverage ``level`` is not in (0, 1).
    """
    _check_level(level)
    finite = [value for value in values if value is not None and math.isfinite(value)]
    n = len(finite)
    if n == 0:
        return Interval(None, None, None, 0)
    # The mean of equal values must be that value, or an interval of one point would miss it by rounding.
    mean = finite[0] if len(set(finite)) == 1 else math.fsum(finite) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (n - 1))
    half = t_quantile(n - 1, level=level) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def mean_interval(rates: Iterable[float | None], *, level: float = 0.95) -> Interval:
    """Mean and Student-t interval of rates over seeds, clipped to [0, 1].

    Clipping keeps the interval meaningful near 0 and 1, where the t interval of a bounded rate leaves the range; it
    never moves the mean.

    Raises:
        ValueError: a finite value outside [0, 1], or the coverage ``level`` is not in (0, 1).
    """
    finite = [rate for rate in rates if rate is not None and math.isfinite(rate)]
    if bad := [rate for rate in finite if not 0 <= rate <= 1 + RATE_TOLERANCE]:
        raise ValueError(f"rate {bad[0]:g} is out of range: expected a value in [0, 1]")
    return student_interval([min(rate, 1.0) for rate in finite], level=level).clipped()


def share_interval(count: int, n: int, *, level: float = 0.95) -> Interval:
    """The share ``count / n`` of independent cases with its exact interval: of no case of ten it goes up to 31 %.

    Raises:
        ValueError: ``count`` is not in [0, n], or the coverage ``level`` not in (0, 1).

    References:
        Clopper and Pearson 1934, Biometrika 26.
    """
    _check_level(level)
    if not 0 <= count <= n:
        raise ValueError(f"count of a share must be in [0, {n}], got {count}")
    if n == 0:
        return Interval(None, None, None, 0)
    tail = (1 - level) / 2
    low = float(scipy.special.betaincinv(count, n - count + 1, tail)) if count else 0.0
    high = float(scipy.special.betaincinv(count + 1, n - count, 1 - tail)) if count < n else 1.0
    return Interval(count / n, low, high, n)


def welch_half_width(one: Sequence[float], other: Sequence[float], *, level: float = 0.95) -> float | None:
    """Half the width of the interval of the difference, or of the sum, of the means of two groups of finite values.

    Number and spread of the groups may differ; None unless both have two values.

    Raises:
        ValueError: the coverage ``level`` is not in (0, 1).

    References:
        Welch 1947, Biometrika 34; its degrees of freedom as by Satterthwaite 1946, eq. 17.
    """
    _check_level(level)
    if min(len(one), len(other)) < 2:
        return None
    # Of either mean: its squared standard error, and the degrees of freedom that this is known with.
    errors = [(variance(values) / len(values), len(values) - 1) for values in (one, other)]
    total = math.fsum(error for error, _ in errors)
    if total == 0:
        return 0.0
    df = total**2 / math.fsum(error**2 / own for error, own in errors)
    return t_quantile(df, level=level) * math.sqrt(total)


def t_quantile(df: int | float, *, level: float = 0.95) -> float:
    """Returns ``q`` with ``P(|T| < q) = level`` for Student's t of ``df`` degrees of freedom.

    Raises:
        ValueError: ``df`` is below 1 (fractions are allowed), or ``level`` not in (0, 1).
    """
    if df < 1:
        raise ValueError(f"degrees of freedom must be >= 1, got {df}")
    _check_level(level)
    # The lower tail, because 1 - level keeps its digits where (1 + level) / 2 rounds to 1.
    return -float(scipy.special.stdtrit(df, (1 - level) / 2))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level of an interval must be in (0, 1), got {level}")
