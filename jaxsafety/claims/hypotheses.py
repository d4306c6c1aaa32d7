"""Tests of means over seeds: on a side of a value, within a margin of it, and which of many may be believed together.

Normal theory, but for :func:`sign_flip`; functions take numbers and know nothing of claims.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import special, stats

# Standard errors beyond which a noncentral t is certain, and its distribution function no longer exact.
_CERTAIN = 35.0
# Resamples of signs: all 2^n of them up to 13 seeds.
_FLIPS = 9999


def directional(values: Float[np.ndarray, " n"], *, null: float) -> float:
    """Returns the two-sided p of Student's t test of the mean against ``null``; NaN where there is no test.

    That is below two finite values, and with two equal ones. More equal values are no chance: p is 0, or 1 at ``null``.
    """
    if _untestable(values):
        return math.nan
    if np.ptp(values) == 0:
        return float(values[0] == null)
    return float(stats.ttest_1samp(values, null).pvalue)


def equivalence(values: Float[np.ndarray, " n"], *, null: float, margin: float) -> float:
    """Returns the p of the mean's lying within ``margin`` of ``null``: the larger of two one-sided t tests'.

    NaN as of :func:`directional`.

    References:
        Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15: two one-sided tests.
    """
    if _untestable(values):
        return math.nan
    if np.ptp(values) == 0:
        return float(abs(values[0] - null) >= margin)
    above = stats.ttest_1samp(values, null - margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, null + margin, alternative="less").pvalue
    return float(max(above, below))


def sign_flip(values: Float[np.ndarray, " n"], *, null: float) -> float:
    """Returns the two-sided p of the mean against ``null`` if every difference might as well have the other sign.

    It asks for symmetry alone, no normal values: exact up to 13 of them, of a fixed sample of signs beyond.
    """
    test: Any = stats.permutation_test(
        (values - null,), np.mean, permutation_type="samples", vectorized=True, n_resamples=_FLIPS,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(test.pvalue)


def decided(
    pvalues: Float[np.ndarray, "..."], *, rate: float
) -> tuple[Bool[np.ndarray, "..."], Bool[np.ndarray, "..."]]:
    """Returns which of a family of tests reject at a false discovery rate, and which of them by Holm's bound as well.

    NaN is no test. The first keeps the expected share of wrong ones among those that reject below ``rate`` (for tests
    that depend on each other positively, as those of one run do), the second the chance of a single wrong one.

    References:
        Benjamini and Hochberg 1995, JRSS B 57; Benjamini and Yekutieli 2001, Annals of Statistics 29, theorem 1.2;
        Holm 1979, Scandinavian Journal of Statistics 6.
    """
    there = np.isfinite(pvalues)
    found, strict = np.zeros(pvalues.shape, bool), np.zeros(pvalues.shape, bool)
    if not there.any():
        return found, strict
    family = pvalues[there]
    found[there] = stats.false_discovery_control(family, method="bh") <= rate
    ascending = np.argsort(family)
    holds = family[ascending] <= rate / np.arange(len(family), 0, -1)
    own = np.zeros(len(family), bool)
    own[ascending] = np.cumprod(holds).astype(bool)
    strict[there] = own
    return found, strict


def seeds_needed(
    shift: float, deviation: float, *, margin: float | None, level: float, power: float = 0.9, most: int = 1000
) -> int | None:
    """Returns the smallest number of seeds, at least 2, with which one of both tests rejects with this ``power``.

    None if more than ``most`` would be needed.

    Args:
        shift: the mean's distance from the null value, taken for the truth.
        deviation: over seeds, taken for the truth.
        margin: of the test of equivalence, None without one.
        level: the p up to which a test rejects, in (0, 1).
        power: the chance that it does.
        most: seeds that are looked at.

    References:
        Noncentral t; for equivalence Phillips 1990, Journal of Pharmacokinetics and Biopharmaceutics 18, whose
        approximation neglects what both tests reject in the wrong order.
    """

    def enough(n: int) -> bool:
        per_error = math.sqrt(n) / max(deviation, np.finfo(float).tiny)

        def below(t: float, centre: float) -> float:
            noncentrality = min(max(centre * per_error, -_CERTAIN), _CERTAIN)
            chance = float(stats.nct.cdf(t, n - 1, noncentrality))
            # Of what is all but certain scipy may say NaN; scipy.special's own is off by far more.
            return float(t > noncentrality) if math.isnan(chance) else chance

        two_sided, one_sided = (-float(special.stdtrit(n - 1, tail)) for tail in (level / 2, level))
        chance = 1 - below(two_sided, abs(shift)) + below(-two_sided, abs(shift))
        if margin is not None:
            chance = max(chance, below(-one_sided, shift - margin) - below(one_sided, shift + margin))
        return chance >= power

    # More seeds than are enough are enough, too.
    found = bisect_left(range(2, most + 1), True, key=enough) + 2
    return found if found <= most else None


def _untestable(values: np.ndarray) -> bool:
    return len(values) < 2 or (len(values) == 2 and bool(values[0] == values[1]))
