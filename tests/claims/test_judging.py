import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jaxsafety.claims import evidence, judging
from jaxsafety.claims.contrasts import Measurement
from jaxsafety.claims.intervals import student_interval, t_quantile
from jaxsafety.claims.jain2024 import CLAIMS
from jaxsafety.claims.judging import Claim, Margin
from jaxsafety.report import claims_table
from tests.claim_rows import JAILBREAKS, PRE, SUCCESSFUL, gaps, table, taus, textbook

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    return textbook()


def judged(rows, wanted=CLAIMS):
    return {one.claim.name: one for one in judging.judge(evidence.gather(rows), wanted).judgements}


def stub(values, expected="above", null=0.0, margin=None):
    return Claim(
        "stub",
        "",
        where="",
        statistic="",
        measure=lambda _: Measurement(np.array(values)),
        expected=expected,
        null=null,
        margin=None if margin is None else Margin(margin, ""),
    )


def family_of(*stubs):
    seeds = len(stubs[0].measure(None).values)
    return judging.judge(evidence.gather(table("refused", "unsafe", [0.0] * seeds)), stubs)


def verdict_of(values, **options):
    (judgement,) = family_of(stub(values, **options)).judgements
    return judgement


def test_intervals_are_students_plain_and_at_the_level_of_what_was_selected(rows):
    family = judging.judge(evidence.gather(rows), CLAIMS)
    (judgement,) = [one for one in family.judgements if one.claim.name == "clusters_dpo"]
    values = np.array(list(judgement.values.values()))
    assert family.tests == 2 * len(CLAIMS) - 1  # one claim has no margin
    selected = sum(one.verdict != "undecided" for one in family.judgements)
    assert family.level == pytest.approx(1 - 0.05 * selected / len(CLAIMS))
    assert judgement.verdict == "supported"
    for interval, level in ((judgement.interval, 0.95), (judgement.adjusted, family.level)):
        half = t_quantile(3, level=level) * values.std(ddof=1) / 2
        assert interval[:3] == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))


def test_a_family_counts_only_tests_that_there_are():
    some = [stub([1.0, 2.0, 3.0], margin=9.0), stub([1.0, math.nan, math.nan]), stub([math.nan] * 3), stub([0.5] * 3)]
    assert family_of(*some).tests == 3
    assert (family_of(*some[1:3]).tests, family_of(*some[1:3]).level) == (0, None)


def test_what_is_not_selected_has_no_adjusted_interval():
    clear, open_ = family_of(stub([1.0, 1.1, 0.9, 1.0]), stub([1.0, -0.5, 0.2, 0.3])).judgements
    assert clear.adjusted.low < clear.interval.low
    assert open_.interval.low is not None and open_.adjusted == open_.interval._replace(low=None, high=None)


@pytest.mark.parametrize(
    ("values", "options", "verdict", "why"),
    [
        ([1.0, 1.1, 0.9], {}, "supported", "mean of 3 seeds above 0, p 0.0033"),
        ([1.0, 1.1, 0.9], {"expected": "below"}, "contradicted", "mean of 3 seeds above 0, p 0.0033"),
        ([-1.0, -1.1, -0.9], {}, "contradicted", "mean of 3 seeds below 0, p 0.0033"),
        ([1.0, 1.1, 0.9], {"null": 1.0}, "undecided", "3 seeds, p 1: more than 1000 seeds would decide it"),
        (
            [1.0, 1.4, 0.5],
            {"null": 1.0, "margin": 0.5},
            "undecided",
            "3 seeds, p 0.91: 13 seeds would decide it (no effect)",
        ),
        ([1.0, 1.1, 0.9], {"null": 1.0, "margin": 0.5}, "no effect", "mean of 3 seeds within 0.5 of 1, p 0.0065"),
        (
            [1.0, 1.1, 0.9],
            {"margin": 2.0},
            "no effect",
            "mean of 3 seeds within 2 of 0, p 0.0017, above it with p 0.0033",
        ),
        ([-0.01, -0.02, 0.0], {"null": -0.05}, "supported", "mean of 3 seeds above -0.05, p 0.02"),
        ([1.0, -0.5], {}, "undecided", "2 seeds, p 0.8: 192 seeds would decide it"),
        ([0.5, 0.5], {}, "undecided", "two equal seeds: no interval"),
        ([0.5, 0.5, 0.5], {}, "supported", "every seed is 0.5"),
        ([0.0, 0.0, 0.0], {"margin": 0.1}, "undecided", "every seed is 0: nothing varies to be judged by"),
        ([0.5], {}, "undecided", "1 seed: no interval"),
        ([0.5, math.nan, math.inf], {}, "undecided", "1 seed: no interval; 2 of 3 seeds left out: no finite value"),
        ([math.nan], {}, "undecided", "0 seeds: no interval; 1 of 1 seeds left out: no finite value"),
    ],
)
def test_verdicts(values, options, verdict, why):
    judgement = verdict_of(values, **options)
    assert (judgement.verdict, judgement.why) == (verdict, why)


