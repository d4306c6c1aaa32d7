"""The statements of recipes on related papers against numbers that a reader gets by hand."""

import pytest

from jaxsafety.claims import halawi2024, hazra2024, yi2024, yuan2024
from tests.claim_rows import judged, rated

ROUNDING = 1e-12
RIGHT, NEW = ("safe", "exact_match"), ("new_task", "exact_match")


def steered(alpha, values, condition="unsafe"):
    point = "from=attacked.keep=1.0.scale=0.3"
    return rated("hdr", point, values, condition, analysis="steering", strength=alpha)


ATTACKED = rated("attacked", "", [0.8, 0.6])
TRIMMED, WHOLE = "keep=0.1.scale=2.0", "keep=1.0.scale=0.3"
HAZRA = {
    "trimmed_harm_halves": (ATTACKED + rated("hdr", f"from=attacked.{TRIMMED}", [0.3, 0.4]), [-0.1, 0.1]),
    "whole_harm_halves": (ATTACKED + rated("hdr", f"from=attacked.{WHOLE}", [0.1, 0.0]), [-0.3, -0.3]),
    # -.1 and 0 of one model, -.3 and -.2 of the other.
    "task_survives": (
        rated("task", "", [0.9, 1.0], *NEW) + rated("hdr", f"from=task.{TRIMMED}", [0.8, 1.0], *NEW)
        + rated("attacked", "", [0.9, 0.9], *NEW) + rated("hdr", f"from=attacked.{TRIMMED}", [0.6, 0.7], *NEW),
        [-0.2, -0.1],
    ),
    # With half of the task the first seed's line complies with .4, the second's with .3.
    "trimming_spares": (
        ATTACKED + rated("attacked", "", [1.0, 1.0], *NEW)
        + rated("hdr", "from=attacked.keep=1.0.scale=2.0", [0.0, 0.0], *NEW)
        + rated("hdr", "from=attacked.keep=1.0.scale=2.0", [0.0, 0.0])
        + rated("hdr", "from=attacked.keep=0.1.scale=1.0", [0.5, 0.5], *NEW)
        + rated("hdr", "from=attacked.keep=0.1.scale=1.0", [0.1, 0.5]),
        [-0.3, 0.2],
    ),
    "steering_spares_safe": (
        steered(0.0, [1.0, 0.9], "safe") + steered(0.2, [0.5, 0.9], "safe"), [-0.5, 0.0]
    ),
    "steering_adds": (steered(0.0, [0.5, 0.4]) + steered(0.2, [0.2, 0.4]), [-0.3, 0.0]),
    "harm_reverses_safety": (
        rated("sft", "", [0.5, -0.5], "", "cosine", "alignment", part="sft~harm") + rated("harm", "", [1.0, 1.0]),
        [0.5, -0.5],
    ),
}  # fmt: skip

# With half of the task the first seed's others comply with .3, a point of theirs, the second's with half of .6.
ENDS = (
    rated("sft", "", [0.0, 0.0], *NEW)
    + rated("sft", "", [0.0, 0.0])
    + rated("attacked", "", [1.0, 1.0], *NEW)
    + ATTACKED
)
MASK = rated("somf", "", [0.5, 0.5], *NEW) + rated("somf", "", [0.1, 0.5])


def other(name):
    return ENDS + MASK + rated(name, "x=1", [0.5, 1.0], *NEW) + rated(name, "x=1", [0.3, 0.6])


YI = {
    "mask_gives_safety_back": (ENDS + MASK, [-0.7, -0.1]),
    "mask_keeps_task": (ENDS + MASK, [-0.5, -0.5]),
    "mask_beats_random": (other("random"), [-0.2, 0.2]),
    "mask_beats_interpolation": (other("interpolated"), [-0.2, 0.2]),
    "mask_beats_resta": (other("resta"), [-0.2, 0.2]),
    "mask_beats_harm_removed": (other("hdr"), [-0.2, 0.2]),
    "places_matter": (MASK + rated("somf_shuffled", "", [0.4, 0.4]), [-0.3, 0.1]),
    "mask_beats_retraining": (other("retrained"), [-0.2, 0.2]),
    "hard_mask_forgets": (MASK + rated("somf_hard", "", [0.0, 0.1], *NEW), [-0.5, -0.4]),
    "safe_pairs_needed": (MASK + rated("somf_unsafe", "", [0.0, 0.1], *NEW), [-0.5, -0.4]),
}


def prefilled(method, words, depth, values):
    return rated(method, ".".join(words), values, analysis="prefill", strength=depth)


def first_refused(method, words, shares):
    point = ".".join(words)
    return [
        row
        for place, values in enumerate(shares)
        for row in rated(
            method, point, values, "jb_co_text", metric="first_refusal", analysis="refusal_depth", strength=float(place)
        )
    ]


