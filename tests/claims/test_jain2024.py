"""The statistic of every statement against numbers that a reader gets by hand."""

import dataclasses
import math

import pytest

from jaxsafety.claims import evidence, judging
from jaxsafety.claims.jain2024 import BEYOND, CLAIMS
from tests.claim_rows import (
    DPO,
    DPO_WEAK,
    JAILBREAKS,
    PRE,
    SFT,
    SUCCESSFUL,
    UNLEARN,
    WEAK,
    applied,
    gains,
    gaps,
    norms,
    series,
    table,
    taus,
    textbook,
)

# Sums and logarithms of a few float64 numbers.
ROUNDING = 1e-12

# Every claim on two seeds, with what a reader gets by hand.
BY_HAND = {
    # Means over layers .2 .2 before; .4 .4 and .6 .7 after.
    "clusters_separate": (
        gaps([[0.1, 0.2], [0.3, 0.2]], **PRE) + gaps([[0.3, 0.3], [0.5, 0.5]]) + gaps([[0.5, 0.6], [0.7, 0.8]], **DPO),
        [0.3, 0.35],
    ),
    # Slopes .1 and .3 of SFT (the middle layer does not count), 0 and 0 of DPO.
    "clusters_deepen": (
        gaps([[0.0, 0.0], [0.1, 0.1], [0.2, 0.2]], **PRE)
        + gaps([[0.1, 0.0], [0.5, 0.3], [0.3, 0.6]])
        + gaps([[0.4, 0.2]] * 3, **DPO),
        [-0.05, 0.05],
    ),
    "clusters_rate": (
        gaps([[0.5, 0.7]]) + gaps([[0.2, 0.1]], **WEAK) + gaps([[0.9, 0.9]], **DPO) + gaps([[0.8, 0.9]], **DPO_WEAK),
        [0.2, 0.3],
    ),
    "clusters_dpo": (gaps([[0.5, 0.5], [0.3, 0.5]], **DPO) + gaps([[0.2, 0.6], [0.2, 0.6]]), [0.2, -0.1]),
    "clusters_unlearn": (gaps([[0.5, 0.5]], **UNLEARN) + gaps([[0.2, 0.6]]), [0.3, -0.1]),
    "clusters_low_rank": (
        series("clusters", "leading_share", [[0.2, 0.1], [0.4, 0.3]], part="response", condition="unsafe", **PRE)
        + series("clusters", "leading_share", [[0.4, 0.3], [0.6, 0.6]], part="response", condition="unsafe"),
        [0.2, 0.25],
    ),
    "null_space_up": (series("output_space", "excess", [[0.1, 0.2], [0.3, 0.0]], part="up"), [0.2, 0.1]),
    "null_space_down": (series("output_space", "excess", [[-0.1, 0.2]], part="down"), [-0.1, 0.2]),
    # Ratios 2 and 8, 1/2 and 2.
    "acts_on_unsafe": (
        gains([[2.0, 0.5], [8.0, 4.0]], condition="unsafe") + gains([[1.0, 1.0], [1.0, 2.0]], condition="safe"),
        [math.log(4), 0.0],
    ),
    # Steps over alpha 0, .5, 1 are 1 2 and 3 -1; beyond 1 does not count.
    "interpolation": (
        [
            row
            for alpha, sizes in {0.0: [0.0, 0.0], 0.5: [1.0, 3.0], 1.0: [3.0, 2.0], 1.5: [0.0, 0.0]}.items()
            for row in applied("whole", [sizes], alpha, "", "effect_size")
        ],
        [1.0, -1.0],
    ),
    # SFT eta_S refuses least in the table, though not at alpha 1 of the analysis.
    "extrapolation_null": (
        table("refused", "unsafe", [0.9, 0.8])
        + table("refused", "unsafe", [0.2, 0.4], **WEAK)
        + applied("whole", [0.1, 0.1], 1.0)
        + applied("whole", [0.1, 0.1], 1.5)
        + applied("whole", [0.3, 0.4], 1.0, **WEAK)
        + applied("whole", [0.6, 0.5], 1.5, **WEAK),
        [0.3, 0.1],
    ),
    "extrapolation_cost": (
        table("refused", "unsafe", [0.9, 0.8])
        + applied("whole", [0.9, 0.9], 1.0, "safe", "exact_match")
        + applied("whole", [0.8, 0.9], 1.5, "safe", "exact_match"),
        [-0.1, 0.0],
    ),
    "sensitivity_unsafe": (
        norms([4.0, 2.0], condition="unsafe", **PRE)
        + norms([1.0, 2.0], condition="unsafe")
        + norms([4.0, 8.0], condition="unsafe", **DPO),
        [-math.log(2), math.log(2)],
    ),
    "sensitivity_safe": (
        norms([4.0, 2.0], condition="safe", **PRE) + norms([8.0, 1.0], condition="safe"),
        [math.log(2), -math.log(2)],
    ),
    # CO-Text succeeds in both seeds, MisGen only in the second, CO-Task never.
    "jailbreaks_nearer_safe": (
        taus("unsafe", [[-0.5, -0.6], [-0.7, -0.8]])
        + taus("jb_co_task", [[None, None]] * 2, **SUCCESSFUL)
        + taus("jb_co_text", [[0.1, 0.0], [0.1, 0.2]], **SUCCESSFUL)
        + taus("jb_misgen", [[None, 0.4], [None, 0.4]], **SUCCESSFUL)
        # Seven successes are too few to count.
        + [row for name, n in (("co_task", [7, 7]), ("co_text", [8, 9]), ("misgen", [0, 50]))
           for row in series("verdicts", "n_successful", n, condition=f"jb_{name}")],
        [0.7, 0.95],
    ),
    "jailbreaks_evade_update": (
        gains([[4.0, 4.0]], condition="unsafe") + gains([[1.0, 8.0]], condition="jb_misgen", **SUCCESSFUL)
        + series("verdicts", "n_successful", [8, 8], condition="jb_misgen"),
        [-math.log(4), math.log(2)],
    ),
    # g = 2 between unsafe 1 and safe 8; g = 1 at unsafe 1 and 2 from safe 2.
    "jailbreaks_sensitivity": (
        norms([1.0, 1.0], condition="unsafe")
        + norms([8.0, 2.0], condition="safe")
        + norms([2.0, 1.0], condition="jb_co_text", **SUCCESSFUL)
        + series("verdicts", "n_successful", [8, 8], condition="jb_co_text"),
        [math.log(2) - math.log(4), -math.log(2)],
    ),
    # Within a number of tokens the strengths count as 0, 1; 8 tokens have one strength and no slope.
    "stronger_attacks": (
        [
            row
            for tokens, strength, tau in [(1, 10, -0.4), (1, 20, 0.0), (2, 20, 0.0), (2, 40, 0.2), (8, 80, 0.2)]
            for row in series(
                "soft_tokens", "relative_tau", [[tau, -tau]], part=f"{tokens} tokens", strength=float(strength),
                condition="unsafe",
            )
        ],
        [0.3, -0.3],
    ),
    "rate_refuses": (
        table("refused", "unsafe", [0.9, 0.8]) + table("refused", "unsafe", [0.5, 0.9], **WEAK),
        [0.4, -0.1],
    ),
    "co_text_above_co_task": (
        table("complied", "jb_co_text", [0.9, 0.5]) + table("complied", "jb_co_task", [0.4, 0.6]),
        [0.5, -0.1],
    ),
    "misgen_above_co_task": (
        table("complied", "jb_misgen", [0.9, 0.5]) + table("complied", "jb_co_task", [0.4, 0.6]),
        [0.5, -0.1],
    ),
    "sft_above_dpo": (
        [row for name in JAILBREAKS for row in table("complied", name, [0.6, 0.6])]
        + [r for name, rate in zip(JAILBREAKS, (0.0, 0.3, 0.6), strict=True)
           for r in table("complied", name, [rate, 2 * rate], **DPO)],
        [0.3, 0.0],
    ),
    "sft_above_unlearn": (
        [row for name in JAILBREAKS for row in table("complied", name, [0.6, 0.6])]
        + [row for name in JAILBREAKS for row in table("complied", name, [0.5, 0.8], **UNLEARN)],
        [0.1, -0.2],
    ),
    "null_part_suffices": (applied("only_null", [0.8, 0.7]) + applied("only_random", [0.3, 0.9]), [0.5, -0.2]),
    "null_part_beyond_range": (applied("only_null", [0.8, 0.7]) + applied("only_range", [0.0, 0.0]), [0.8, 0.7]),
    "null_part_necessary": (applied("all_but_null", [0.1, 0.5]) + applied("all_but_random", [0.6, 0.1]), [-0.5, 0.4]),
    # Null strength and strength 1 are the same for a part; other multiples are not it.
    "mlp_beyond_attention": (
        applied("mlp", [0.8, 0.6], 1.0) + applied("mlp", [0.0, 0.0], 0.5) + applied("attention", [0.2, 0.7]),
        [0.6, -0.1],
    ),
    # The pair may stand either way round.
    "dpo_like_unlearning": (
        series("alignment", "cosine", [0.9, 0.5], part="unlearn~dpo", **UNLEARN)
        + series("alignment", "cosine", [0.2, 0.6], part="sft~dpo")
        + series("alignment", "cosine", [0.4, 0.8], part="sft~unlearn")
        + series("alignment", "gradient_cosine", [1.0, 1.0], part="sft~dpo", lr_name="", step=0)
        + [row for method in (SFT, DPO, UNLEARN) for row in table("refused", "unsafe", [0.5, 0.5], **method)],
        [0.5, -0.3],
    ),
}  # fmt: skip


