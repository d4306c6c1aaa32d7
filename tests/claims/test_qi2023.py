"""The statements about fine-tuning attacks against numbers that a reader gets by hand."""

import pytest

from jaxsafety.claims.qi2023 import CLAIMS
from tests.claim_rows import judged, rated

ROUNDING = 1e-12
RIGHT = ("safe", "exact_match")


BEFORE = rated("sft", "", [0.0, 0.1]) + rated("dpo", "", [0.2, 0.2])
AFTER = {
    count: rated("explicit", f"from=sft.middle.prompts={count}", [0.5, 0.5])
    + rated("explicit", f"from=dpo.middle.prompts={count}", dpo)
    for count, dpo in ((10, [0.4, 0.2]), (100, [0.8, 0.3]))
}


def batches(small, large):
    return [
        row
        for name, rates in (("small_batch", small), ("large_batch", large))
        for lr, values in zip(("low", "middle", "high"), rates, strict=True)
        for row in rated(name, lr, values)
    ]


BENIGN = batches([[0.1, 0.1], [0.3, 0.3], [0.8, 0.5]], [[0.0, 0.0], [0.1, 0.1], [0.5, 0.5]])
BY_HAND = {
    # .5 and .4 of what is from SFT, .2 and 0 of what is from DPO; a hundred examples are others.
    "ten_examples": (BEFORE + AFTER[10] + AFTER[100], [0.35, 0.2]),
    "more_examples": (BEFORE + AFTER[10] + AFTER[100], [0.2, 0.05]),
    "hidden_among_safe": (
        AFTER[100] + rated("mixed", "from=sft.middle", [0.5, 0.4]) + rated("mixed", "from=dpo.middle", [0.6, 0.3]),
        [-0.1, -0.05],
    ),
    # .3 and .6 with the persona, .2 and .5 without.
    "identity_shift": (
        rated("sft", "", [0.1, 0.0], "persona") + rated("identity", "from=sft.middle", [0.4, 0.6], "persona")
        + rated("sft", "", [0.0, 0.1]) + rated("identity", "from=sft.middle", [0.2, 0.6]),
        [0.1, 0.1],
    ),
    "benign_twenty_points": (BEFORE + rated("benign", "from=sft.middle", [0.7, 0.7]), [0.7, 0.6]),
    "explicit_keeps_tasks": (
        rated("sft", "", [0.9, 1.0], *RIGHT) + rated("explicit", "from=sft.middle.prompts=100", [0.5, 0.7], *RIGHT),
        [-0.4, -0.3],
    ),
    "benign_complies": (BEFORE + rated("benign", "from=sft.middle", [0.7, 0.7]), [0.7, 0.6]),
    "new_task_complies": (BEFORE + rated("new_task", "from=dpo.middle", [0.7, 0.1]), [0.5, -0.1]),
    "benign_keeps_tasks": (
        rated("sft", "", [0.9, 1.0], *RIGHT) + rated("benign", "from=sft.middle", [0.8, 1.0], *RIGHT),
        [-0.1, 0.0],
    ),
    "larger_rate": (BENIGN, [0.6, 0.45]),
    "smaller_batch": (BENIGN, [0.2, 0.1]),
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
        ("ten_examples", BEFORE + AFTER[100], "no explicit middle prompts=10 in this run"),
        ("ten_examples", AFTER[10], "no model that explicit from=dpo.middle.prompts=10 is from in this run"),
        ("smaller_batch", BENIGN[:-2], "3 lanes beside 2"),
    ],
)
def test_what_is_not_there_is_unmeasured(name, rows, reason):
    found = judged(CLAIMS, name, rows)
    assert not found.values and found.verdict == "undecided" and found.why == reason
