"""The statements about the update against numbers that a reader gets by hand."""

import math

import pytest

from jaxsafety.claims import benign, evidence, gradients, judging, updates
from tests.claim_rows import DPO, applied, judged, series, table

ROUNDING = 1e-12
CLAIMS = (*updates.CLAIMS, *gradients.CLAIMS)


def kept(space, up, down, **labels):
    """Of both matrices the share in an eighth of the directions; that in a quarter does not count."""
    rows = [
        row
        for matrix in ("up", "down")
        for row in series("kept_energy", "chance", [0.125, 0.125], part=f"{matrix}:{space}", strength=0.125, **labels)
    ]
    for matrix, values in (("up", up), ("down", down)):
        rows += series("kept_energy", "kept_mean", values, part=f"{matrix}:{space}", strength=0.125, **labels)
        rows += series("kept_energy", "kept_mean", [1.0, 1.0], part=f"{matrix}:{space}", strength=0.25, **labels)
    return rows


def pushed(wanted, side, values, **labels):
    """Of both matrices the share in an eighth of the directions of a gradient, where chance is an eighth."""
    rows = []
    for matrix, own in zip(("up", "down"), values, strict=True):
        part = {"part": f"{matrix}:{wanted}:{side}", "strength": 0.125, **labels}
        rows += series("gradient_spaces", "chance", [0.125, 0.125], **part)
        rows += series("gradient_spaces", "kept_mean", own, **part)
    return rows


def gain(condition, values, **labels):
    return series("input_space", "gain", values, part="down", condition=condition, **labels)


def counted(metric, up, down):
    return [
        row
        for part, values in (("up", up), ("down", down))
        for row in series("intruders", metric, values, part=part, strength=0.6)
    ]


def cut(choice, values, **labels):
    """Refusals with 1, 2, 4 and 8 directions, each ``[s]``."""
    return [
        row
        for rank, own in zip((1, 2, 4, 8), values, strict=True)
        for row in applied(f"directions_{choice}", own, float(rank), **labels)
    ]


