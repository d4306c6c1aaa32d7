"""Tests of means over seeds: on a side of a value, within a margin of it, and which of many may be believed together.

Normal theory, but for :func:`sign_flip`; functions take numbers and know nothing of claims.
"""

import math
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import scipy  # its parts, most of a second, are imported where one is first used
from jaxtyping import Bool, Float

# Noncentralities beyond which scipy's distribution is no longer exact, and another form is.
_FAR = 35.0
# Resamples of signs: all 2^n of them up to 13 seeds.
_FLIPS = 9999
# What two float32 roundings of one number may differ by, relative.
_ROUNDING = 1e-6


class Rejected(NamedTuple):
    """Which tests of a family reject: at a false discovery rate, and by Holm's bound as well."""

    found: Bool[np.ndarray, "..."]
    strict: Bool[np.ndarray, "..."]


def directional(values: Float[np.ndarray, " n"], *, null: float) -> float:
    """Returns the two-sided p of Student's t test of the mean against ``null``; NaN where there is no test.

    That is below two finite values, with two equal ones, and with more that are all ``null``. More than two that are
    equal and not ``null`` are no chance: p is 0.
    """
    if len(values) < 2:
        return math.nan
    if are_equal(values):
        return 0.0 if len(values) > 2 and not are_equal(np.append(values, null)) else math.nan
    return float(scipy.stats.ttest_1samp(values, null).pvalue)


def equivalence(values: Float[np.ndarray, " n"], *, null: float, margin: float) -> float:
    """Returns the p of the mean's lying within ``margin`` of ``null``: the larger of two one-sided t tests'.

    NaN below two finite values, and with equal ones, of which a floor or a ceiling may be the reason.

    References:
        Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15: two one-sided tests.
    """
    if len(values) < 2 or are_equal(values):
        return math.nan
    above = scipy.stats.ttest_1samp(values, null - margin, alternative="greater").pvalue
    below = scipy.stats.ttest_1samp(values, null + margin, alternative="less").pvalue
    return float(max(above, below))


def are_equal(values: Float[np.ndarray, " n"]) -> bool:
    """Whether all values are one number, but for rounding to float32."""
    return bool(np.ptp(values) <= _ROUNDING * np.abs(values).max())


def sign_flip(values: Float[np.ndarray, " n"], *, null: float) -> float:
    """Returns the two-sided p of the mean against ``null`` if every difference might as well have the other sign.

    It asks for symmetry alone, no normal values: exact up to 13 of them, of a fixed sample of signs beyond.
    """
    test = scipy.stats.permutation_test(
        (values - null,), np.mean, permutation_type="samples", vectorized=True, n_resamples=_FLIPS,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(test.pvalue)


def rejected(pvalues: Float[np.ndarray, "..."], *, rate: float) -> Rejected:
    """Returns which of a family of tests reject at a false discovery rate, and by Holm's bound; NaN is no test.

    The first keeps the expected share of wrong ones among those that reject below ``rate``, the second the chance of a
    single wrong one. The second holds whatever tests have to do with each other; the first is proven for tests that
    are independent or depend positively, which those of one run are not all (the two of one claim exclude each other,
    so that at most half of their hypotheses are true): for such as come up here it is simulated in the tests.

    References:
        Benjamini and Hochberg 1995, JRSS B 57; Benjamini and Yekutieli 2001, Annals of Statistics 29; Holm 1979,
        Scandinavian Journal of Statistics 6.
    """
    there = np.isfinite(pvalues)
    found, strict = np.zeros(pvalues.shape, bool), np.zeros(pvalues.shape, bool)
    if there.any():
        family = pvalues[there]
        found[there] = scipy.stats.false_discovery_control(family, method="bh") <= rate
        ascending = np.argsort(family)
        holds = np.empty(len(family), bool)
        holds[ascending] = np.logical_and.accumulate(family[ascending] <= rate / np.arange(len(family), 0, -1))
        strict[there] = holds
    return Rejected(found, strict)


def seeds_needed(
    shift: float, deviation: float, *, margin: float | None, level: float, power: float = 0.9, most: int = 1000
) -> int | None:
    """Returns the smallest number of seeds, at least 2, with which one of both tests rejects with this ``power``.

    None if more than ``most`` would be needed.

    Args:
        shift: the mean's distance from the null value, taken for the truth.
        deviation: over seeds, above 0, taken for the truth.
        margin: of the test of equivalence, None without one.
        level: the p up to which a test rejects, in (0, 1).
        power: the chance that it does.
        most: seeds that are looked at.

    References:
        Noncentral t; for equivalence Phillips 1990, Journal of Pharmacokinetics and Biopharmaceutics 18, whose
        approximation neglects what both tests reject in the wrong order.
    """

    def enough(n: int) -> bool:
        per_error, df = math.sqrt(n) / deviation, n - 1
        two_sided, one_sided = (-float(scipy.special.stdtrit(df, tail)) for tail in (level / 2, level))
        centre = abs(shift) * per_error
        chance = 1 - _below(two_sided, df, centre) + _below(-two_sided, df, centre)
        if margin is not None:
            low, high = ((shift + sign * margin) * per_error for sign in (-1, 1))
            chance = max(chance, _below(-one_sided, df, low) - _below(one_sided, df, high))
        return chance >= power

    # More seeds than are enough are enough, too.
    found = bisect_left(range(2, most + 1), True, key=enough) + 2
    return found if found <= most else None


def _below(t: float, df: int, noncentrality: float) -> float:
    """P(T < t) of a noncentral t."""
    if noncentrality < 0:
        return 1 - _below(-t, df, -noncentrality)
    chance = float(scipy.stats.nct.cdf(t, df, noncentrality)) if noncentrality <= _FAR else math.nan
    if not math.isnan(chance):  # scipy says NaN of what is all but certain
        return chance
    # Its normal part is the noncentrality itself, all but for one in so many.
    return float(scipy.stats.chi2.sf(df * (noncentrality / t) ** 2, df)) if t > 0 else 0.0
