import math

import pytest

from jaxsafety.report import intervals

# The quantile is bisected to the last bits of theta; published tables give four decimals.
QUANTILE_TOLERANCE = 5e-5
# Closed forms in float64.
ROUNDING = 1e-12


@pytest.mark.parametrize(
    ("df", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_t_quantile_matches_published_table(df, expected):
    assert intervals.t_quantile(df) == pytest.approx(expected, abs=QUANTILE_TOLERANCE)


def test_t_quantile_has_closed_forms_for_one_and_two_degrees_of_freedom():
    assert intervals.t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), rel=ROUNDING)
    assert intervals.t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=ROUNDING)


def test_mean_interval_by_hand():
    # Four rates, mean .5, squared deviations .01 .01 .01 .01: s = sqrt(.04 / 3), half width t_3 s / 2.
    mean, low, high, n = intervals.mean_interval([0.4, 0.6, 0.4, 0.6])
    half = 3.182446305284263 * math.sqrt(0.04 / 3) / 2
    assert (mean, n) == (0.5, 4)
    assert low == pytest.approx(0.5 - half, rel=1e-9)
    assert high == pytest.approx(0.5 + half, rel=1e-9)


def test_mean_interval_leaves_out_dead_seeds_and_clips():
    mean, low, high, n = intervals.mean_interval([0.98, None, 1.0, math.nan])
    assert (mean, high, n) == (0.99, 1.0, 2)
    assert low == pytest.approx(0.99 - 12.706204736 * 0.01, abs=1e-8)


def test_mean_interval_of_one_or_no_seed_has_no_interval():
    assert intervals.mean_interval([0.25]) == (0.25, None, None, 1)
    assert intervals.mean_interval([None]) == (None, None, None, 0)


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_mean_interval_refuses_what_is_not_a_rate(value):
    with pytest.raises(ValueError, match=r"out of range: expected a value in \[0, 1\]"):
        intervals.mean_interval([0.5, value])
