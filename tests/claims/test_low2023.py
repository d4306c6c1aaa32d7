"""The statements about averted patterns against numbers that a reader gets by hand."""

import pytest

from jaxsafety.claims.low2023 import CLAIMS
from tests.claim_rows import judged, series

ROUNDING = 1e-12


def rated(method, point, *, safe, kept):
    return [
        row | {"lr_name": point, "lr": 0.05}
        for metric, values in (("refused", safe), ("optimality", kept))
        for row in series("evaluate", metric, values, method=method, lr_name="", condition="trajectory")
    ]


HIGH = "multiplier=10.0.multiplier_rate="
LAGRANGIAN = rated("lagrangian", f"{HIGH}0.01", safe=[1.0, 0.97], kept=[0.95, 1.0])
BY_HAND = {
    "constraint_met": (LAGRANGIAN, [1.0, 0.97]),
    "return_kept": (LAGRANGIAN, [0.95, 1.0]),
    # -.95 and -.33 in the first seed, .05 and .02 in the second.
    "markov_fails": (
        rated("markov", "threshold=0.05", safe=[0.0, 1.0], kept=[1.0, 0.95])
        + rated("markov", "threshold=0.25", safe=[1.0, 0.97], kept=[0.57, 1.0]),
        [-0.33, 0.05],
    ),
    "penalty_can_be_tuned": (
        rated("penalty", "multiplier=0.5", safe=[0.0, 0.96], kept=[1.0, 1.0])
        + rated("penalty", "multiplier=10.0", safe=[1.0, 0.0], kept=[1.0, 1.0]),
        [0.05, 0.01],
    ),
    "penalty_needs_tuning": (
        rated("penalty", "multiplier=0.5", safe=[0.0, 0.96], kept=[1.0, 1.0])
        + rated("penalty", "multiplier=10.0", safe=[1.0, 1.0], kept=[1.0, 1.0]),
        [-0.95, 0.01],
    ),
    "low_start_fails": (
        LAGRANGIAN + rated("lagrangian", "multiplier=1.0.multiplier_rate=0.01", safe=[0.0, 1.0], kept=[1.0, 0.5]),
        [-0.95, -0.4],
    ),
    "fast_rate_fails": (
        LAGRANGIAN + rated("lagrangian", f"{HIGH}0.05", safe=[1.0, 0.9], kept=[0.6, 1.0]), [-0.3, -0.05]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_statistic_by_hand(name):
    rows, expected = BY_HAND[name]
    assert list(judged(CLAIMS, name, rows).values.values()) == pytest.approx(expected, abs=ROUNDING)


def test_every_statement_has_a_case():
    assert set(BY_HAND) == {claim.name for claim in CLAIMS}


def test_what_is_not_there_is_unmeasured():
    for name, why in (
        ("markov_fails", "no markov in this run"),
        ("low_start_fails", "no lagrangian multiplier=1.0 multiplier_rate=0.01 in this run"),
    ):
        found = judged(CLAIMS, name, LAGRANGIAN)
        assert not found.values and found.why == why