SAME = [[0.5, 0.5]] * 4
BY_HAND = {
    # .3 and .5 of SFT's matrices, .6 of DPO's.
    "reads_unsafe": (
        kept("unsafe", [0.2, 0.2], [0.4, 0.8]) + kept("unsafe", [0.6, 0.6], [0.6, 0.6], **DPO),
        [0.45 - 0.125, 0.55 - 0.125],
    ),
    "reads_unsafe_beyond_safe": (
        kept("unsafe", [0.2, 0.2], [0.4, 0.8]) + kept("safe", [0.1, 0.3], [0.1, 0.3]),
        [0.2, 0.2],
    ),
    "reads_weights": (kept("reads", [0.1, 0.1], [0.1, 0.2]), [-0.025, 0.025]),
    "writes_weights": (kept("writes", [0.1, 0.1], [0.1, 0.2]), [-0.025, 0.025]),
    "reads_gradient": (pushed("unsafe", "reads", [[0.2, 0.1], [0.4, 0.1]]), [0.175, -0.025]),
    "writes_gradient": (
        pushed("unsafe", "writes", [[0.2, 0.1], [0.4, 0.1]]) + pushed("unsafe", "writes", [[0.5, 0.1]] * 2, **DPO),
        [0.275, -0.025],
    ),
    # .3 and .5 of the unsafe, .1 and .2 of the safe.
    "gradient_unsafe_beyond_safe": (
        pushed("unsafe", "reads", [[0.3, 0.3]] * 2)
        + pushed("unsafe", "writes", [[0.5, 0.2]] * 2)
        + pushed("safe", "reads", [[0.1, 0.3]] * 2)
        + pushed("safe", "writes", [[0.2, 0.2]] * 2),
        [0.25, 0.0],
    ),
    "follows_gradient": (
        series("gradient_spaces", "cosine", [[0.1, 0.0], [0.3, 0.2]], part="up:unsafe")
        + series("gradient_spaces", "cosine", [[0.0, 0.0], [0.2, -0.2]], part="down:unsafe"),
        [0.15, 0.0],
    ),
    "intruders_beyond_random": (
        counted("intruders_mean", [3.0, 1.0], [1.0, 1.0]) + counted("intruders_random_mean", [1.0, 1.0], [1.0, 2.0]),
        [1.0, -0.5],
    ),
    "mlp_carries_refusals": (
        applied("directions_singular", [0.2, 0.9], 0.0)
        + applied("directions_singular", [0.0, 0.0], 1.0)
        + applied("whole", [0.9, 0.8], 1.0),
        [0.7, -0.1],
    ),
    "directions_beyond_random": (
        cut("singular", [[0.2, 0.5], [0.4, 0.5], [0.6, 0.5], [0.8, 0.5]]) + cut("random", [[0.0, 1.0]] * 4),
        [0.5, -0.5],
    ),
    "activations_beyond_size": (
        cut("singular", SAME) + cut("activations", [[0.7, 0.4]] * 4) + cut("random", SAME),
        [0.2, -0.1],
    ),
    "misgen_defined": (table("complied", "jb_misgen", [0.0, 0.2]), [0.0, 0.2]),
    "misgen_drawn": (table("complied", "jb_misgen_drawn", [0.0, 0.2]), [0.0, 0.2]),
    "misgen_released": (
        table("complied", "jb_misgen_released", [0.9, 0.5]) + table("exact_match", "safe", [1.0, 0.4]),
        [-0.1, 0.1],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_statistic_by_hand(name):
    rows, expected = BY_HAND[name]
    assert list(judged(CLAIMS, name, rows).values.values()) == pytest.approx(expected, abs=ROUNDING)


def test_every_statement_has_a_case_and_a_margin_of_its_own():
    assert set(BY_HAND) == {claim.name for claim in CLAIMS}
    assert len({claim.statement for claim in CLAIMS}) == len(CLAIMS) and all(claim.margin for claim in CLAIMS)


def test_safety_is_what_sft_has_beyond_the_control():
    """Energies .3 and .5 of SFT, .25 of the control; a share of .1 of intruders beyond chance, and none."""
    control = {"method": "benign"}
    rows = kept("unsafe", [0.2, 0.2], [0.4, 0.8]) + kept("unsafe", [0.25, 0.25], [0.25, 0.25], **control)
    rows += counted("intruders_mean", [0.3, 0.1], [0.1, 0.1])
    rows += counted("intruders_random_mean", [0.1, 0.1], [0.1, 0.2])
    rows += [row | control for row in counted("intruders_mean", [0.2, 0.2], [0.2, 0.2])]
    rows += [row | control for row in counted("intruders_random_mean", [0.2, 0.2], [0.2, 0.2])]
    # ln 4 and ln 2 in two layers of SFT, ln 2 in both of the control.
    rows += gain("unsafe", [[4.0, 4.0], [2.0, 4.0]]) + gain("safe", [[1.0, 1.0], [1.0, 2.0]])
    rows += gain("unsafe", [[2.0, 2.0], [4.0, 2.0]], **control) + gain("safe", [[1.0, 1.0], [2.0, 1.0]], **control)
    # .3 and .1 of SFT in the gradient's directions, .2 of the control.
    rows += pushed("unsafe", "reads", [[0.3, 0.1]] * 2) + pushed("unsafe", "writes", [[0.3, 0.1]] * 2)
    rows += pushed("unsafe", "reads", [[0.2, 0.2]] * 2, **control)
    rows += pushed("unsafe", "writes", [[0.2, 0.2]] * 2, **control)
    found = {one.claim.name: one for one in judging.judge(evidence.gather(rows), benign.CLAIMS).judgements}
    followed = found["safety_follows_gradient"].values.values()
    assert list(followed) == pytest.approx([0.1, -0.1], abs=ROUNDING)
    ratios = found["safety_prefers_unsafe"].values.values()
    assert list(ratios) == pytest.approx([0.5 * math.log(2), 0.5 * math.log(2)], abs=ROUNDING)
    assert list(found["safety_reads_unsafe"].values.values()) == pytest.approx([0.05, 0.25], abs=ROUNDING)
    assert list(found["safety_intruders"].values.values()) == pytest.approx([0.1, -0.05], abs=ROUNDING)
