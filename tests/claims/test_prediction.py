"""Predictions across units, against scipy, closed forms and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxsafety.claims import prediction

NOTHING = np.empty((16, 0))


def test_without_others_it_is_spearmans_correlation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=16)
    y = x + rng.normal(size=16)
    found, expected = prediction.predicted(y, x, others=NOTHING), stats.spearmanr(x, y)
    assert found.correlation == pytest.approx(expected.statistic) == found.partial
    assert found.p == pytest.approx(expected.pvalue)
    assert found.low < found.partial < found.high and found.n == 16


def test_with_one_other_it_is_the_textbooks_partial_correlation():
    rng = np.random.default_rng(1)
    z = rng.normal(size=16)
    x, y = (z + 0.5 * rng.normal(size=16) for _ in range(2))
    xy, xz, yz = (stats.spearmanr(*pair).statistic for pair in ((x, y), (x, z), (y, z)))
    found = prediction.predicted(y, x, others=z[:, None])
    assert found.partial == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))
    # Most of what they share is what both have of the other.
    assert abs(found.partial) < abs(found.correlation)


def test_what_the_others_know_already_adds_nothing():
    rng = np.random.default_rng(2)
    z = rng.normal(size=16)
    found = prediction.predicted(z + 0.1 * rng.normal(size=16), 2 * z + 1, others=z[:, None])
    assert found.correlation > 0.9 and math.isnan(found.partial) and found.gain == pytest.approx(0, abs=1e-9)


def test_the_gain_is_the_share_of_the_error_on_units_left_out():
    rng = np.random.default_rng(3)
    x = rng.normal(size=16)
    assert prediction.predicted(3 * x - 1, x, others=NOTHING).gain == pytest.approx(1)
    # A quantity that means nothing makes predictions worse more often than better.
    gains = [prediction.predicted(rng.normal(size=16), rng.normal(size=16), others=NOTHING).gain for _ in range(50)]
    assert np.median(gains) < 0


def test_units_without_a_value_are_left_out():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 16))
    y[3], x[5] = np.nan, np.inf
    kept = np.isfinite(x) & np.isfinite(y)
    found = prediction.predicted(y, x, others=NOTHING)
    assert found.n == 14 and found.correlation == pytest.approx(stats.spearmanr(x[kept], y[kept]).statistic)


def test_too_few_units_are_refused():
    with pytest.raises(ValueError, match=r"^outcome: got 5 units with all values, expected at least 6$"):
        prediction.predicted(np.arange(5.0), np.arange(5.0) ** 2, others=np.ones((5, 2)))
    with pytest.raises(ValueError, match=r"^count: got 3, expected at least 4$"):
        prediction.detectable(3)


def test_what_can_be_detected_is_found_four_times_in_five():
    rng, count, found = np.random.default_rng(5), 17, 0
    rank = prediction.detectable(count)
    assert 0.6 < rank < 0.7 and prediction.detectable(200) < 0.25
    # Pearson's correlation that belongs to this one of ranks, of normal numbers.
    rho = 2 * math.sin(math.pi * rank / 6)
    for _ in range(400):
        x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=count).T
        found += prediction.predicted(y, x, others=np.empty((count, 0))).p < 0.05
    # Three standard errors of 400 trials.
    assert found / 400 == pytest.approx(0.8, abs=0.06)