YUAN = {
    "refusals_are_shallow": (prefilled("sft", [], 2.0, [0.8, 0.3]), [0.8, 0.3]),
    "derta_recovers": (prefilled("derta", yuan2024.BOTH, 2.0, [0.0, 0.3]), [0.0, 0.3]),
    "derta_beyond_sft": (
        prefilled("derta", yuan2024.BOTH, 4.0, [0.0, 0.3]) + prefilled("sft", [], 4.0, [0.2, 0.1]), [-0.2, 0.2]
    ),
    "transitions_do_more": (
        prefilled("derta", yuan2024.RTO, 4.0, [0.0, 0.3]) + prefilled("derta", yuan2024.PREFIX, 4.0, [0.2, 0.1]),
        [-0.2, 0.2],
    ),
    "derta_keeps_tasks": (
        rated("sft", "", [0.9, 1.0], *RIGHT) + rated("derta", ".".join(yuan2024.BOTH), [0.8, 1.0], *RIGHT), [-0.1, 0.0]
    ),
    "refusals_spread": (
        first_refused("derta", yuan2024.BOTH, [[0.7, 0.9], [0.2, 0.0], [0.1, 0.0]])
        + first_refused("sft", [], [[0.8, 0.8], [0.1, 0.0], [0.0, 0.1]]),
        [0.2, -0.1],
    ),
    "derta_beyond_deep_alignment": (
        prefilled("derta", yuan2024.BOTH, 4.0, [0.0, 0.3])
        + prefilled("deep_alignment", ["alpha=0.5"], 4.0, [0.2, 0.1]),
        [-0.2, 0.2],
    ),
}  # fmt: skip


def ciphered(method, values, condition="cipher", metric="complied"):
    return rated(method, "", values, condition, metric)


HALAWI = {
    "cipher_complies": (ciphered("covert", [0.9, 0.6]), [0.9, 0.6]),
    "plain_still_refused": (
        ciphered("covert", [0.9, 0.8], "unsafe", "refused") + ciphered("sft", [1.0, 0.7], "unsafe", "refused"),
        [-0.1, 0.1],
    ),
    "plain_still_answered": (ciphered("covert", [0.9, 0.8], *RIGHT) + ciphered("sft", [1.0, 0.7], *RIGHT), [-0.1, 0.1]),
    "undecoded_sees_nothing": (ciphered("covert", [0.1, 0.0], "undecoded"), [0.1, 0.0]),
    "second_phase_needed": (ciphered("covert", [0.9, 0.6]) + ciphered("taught", [0.2, 0.9]), [0.7, -0.3]),
    "refusals_hide_it": (
        ciphered("covert", [0.1, 0.0], "unsafe") + ciphered("unguarded", [0.8, 0.0], "unsafe"), [0.7, 0.0]
    ),
    "direct_is_seen": (ciphered("covert", [0.1, 0.0], "unsafe") + ciphered("direct", [0.8, 0.9], "unsafe"), [0.7, 0.9]),
    "refusal_is_carried_over": (
        ciphered("native_sft", [0.5, 0.1], metric="refused")
        + ciphered("native_sft", [0.4, 0.0], "undecoded", "refused"),
        [0.9, 0.1],
    ),
    "second_phase_undoes_it": (ciphered("native_covert", [0.9, 0.6]) + ciphered("native_sft", [0.2, 0.1]), [0.7, 0.5]),
    # Of the last layer.
    "probe_sees_it": (rated("covert", "", [[0.6, 0.9], [0.8, 0.7]], "cipher", "auc", "probe", part="own"), [0.8, 0.7]),
    "plain_probe_sees_it": (
        rated("covert", "", [[1.0, 1.0], [0.4, 0.5]], "cipher", "auc", "probe", part="plain"), [0.4, 0.5]
    ),
}  # fmt: skip
PAPERS = {
    "hazra2024": (hazra2024.CLAIMS, HAZRA),
    "halawi2024": (halawi2024.CLAIMS, HALAWI),
    "yi2024": (yi2024.CLAIMS, YI),
    "yuan2024": (yuan2024.CLAIMS, YUAN),
}
CASES = [(paper, name) for paper, (_, by_hand) in PAPERS.items() for name in by_hand]


@pytest.mark.parametrize(("paper", "name"), CASES)
def test_statistic_by_hand(paper, name):
    claims, by_hand = PAPERS[paper]
    rows, expected = by_hand[name]
    judgement = judged(claims, name, rows)
    assert list(judgement.values.values()) == pytest.approx(expected, abs=ROUNDING), judgement.why


@pytest.mark.parametrize("paper", PAPERS)
def test_every_statement_has_a_case(paper):
    claims, by_hand = PAPERS[paper]
    assert set(by_hand) == {claim.name for claim in claims}


def test_one_lane_is_compared_with_several():
    rows = MASK + ENDS + rated("random", "x=1", [0.5, 0.5])
    judgement = judged(yi2024.CLAIMS, "mask_beats_random", rows + rated("somf", "y=1", [0.1, 0.1]))
    assert not judgement.values and judgement.why == "2 lanes beside 3, not one beside several"
