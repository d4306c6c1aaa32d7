"""The statements about safety landscapes against numbers that a reader gets by hand."""

from functools import partial

import numpy as np
import pytest
from scipy import stats

from jaxsafety.claims import peng2024
from jaxsafety.edits import landscape
from tests import claim_rows
from tests.claim_rows import DPO, applied, series, table

ROUNDING = 1e-6
ALPHAS = (-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4)
MODELS = ("one", "two", "three", "four", "five")


def curve(metric, condition, by_distance, *, direction=0, **labels):
    """A rate by distance from 0 and seed, the same to both sides."""
    part = f"landscape,direction={direction},beta=0.0"
    return [
        row
        for alpha in ALPHAS
        for row in applied(part, by_distance[round(abs(10 * alpha))], alpha, condition, metric, **labels)
    ]


def around(refused, exact, **labels):
    return curve("refused", "unsafe", refused, **labels) + curve("exact_match", "safe", exact, **labels)


def seeds(*values):
    """The same in two seeds, or a pair of values."""
    return [value if np.ndim(value) else [value, value] for value in values]


STRAIGHT = seeds(1.0, 0.75, 0.5, 0.25, 0.0)
STEP = seeds(1.0, 1.0, 0.5, 0.0, 0.0)
HARDLY = seeds(0.2, 0.2, 0.1, 0.0, 0.0)
# Half of it at 0.1 in the first seed and at 0.3 in the second.
BOTH = [[0.8, 1.0], [0.4, 1.0], [0.2, 1.0], [0.0, 0.5], [0.0, 0.0]]
NEVER = seeds(1.0, 1.0, 1.0, 1.0, 0.9)


def way(by_alpha):
    labels = {"part": "attack_path", "condition": "unsafe", "method": "attacked"}
    return [
        row for alpha, values in by_alpha.items()
        for row in series("interventions", "complied", values, strength=alpha, **labels)
    ]  # fmt: skip


def study(visages, before, after, *, models=MODELS, capability=1.0):
    """Models whose VISAGE is given, by seed: what they are unsafe on is the same at every point."""
    rows = []
    for place, name in enumerate(models):
        own, unsafe = {"method": name}, [1 - visage for visage in visages[place]]
        for direction, shift in ((0, 0.01), (1, -0.01)):
            given = own | {"direction": direction}
            complied = seeds(*[[one + shift for one in unsafe]] * 5)
            rows += curve("refused", "unsafe", [[1 - one for one in at] for at in complied], **given)
            rows += curve("complied", "unsafe", complied, **given)
            rows += curve("exact_match", "safe", seeds(*[capability] * 5), **given)
        rows += table("complied", "unsafe", before[place], **own)
        rows += table("refused", "unsafe", REFUSED[place], **own)
        attacked = table("complied", "unsafe", after[place], method="attacked")
        rows += [row | {"lr_name": f"from={name}.eta_M"} for row in attacked]
    return rows


RNG = np.random.default_rng(0)
VISAGES, BEFORE, AFTER, REFUSED = RNG.uniform(0.1, 0.9, (4, len(MODELS), 2)).tolist()


def by_residuals(seed, given=BEFORE):
    """A partial correlation of ranks another way: of what a straight line of the third leaves of the first two."""
    x, y, z = (stats.rankdata(np.array(one)[:, seed]) for one in (VISAGES, AFTER, given))
    left = [one - np.polyval(np.polyfit(z, one, 1), z) for one in (x, y)]
    return np.corrcoef(left)[0, 1]


BY_HAND = {
    # Refusals halve at 0.1 and 0.3, answers at 0.2.
    "refusals_end_first": (around(BOTH, STRAIGHT), [np.log(0.5), np.log(1.5)]),
    # 0.1 of 0.2 for the step, 0.2 of 0.2 for the straight line.
    "refusals_fall_steeply": (around(STEP, STRAIGHT), [-0.5, -0.5]),
    "visage_beyond_start": (study(VISAGES, BEFORE, AFTER), [by_residuals(0), by_residuals(1)]),
    "visage_beyond_refusals": (study(VISAGES, BEFORE, AFTER), [by_residuals(s, REFUSED) for s in (0, 1)]),
    "capable_visage_beyond_start": (study(VISAGES, BEFORE, AFTER), [by_residuals(0), by_residuals(1)]),
    "attack_leaves_basin": (way({0.0: [0.1, 0.0], 0.5: [0.3, 0.3], 1.0: [0.9, 0.05]}), [0.8, 0.05]),
    # By quarters 0.1, 0.1, 0.3, 0.3 of 0.8; in the second seed there is hardly a rise.
    "basin_has_an_edge": (way({0.0: [0.1, 0.0], 0.5: [0.3, 0.3], 1.0: [0.9, 0.05]}), [0.375, None]),
}