def test_a_margin_is_above_zero():
    with pytest.raises(ValueError, match=r"^margin of claim 'stub': got 0.0, expected a number above 0$"):
        stub([1.0], margin=0.0)


@pytest.mark.parametrize("bound", ["low", "high"])
def test_an_interval_that_touches_the_null_value_decides_nothing(bound):
    values = [1.0, 1.5, 1.7]
    null, outward = getattr(student_interval(values, level=0.95), bound), -1 if bound == "low" else 1
    assert verdict_of(values, null=null - 1e-9 * outward).verdict == "undecided"
    assert verdict_of(values, null=null + 1e-9 * outward).verdict != "undecided"


def test_holms_mark_is_of_the_test_that_the_verdict_is_of():
    clear, weak = stub([1.0, 1.001, 0.999, 1.0]), stub([1.0, 1.8, 0.4, 0.9])
    for others, holm in ((1, True), (3, False)):
        found = family_of(clear, *[weak] * others).judgements
        assert [(one.verdict, one.holm) for one in found] == [("supported", True)] + [("supported", holm)] * others
    near = family_of(stub([0.01, -0.01, 0.0, 0.02], margin=1.0)).judgements
    assert [(one.verdict, one.holm) for one in near] == [("no effect", True)]


def test_signs_are_permuted_from_eight_seeds_on():
    assert verdict_of([1.0] * 6 + [2.0]).p_flip is None
    found = verdict_of([1.0] * 7 + [2.0])
    assert found.p_flip == pytest.approx(2 / 2**8) and found.why.endswith(" (0.0078 by signs)")


def test_many_claims_have_other_numbers_of_seeds_to_go():
    """The level that one test more would have to reach depends on the others."""
    values = [1.0, -0.5, 0.2, 0.3]
    alone, among = verdict_of(values).needed, family_of(*[stub(values)] * 20).judgements[0].needed
    assert 2 < alone < among


def test_values_are_shown_where_the_interval_is_withheld():
    judgement = verdict_of([0.25, math.nan])
    assert judgement.values == {0: 0.25, 1: None}
    assert judgement.interval == (0.25, None, None, 1)


@pytest.fixture(scope="module")
def related():
    """How the claims of the demo's run go together: their values by seed, standardised, ``[m, s]``."""
    found = claims_table.read(ROOT / "experiments" / "results" / "quick").judgements
    values = np.array([list(one.values.values()) for one in found], float)
    return (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)


