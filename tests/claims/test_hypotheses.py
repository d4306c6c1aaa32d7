"""Tests of means over seeds beside closed forms, published examples, and what is drawn at random."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from jaxsafety.claims import hypotheses

VALUES = np.array([1.0, 2.0, 3.0])
ERROR = 1 / math.sqrt(3)  # their mean's standard error


def upper_tail(t):
    """P(T > t) of two degrees of freedom."""
    return 0.5 * (1 - t / math.sqrt(2 + t * t))


def test_the_directional_test_is_students():
    assert hypotheses.directional(VALUES, null=0.0) == pytest.approx(2 * upper_tail(2 / ERROR))
    assert hypotheses.directional(VALUES, null=5.0) == pytest.approx(2 * upper_tail(3 / ERROR))


def test_equivalence_is_the_harder_of_two_one_sided_tests():
    assert hypotheses.equivalence(VALUES, null=1.0, margin=4.0) == pytest.approx(upper_tail(3 / ERROR))
    # Outside of the margin it can't be had.
    assert hypotheses.equivalence(VALUES, null=1.0, margin=0.5) == pytest.approx(upper_tail(-0.5 / ERROR))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([1.0], None), ([1.0, 1.0], None), ([0.3, 0.1 + 0.2], None), ([0.0] * 3, None), ([1.0] * 3, 0.0),
     ([1.0, 1.0, 1 - 6e-8], 0.0)],
)  # fmt: skip
def test_equal_values_are_no_chance_but_two_are_none_and_nothing_is_near_them(values, expected):
    """Equal but for rounding: a floor or a ceiling says nothing of how near a mean is."""
    found = hypotheses.directional(np.array(values), null=0.0)
    assert found == expected if expected is not None else math.isnan(found)
    assert math.isnan(hypotheses.equivalence(np.array(values), null=0.0, margin=0.5))


def test_signs_are_flipped_in_every_way():
    values = np.array([0.4, 1.0, -0.2, 0.7, 0.9, 0.1, 1.3, -0.5])
    means = [np.mean(values * signs) for signs in itertools.product([-1, 1], repeat=8)]
    expected = np.mean(np.abs(means) >= abs(values.mean()) - 1e-12)
    assert hypotheses.sign_flip(values + 3, null=3.0) == pytest.approx(expected, abs=2 / 2**8)
    assert hypotheses.sign_flip(np.tile(values, 2), null=0.0) == hypotheses.sign_flip(np.tile(values, 2), null=0.0)


def test_the_example_of_benjamini_and_hochberg():
    """Their section 3.2: four of fifteen are rejected, and three by the bound on any error."""
    published = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719,
                 0.6528, 0.7590, 1.0]  # fmt: skip
    order = np.random.default_rng(0).permutation(15)
    pvalues = np.array([*np.array(published)[order], math.nan]).reshape(4, 4)
    found, strict = hypotheses.rejected(pvalues, rate=0.05)
    assert sorted(pvalues[found]) == published[:4] and sorted(pvalues[strict]) == published[:3]
    assert not hypotheses.rejected(np.full((2, 2), math.nan), rate=0.05).found.any()


@pytest.mark.parametrize(
    ("effect", "level", "expected"),
    # Of G*Power, one-sample t, two-sided, power 0.9.
    [(1.0, 0.05, 13), (0.5, 0.05, 44), (0.2, 0.05, 265)],
)
def test_seeds_needed_are_those_of_published_tables(effect, level, expected):
    assert hypotheses.seeds_needed(effect, 1.0, margin=None, level=level) == expected
    assert hypotheses.seeds_needed(-3 * effect, 3.0, margin=None, level=level) == expected


def test_no_effect_at_all_takes_a_margin():
    assert hypotheses.seeds_needed(0.0, 1.0, margin=None, level=0.05) is None
    assert hypotheses.seeds_needed(0.0, 1.0, margin=0.01, level=0.05) is None


@pytest.mark.parametrize(
    ("ratio", "level", "expected"), [(30.0, 0.05 / 55, 3), (60.0, 0.75 / 55, 2), (1e4, 0.05 / 55, 2)]
)
def test_few_seeds_decide_what_is_far_from_the_null_value(ratio, level, expected):
    """Against draws: there scipy's distribution is another form's."""
    assert hypotheses.seeds_needed(ratio, 1.0, margin=None, level=level) == expected
    drawn = np.random.default_rng(3).normal(ratio, 1.0, size=(20000, expected))
    assert np.mean(stats.ttest_1samp(drawn, 0.0, axis=1).pvalue <= level) > 0.89
    if expected > 2:
        assert np.mean(stats.ttest_1samp(drawn[:, :-1], 0.0, axis=1).pvalue <= level) < 0.9


def test_the_seeds_needed_for_a_side_have_the_power_at_the_level_of_a_family():
    level = 0.05 / 55
    n = hypotheses.seeds_needed(0.8, 1.0, margin=None, level=level)
    drawn = np.random.default_rng(4).normal(0.8, 1.0, size=(4000, n))
    rates = [np.mean(stats.ttest_1samp(drawn[:, :m], 0.0, axis=1).pvalue <= level) for m in (n, n - 3)]
    assert abs(rates[0] - 0.9) < 0.02 and rates[1] < 0.9


@pytest.mark.parametrize(("shift", "margin"), [(0.0, 0.5), (0.1, 0.6)])
def test_the_seeds_needed_for_equivalence_have_the_power(shift, margin):
    n = hypotheses.seeds_needed(shift, 1.0, margin=margin, level=0.05)
    drawn = np.random.default_rng(2).normal(shift, 1.0, size=(2, 4000, n))
    rates = []
    for values in (drawn[0], drawn[1][:, : n - 3]):
        above = stats.ttest_1samp(values, -margin, axis=1, alternative="greater").pvalue
        below = stats.ttest_1samp(values, margin, axis=1, alternative="less").pvalue
        rates.append(np.mean(np.maximum(above, below) < 0.05))
    # Four standard errors of a rate of 0.9 from 4 000.
    assert abs(rates[0] - 0.9) < 0.02 and rates[1] < 0.9