judged = partial(claim_rows.judged, peng2024.CLAIMS, others=("attacked",))


@pytest.mark.parametrize("name", BY_HAND)
def test_statistic_by_hand(name):
    rows, expected = BY_HAND[name]
    assert list(judged(name, rows).values.values()) == pytest.approx(expected, abs=ROUNDING)


def test_every_statement_has_a_case_and_a_margin():
    assert set(BY_HAND) == {claim.name for claim in peng2024.CLAIMS} and all(
        one.margin or one.null for one in peng2024.CLAIMS
    )
    assert set(landscape.SECTION.claims) <= set(BY_HAND)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (around(NEVER, STRAIGHT), [np.log(2)] * 2),
        (around(STRAIGHT, NEVER), [-np.log(2)] * 2),
        (around(NEVER, NEVER), [None] * 2),
        (around(HARDLY, STRAIGHT), [None] * 2),
        (around([[None, one[1]] for one in STRAIGHT], STEP), [None, 0.0]),
        # Of two directions the radii, and of two methods the results are averaged.
        (around(STRAIGHT, STRAIGHT) + around(NEVER, STRAIGHT, direction=1), [np.log(1.5)] * 2),
        (around(STRAIGHT, STRAIGHT) + around(NEVER, STRAIGHT, **DPO), [np.log(2) / 2] * 2),
    ],
)
def test_what_does_not_halve_ends_the_grid(rows, expected):
    assert list(judged("refusals_end_first", rows).values.values()) == pytest.approx(expected, abs=ROUNDING)


def test_a_width_is_that_of_the_curves_that_fall():
    rows = around(STEP, STRAIGHT) + around(NEVER, STRAIGHT, direction=1)
    assert list(judged("refusals_fall_steeply", rows).values.values()) == pytest.approx([-0.5] * 2, abs=ROUNDING)
    assert set(judged("refusals_fall_steeply", around(NEVER, STRAIGHT)).values.values()) == {None}


def test_visage_is_of_what_was_there_before_all_the_same():
    """What is the same for all models is held fixed by itself."""
    rows = study(VISAGES, [[0.0, 0.0]] * 5, AFTER)
    expected = [stats.spearmanr(np.array(VISAGES)[:, s], np.array(AFTER)[:, s]).statistic for s in (0, 1)]
    found = judged("visage_beyond_start", rows)
    assert list(found.values.values()) == pytest.approx(expected, abs=ROUNDING)
    assert "spread of VISAGE over directions 0.010" in found.why


def test_what_follows_from_the_start_alone_says_nothing_beyond():
    start = np.array(BEFORE)
    found = judged("visage_beyond_start", study((1 - start).tolist(), BEFORE, AFTER))
    assert set(found.values.values()) == {None}


def test_a_model_counts_where_it_lives():
    after = [[None, AFTER[0][1]], *AFTER[1:]]
    found = judged("visage_beyond_start", study(VISAGES, BEFORE, after))
    assert list(found.values.values())[1] == pytest.approx(by_residuals(1), abs=ROUNDING)
    four = judged("visage_beyond_start", study(VISAGES[1:], BEFORE[1:], AFTER[1:], models=MODELS[1:]))
    assert found.values[0] == pytest.approx(four.values[0], abs=ROUNDING)


@pytest.mark.parametrize(
    ("name", "rows", "why"),
    [
        ("refusals_end_first", table("refused", "unsafe", [0.5, 0.5]), "no landscape of SFT eta_M"),
        ("refusals_fall_steeply", [row for row in around(STEP, STEP) if row["strength"]], "no alpha of 0 in landscape"),
        (
            "visage_beyond_start",
            study(VISAGES, BEFORE, AFTER, models=MODELS[:3]),
            "3 models with a landscape and attacked ones from them: 4 are needed",
        ),
        ("attack_leaves_basin", around(STEP, STEP), "no attacked in this run"),
        ("attack_leaves_basin", way({0.0: [0.1, 0.1], 0.5: [0.2, 0.2]}), "no alpha of 0 or 1 in attack_path"),
        (
            "basin_has_an_edge",
            study(VISAGES, BEFORE, AFTER),
            "no complied in interventions of attacked from=five.eta_M",
        ),
    ],
)
def test_what_is_not_there_is_not_measured(name, rows, why):
    found = judged(name, rows)
    assert found.verdict == "undecided" and not found.values and why in found.why