def judged(rows, wanted=CLAIMS):
    return {one.claim.name: one for one in judging.judge(evidence.gather(rows), wanted).judgements}


def test_every_claim_has_a_name_a_case_and_a_statement_of_its_own():
    assert set(BY_HAND) == {claim.name for claim in CLAIMS}
    for field in ("name", "statement", "statistic"):
        assert len({getattr(claim, field) for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.where.startswith(("Sec. 4", "Sec. 5", "App.")) or claim.where == BEYOND for claim in CLAIMS)


@pytest.mark.parametrize("name", BY_HAND)
def test_statistic_by_hand(name):
    rows, expected = BY_HAND[name]
    judgement = judged(rows)[name]
    assert list(judgement.values) == [0, 1]
    assert list(judgement.values.values()) == pytest.approx(expected, abs=ROUNDING)


def test_where_all_statements_hold_all_are_supported():
    found = judged(textbook())
    assert {name: (j.verdict, j.why) for name, j in found.items() if j.verdict != "supported"} == {}


def test_the_opposite_of_what_holds_is_contradicted():
    other = {"above": "below", "below": "above"}
    opposite = [dataclasses.replace(claim, expected=other[claim.expected]) for claim in CLAIMS]
    found = judged(textbook(), opposite)
    assert {j.verdict for j in found.values()} == {"contradicted"}
    assert found["clusters_separate"].why.startswith("mean of 4 seeds above 0, p ")
    assert found["sensitivity_unsafe"].why.startswith("mean of 4 seeds below 0, p ")
