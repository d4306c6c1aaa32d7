import math

import numpy as np
import pytest
from scipy import stats

from jaxsafety.claims import intervals

# Published tables give four decimals.
TABLE_TOLERANCE = 5e-5
# Closed forms in float64.
ROUNDING = 1e-12
# Simpson's rule on 20 001 points of a smooth integrand.
QUADRATURE = 1e-9


@pytest.mark.parametrize(
    ("df", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_t_quantile_matches_published_table(df, expected):
    assert intervals.t_quantile(df) == pytest.approx(expected, abs=TABLE_TOLERANCE)


@pytest.mark.parametrize("level", [0.01, 0.5, 0.95, 0.998, 1 - 1e-9])
def test_t_quantile_has_closed_forms_for_one_and_two_degrees_of_freedom(level):
    # tan(pi level / 2), written so that its own argument does not round away next to pi / 2.
    cauchy = 1 / math.tan(math.pi * (1 - level) / 2)
    assert intervals.t_quantile(1, level=level) == pytest.approx(cauchy, rel=ROUNDING)
    two = level * math.sqrt(2 / ((1 - level) * (1 + level)))
    assert intervals.t_quantile(2, level=level) == pytest.approx(two, rel=ROUNDING)


@pytest.mark.parametrize(("df", "level"), [(3, 0.95), (3, 1 - 0.05 / 28), (7, 0.9), (19, 0.999)])
def test_t_quantile_encloses_its_level_of_the_density(df, level):
    quantile = intervals.t_quantile(df, level=level)
    x = np.linspace(-quantile, quantile, 20_001)
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    density = math.exp(log_scale) * (1 + x**2 / df) ** (-(df + 1) / 2)
    weights = np.where(np.arange(x.size) % 2, 4, 2)
    weights[[0, -1]] = 1
    assert float(density @ weights) * (x[1] - x[0]) / 3 == pytest.approx(level, abs=QUADRATURE)


def test_student_interval_by_hand_at_two_levels():
    # Mean 2, squared deviations 9 1 1 9: s = sqrt(20 / 3), standard error sqrt(5 / 3).
    values, error = [-1.0, 1.0, 3.0, 5.0], math.sqrt(5 / 3)
    for level, quantile in ((0.95, 3.182446305283705), (0.99, 5.840909309733318)):
        mean, low, high, n = intervals.student_interval(values, level=level)
        assert (mean, n) == (2.0, 4)
        assert (low, high) == pytest.approx((2 - quantile * error, 2 + quantile * error), rel=ROUNDING)


def test_student_interval_is_not_clipped_and_moves_with_its_values():
    low = intervals.student_interval([-7.0, -5.0, -6.5]).low
    assert low < -7
    shifted = intervals.student_interval([13.0, 15.0, 13.5])
    assert shifted.low - 20 == pytest.approx(low, rel=ROUNDING)


@pytest.mark.parametrize("value", [0.1, -0.05, 1 / 3])
def test_equal_values_make_an_interval_of_exactly_that_point(value):
    assert intervals.student_interval([value] * 3, level=0.999) == (value, value, value, 3)


def test_student_interval_leaves_out_what_is_not_finite():
    assert intervals.student_interval([None, math.nan, -2.5, math.inf]) == (-2.5, None, None, 1)
    assert intervals.student_interval([None]) == (None, None, None, 0)


def test_student_interval_covers_at_its_level():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 4))
    covered = np.mean([low < 3 < high for _, low, high, _ in map(intervals.student_interval, draws.tolist())])
    # Four standard errors of a share of 0.95 in 4000.
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_mean_interval_by_hand():
    # Four rates, mean .5, squared deviations .01 .01 .01 .01: s = sqrt(.04 / 3), half width t_3 s / 2.
    mean, low, high, n = intervals.mean_interval([0.4, 0.6, 0.4, 0.6])
    half = 3.182446305283705 * math.sqrt(0.04 / 3) / 2
    assert (mean, n) == (0.5, 4)
    assert low == pytest.approx(0.5 - half, rel=ROUNDING)
    assert high == pytest.approx(0.5 + half, rel=ROUNDING)


def test_mean_interval_leaves_out_dead_seeds_and_clips():
    mean, low, high, n = intervals.mean_interval([0.98, None, 1.0, math.nan])
    assert (mean, high, n) == (0.99, 1.0, 2)
    assert low == pytest.approx(0.99 - 12.706204736 * 0.01, abs=1e-8)
    assert intervals.mean_interval([0.0, 0.4], level=0.5).low == 0.0


def test_mean_interval_of_one_or_no_seed_has_no_interval():
    assert intervals.mean_interval([0.25]) == (0.25, None, None, 1)
    assert intervals.mean_interval([None]) == (None, None, None, 0)


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_mean_interval_refuses_what_is_not_a_rate(value):
    with pytest.raises(ValueError, match=r"out of range: expected a value in \[0, 1\]"):
        intervals.mean_interval([0.5, value])


def test_mean_interval_takes_a_rate_one_rounding_above_one():
    assert intervals.mean_interval([1 + 1e-6, 1.0]) == (1.0, 1.0, 1.0, 2)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
def test_levels_out_of_range_are_refused(level):
    for call in (lambda: intervals.student_interval([1.0], level=level), lambda: intervals.t_quantile(3, level=level)):
        with pytest.raises(ValueError, match=r"level of an interval must be in \(0, 1\), got"):
            call()


def test_no_degrees_of_freedom_are_refused():
    with pytest.raises(ValueError, match="degrees of freedom must be >= 1, got 0"):
        intervals.t_quantile(0)


def test_welch_half_width_by_hand():
    # Variances 20 / 3 of four values and 1 of three: squared errors 5 / 3 and 1 / 3.
    error, df = 2.0, 4 / ((5 / 3) ** 2 / 3 + (1 / 3) ** 2 / 2)
    half = intervals.welch_half_width([-1.0, 1.0, 3.0, 5.0], [0.0, 1.0, 2.0])
    assert half == pytest.approx(intervals.t_quantile(df) * math.sqrt(error), rel=ROUNDING)
    # Of equal groups it is Student's two-sample interval.
    assert intervals.welch_half_width([0.0, 2.0], [3.0, 5.0]) == pytest.approx(
        intervals.t_quantile(2) * math.sqrt(2), rel=ROUNDING
    )
    assert intervals.welch_half_width([1.0, 1.0], [2.0, 2.0]) == 0.0
    assert intervals.welch_half_width([1.0], [2.0, 2.0]) is None


@pytest.mark.parametrize(("count", "n"), [(0, 10), (10, 10), (3, 10), (1, 1), (17, 240)])
def test_share_interval_is_scipys_exact_one(count, n):
    found, exact = intervals.share_interval(count, n), stats.binomtest(count, n).proportion_ci(method="exact")
    assert (found.mean, found.n) == (count / n, n)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_share_interval_of_nothing_and_of_what_is_no_share():
    assert intervals.share_interval(0, 0) == (None, None, None, 0)
    with pytest.raises(ValueError, match=r"count of a share must be in \[0, 3\], got 4"):
        intervals.share_interval(4, 3)