@pytest.mark.slow
def test_of_claims_that_go_together_few_decisions_are_wrong(related):
    """Most have no effect, to which it is wrong to give a side; the others one of just the margin, and not none."""
    rng, runs, seeds, margin, effects = np.random.default_rng(1), 300, 6, 2.5, 4
    truth = np.zeros((len(related), 1))
    truth[:: len(related) // effects] = margin
    wrong, uncorrected, some = [], [], 0
    for _ in range(runs):
        factors = rng.normal(size=(related.shape[1], seeds)) / math.sqrt(related.shape[1])
        values = truth + math.sqrt(0.5) * (related @ factors + rng.normal(size=(len(related), seeds)))
        found = np.array([one.verdict for one in family_of(*[stub(row, margin=margin) for row in values]).judgements])
        bad = np.where(truth[:, 0] == 0, np.isin(found, ("supported", "contradicted")), found == "no effect")
        wrong.append(bad.sum() / max((found != "undecided").sum(), 1))
        alone = stats.ttest_1samp(values, 0.0, axis=1).pvalue < 0.05
        uncorrected.append((alone & (truth[:, 0] == 0)).sum() / max(alone.sum(), 1))
        some += bool((found != "undecided").any())
    bound = 0.05 + 3 * np.std(wrong) / math.sqrt(runs)
    assert np.mean(wrong) < bound < np.mean(uncorrected) and some > runs / 2


def test_one_seed_shows_values_and_decides_nothing(rows):
    found = judged([row for row in rows if row["seed"] == 2])
    assert {(j.verdict, j.why.partition(";")[0], len(j.values)) for j in found.values()} == {
        ("undecided", "1 seed: no interval", 1)
    }


def test_only_the_last_step_counts(rows):
    early = [row | {"step": 50, "value": -row["value"]} for row in rows if row["method"] != "pretrained"]
    gone = gaps([[9.0] * 4] * 4, step=50)[12:]  # a layer that only the early step has
    assert judged(early + rows + gone) == judged(rows)
    assert judged(rows + early) == judged(rows)


def test_a_dead_lane_leaves_its_seed_out_and_is_counted(rows):
    def dead(row):
        return row["method"] == "dpo" and row["lr_name"] == "eta_M" and row["seed"] == 1

    found = judged([row | {"value": None} if dead(row) else row for row in rows])
    for name in ("clusters_separate", "clusters_dpo", "null_space_up", "sensitivity_safe", "rate_refuses"):
        assert found[name].values[1] is None
        assert found[name].why.endswith("; 1 of 4 seeds left out: no finite value")
        assert (found[name].verdict, found[name].interval.n) == ("supported", 3)
    assert found["clusters_unlearn"].interval.n == 4
    # Its contrast is within each model, and the other models of the seed have one.
    assert found["jailbreaks_nearer_safe"].interval.n == 4


def test_a_method_dead_in_every_seed_is_left_out_and_named(rows):
    def dead(row):
        return row["method"] == "unlearn" and row["lr_name"] == "eta_M"

    found = judged([row | {"value": None} if dead(row) else row for row in rows])
    assert (found["clusters_separate"].verdict, found["clusters_separate"].interval.n) == ("supported", 4)
    assert found["clusters_separate"].why.endswith("; without unlearning eta_M: no finite value")
    assert found["clusters_unlearn"].why == "0 seeds: no interval; 4 of 4 seeds left out: no finite value"
    assert found["clusters_rate"].why.endswith("; without unlearning eta_M minus eta_S: no finite value")


def test_a_method_without_rows_of_an_analysis_is_named(rows):
    found = judged([row for row in rows if not (row["method"] == "dpo" and row["analysis"] == "soft_tokens")])
    assert found["stronger_attacks"].verdict == "supported"
    assert found["stronger_attacks"].why.endswith(
        "; without DPO eta_M: no relative_tau in soft_tokens of DPO eta_M (unsafe)"
    )


@pytest.mark.parametrize("absent", ["null", "no row"])
def test_jailbreaks_that_never_succeed_are_named(rows, absent):
    def without(names):
        failed = [row["subset"] == "successful" and row["condition"] in names for row in rows]
        if absent == "null":
            return [row | {"value": None} if gone else row for row, gone in zip(rows, failed, strict=True)]
        return [row for row, gone in zip(rows, failed, strict=True) if not gone]

    some = judged(without(("jb_misgen", "jb_co_task")))
    assert some["jailbreaks_nearer_safe"].verdict == "supported"
    assert some["jailbreaks_nearer_safe"].why.endswith("; without JB-CO-Task and JB-MisGen: under 8 successes")
    none = judged(without(JAILBREAKS))
    for name in ("jailbreaks_nearer_safe", "jailbreaks_evade_update", "jailbreaks_sensitivity"):
        assert (none[name].verdict, none[name].why) == ("undecided", "no jailbreak with 8 successes in any seed")


def test_a_jailbreak_that_succeeds_in_some_seeds_counts_in_those(rows):
    def missing(row):
        return row["subset"] == "successful" and (row["seed"] == 0 or row["condition"] != "jb_co_text")

    found = judged([row for row in rows if not missing(row)])
    assert found["jailbreaks_nearer_safe"].values[0] is None
    assert found["jailbreaks_nearer_safe"].interval.n == 3


def test_what_jailbreaks_bring_with_them_is_said(rows):
    before = taus("unsafe", [[-0.1] * 4], **PRE) + taus("jb_co_text", [[0.1, 0.2, 0.3, None]], **PRE, **SUCCESSFUL)
    # .2, .3 and .4 of the one jailbreak that the pretrained model was measured on, and in those seeds.
    layered = [row | {"layer": layer} for row in before for layer in range(3)]
    assert judged(rows + layered)["jailbreaks_nearer_safe"].why.endswith("; before tuning +0.300")


def test_the_weakest_model_is_named(rows):
    assert judged(rows)["extrapolation_null"].why.endswith("; the weakest is SFT eta_S")
    lost = [row | {"value": None} if row["lr_name"] == "eta_S" and row["seed"] == 0 else row for row in rows]
    assert judged(lost)["extrapolation_null"].why.endswith("no finite value; the weakest is SFT eta_S")


def test_a_model_that_answers_nothing_cannot_show_that_it_loses_little(rows):
    def silent(row):
        return row["metric"] == "exact_match" and row["analysis"] == "interventions" and row["seed"] in (0, 3)

    found = judged([row | {"value": 0.04} if silent(row) else row for row in rows])["extrapolation_cost"]
    assert [value is None for value in found.values.values()] == [True, False, False, True]


@pytest.mark.parametrize(
    ("keep", "name", "why"),
    [
        (lambda row: row["method"] != "sft", "clusters_dpo", "no SFT in this run"),
        (lambda row: row["method"] != "unlearn", "dpo_like_unlearning", "no unlearning in this run"),
        (lambda row: row["lr_name"] != "eta_S", "clusters_rate", "one learning rate in this run"),
        (lambda row: row["analysis"] != "soft_tokens", "stronger_attacks", "no soft_tokens in this run"),
        (lambda row: row["analysis"] != "evaluate", "rate_refuses", "no accuracy table in this run"),
        (lambda row: row["analysis"] != "evaluate", "extrapolation_null", "no accuracy table in this run"),
        (
            lambda row: row["strength"] != 1.5,
            "extrapolation_cost",
            "no exact_match in interventions of SFT eta_S (safe whole at 1.5)",
        ),
        # The weakest was not edited: no other takes its place.
        (
            lambda row: (row["analysis"], row["lr_name"]) != ("interventions", "eta_S"),
            "extrapolation_null",
            "no refused in interventions of SFT eta_S (unsafe whole at 1)",
        ),
        (lambda row: row["strength"] not in (0, 0.5), "interpolation", "fewer than three alphas in [0, 1]"),
        (lambda row: row["strength"] not in (10, 20), "stronger_attacks", "one strength of soft-token attacks"),
        (lambda row: row["layer"] in (None, 0), "clusters_deepen", "one layer: no depth to grow with"),
        (
            lambda row: row["condition"] not in JAILBREAKS,
            "jailbreaks_sensitivity",
            "no gradient_norm in sensitivity of SFT eta_M (successful jb_co_task)",
        ),
        (
            lambda row: row["condition"] != "jb_misgen",
            "sft_above_dpo",
            "no complied in evaluate of SFT eta_M (jb_misgen)",
        ),
        (lambda row: row["part"] != "only_random", "null_part_suffices",
         "no refused in interventions of SFT eta_M (unsafe only_random at 1)"),
        (lambda row: row["method"] == "pretrained", "acts_on_unsafe", "no tuned model in this run"),
        (lambda row: row["method"] == "pretrained", "jailbreaks_nearer_safe", "no tuned model in this run"),
        (lambda row: row["method"] == "pretrained", "rate_refuses", "no tuned model in this run"),
        (lambda row: row["method"] != "pretrained", "clusters_low_rank",
         "no leading_share in clusters of pretrained (unsafe response)"),
        (lambda row: False, "clusters_separate", "no tuned model in this run"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_undecided_and_says_why(rows, keep, name, why):
    judgement = judged([row for row in rows if keep(row)])[name]
    assert (judgement.verdict, judgement.values, judgement.interval.n) == ("undecided", {}, 0)
    assert judgement.why == why


@pytest.mark.parametrize("draw", range(12))
def test_no_loss_of_rows_or_values_ends_in_an_error(rows, draw):
    """Whole analyses, methods, conditions or parts missing, single rows missing, values null, zero or negative."""
    rng = np.random.default_rng(draw)
    for column in rng.choice(["analysis", "method", "lr_name", "condition", "part", "layer", "strength"], 2):
        gone = rng.choice(sorted({str(row[column]) for row in rows}))
        rows = [row for row in rows if str(row[column]) != gone]
    kept = [row for row in rows if rng.random() < 0.9]
    values = (None, 0.0, -1.0)
    broken = [row | {"value": values[rng.integers(3)]} if rng.random() < 0.2 else row for row in kept]
    found = judged(broken)
    assert list(found) == [claim.name for claim in CLAIMS]
    for judgement in found.values():
        assert judgement.why
        assert judgement.verdict == "undecided" or judgement.interval.low is not None
