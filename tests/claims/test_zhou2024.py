"""The statements about emulated disalignment against numbers that a reader gets by hand."""

import pytest

from jaxsafety.claims.zhou2024 import CLAIMS
from tests.claim_rows import DPO, WEAK, judged, series

ROUNDING = 1e-12


def away(by_alpha, condition="unsafe", **labels):
    return [
        row
        for alpha, values in by_alpha.items()
        for row in series("emulated", "complied", values, strength=alpha, condition=condition, **labels)
    ]


BY_HAND = {
    # .3 and -.1 of SFT, .1 of DPO.
    "away_complies": (
        away({0.0: [0.5, 0.6], 0.6: [0.8, 0.5]}) + away({0.0: [0.5, 0.5], 0.6: [0.6, 0.6]}, **DPO),
        [0.2, 0.0],
    ),
    "too_far_fails": (away({0.0: [0.5, 0.6], 0.6: [0.8, 0.5], 4.0: [0.2, 0.9]}), [-0.6, 0.4]),
    "better_tuned_gains_more": (
        away({0.0: [0.5, 0.5], 0.6: [0.9, 0.7]}) + away({0.0: [0.5, 0.5], 0.6: [0.6, 0.8]}, **WEAK),
        [0.3, -0.1],
    ),
    # Best at .3 and at .6: .3 and .3 over the base, and .1 and .3 at eta_S.
    "better_tuned_peaks_higher": (
        away({0.0: [0.5, 0.5], 0.3: [0.8, 0.6], 0.6: [0.2, 0.8]}) + away({0.0: [0.5, 0.5], 0.6: [0.6, 0.8]}, **WEAK),
        [0.2, 0.0],
    ),
    "safe_prompts_lose": (away({0.0: [1.0, 0.9], 0.6: [0.7, 0.9]}, condition="safe"), [-0.3, 0.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_statistic_by_hand(name):
    rows, expected = BY_HAND[name]
    assert list(judged(CLAIMS, name, rows).values.values()) == pytest.approx(expected, abs=ROUNDING)


def test_every_statement_has_a_case_and_a_margin():
    assert set(BY_HAND) == {claim.name for claim in CLAIMS} and all(claim.margin for claim in CLAIMS)
