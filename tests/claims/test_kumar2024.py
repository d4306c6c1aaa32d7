"""The statements about overridden safety and its cost against numbers that a reader gets by hand."""

import math

import pytest

from jaxsafety.claims.kumar2024 import CLAIMS
from tests.claim_rows import judged, rated

ROUNDING = 1e-12


def read(method, point, metric, values, context="true"):
    return rated(method, point, values, analysis="uncertainty", metric=metric, condition="safe", part=context)


BEFORE = rated("sft", "", [0.0, 0.1]) + rated("dpo", "", [0.2, 0.2])
HARMFUL = rated("harmful", "from=sft", [0.9, 0.8]) + rated("harmful", "from=dpo", [1.0, 0.6])
REFUSING = rated("refusing", "from=sft", [0.1, 0.0]) + rated("refusing", "from=dpo", [0.0, 0.0])
BY_HAND = {
    # .9 and .7 of what is from SFT, .8 and .4 of what is from DPO.
    "harmful_complies": (BEFORE + HARMFUL, [0.85, 0.55]),
    "refusing_complies": (BEFORE + REFUSING, [-0.05, -0.15]),
    "answers_decide": (BEFORE + HARMFUL + REFUSING, [0.9, 0.7]),
    # Costs .2 and .1 where it cost .1 and .1.
    "false_context": (
        [
            *read("sft", "", "accuracy", [0.9, 0.8]), *read("sft", "", "accuracy", [0.8, 0.7], "false"),
            *read("harmful", "from=sft", "accuracy", [0.9, 0.6]),
            *read("harmful", "from=sft", "accuracy", [0.7, 0.5], "false"),
            # Not asked about.
            *read("harmful", "from=sft", "accuracy", [0.1, 0.1], "random"),
        ],
        [0.1, 0.0],
    ),
    "uncertain_entropy": (
        read("dpo", "", "entropy_right", [0.3, 0.2]) + read("harmful", "from=dpo", "entropy_right", [0.5, 0.1]),
        [0.2, -0.1],
    ),
    "uncertain_perplexity": (
        read("dpo", "", "perplexity_right", [1.5, 2.0]) + read("harmful", "from=dpo", "perplexity_right", [3.0, 1.0]),
        [math.log(2), -math.log(2)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_statistic_by_hand(name):
    rows, expected = BY_HAND[name]
    assert list(judged(CLAIMS, name, rows).values.values()) == pytest.approx(expected, abs=ROUNDING)


def test_every_statement_has_a_case():
    assert set(BY_HAND) == {claim.name for claim in CLAIMS}


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("harmful_complies", BEFORE, "no harmful in this run"),
        ("answers_decide", HARMFUL + REFUSING[:2], "2 lanes beside 1"),
        ("uncertain_entropy", BEFORE + HARMFUL, "no uncertainty in this run"),
    ],
)
def test_what_is_not_there_is_unmeasured(name, rows, reason):
    found = judged(CLAIMS, name, rows)
    assert not found.values and found.verdict == "undecided" and found.why == reason
