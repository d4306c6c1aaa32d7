"""The statements of Low et al. 2023, averting learned patterns of trajectories, where the optimum is known.

Models are ``lagrangian`` (the classifier's verdict on whole trajectories is the cost), ``penalty`` (so it is, with
multipliers that stay) and ``markov`` (every tempting symbol costs the same).

References:
    Low, Kumar and Sanner (2023), arXiv 2304.03081. The statements are in our own words.

Fidelity:
    Theirs are of navigation and reservoirs, of thresholds of 0.95 and 0.8 on the probability of a safe trajectory. Here
    it is 0.95, and the return is held against the enumerated optimum's. Margins and null values were fixed before
    ``experiments/safe_mdp.yaml`` had been run. In its first run the multiplier had one rate, 0.05, and overshot: the
    constraint was met and the return not kept. Since then the statements ask the slower rate, and the last one asks
    that. So they were before the third run, whose seeds are others. Those that are to lie above a bound have no margin
    any more, as what lies just above it would be no effect.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from jaxsafety.claims.children import lanes, rate
from jaxsafety.claims.contrasts import Measurement
from jaxsafety.claims.evidence import Evidence
from jaxsafety.claims.judging import Claim, Margin

_POINTS = Margin(0.05, "five points of a hundred of a share, or of their difference")
_SAFE, _RETURN = 0.95, 0.9
_SLOW, _FAST = "multiplier_rate=0.01", "multiplier_rate=0.05"
_HIGH = "multiplier=10.0"


def _share(evidence: Evidence, *, metric: str) -> Measurement:
    (model,) = lanes(evidence, "lagrangian", [_HIGH, _SLOW])
    return Measurement(rate(evidence, model, metric=metric, condition="trajectory"))


def _slack(
    evidence: Evidence, *, name: str, words: Sequence[str] = (), over: Callable[..., np.ndarray] = np.max
) -> Measurement:
    """By how much both are met, of the lane with the most (or, with ``min``, the least) of it in every seed."""
    found = [
        np.minimum(safe - _SAFE, kept - _RETURN)
        for safe, kept in (
            [rate(evidence, one, metric=metric, condition="trajectory") for metric in ("refused", "optimality")]
            for one in lanes(evidence, name, words)
        )
    ]
    return Measurement(over(found, axis=0))


_STATISTIC = "the smaller of share without the pattern - 0.95 and share of the optimum's return - 0.9; {}"

CLAIMS = (
    Claim(
        "constraint_met",
        "A policy whose multiplier is learned meets the constraint on whole trajectories.",
        "Sec. 5",
        "share of trajectories without the pattern; null value 0.95",
        measure=partial(_share, metric="refused"),
        null=_SAFE,
    ),
    Claim(
        "return_kept",
        "A policy whose multiplier is learned keeps 90 % of the return that can be had under the constraint.",
        "Sec. 5",
        "share of the optimum's return, at most 1; null value 0.9",
        measure=partial(_share, metric="optimality"),
        null=_RETURN,
    ),
    Claim(
        "markov_fails",
        "With a Markov cost no policy meets the constraint and keeps the return.",
        "Sec. 5",
        _STATISTIC.format("the best of two thresholds and two rates in every seed"),
        measure=partial(_slack, name="markov"),
        expected="below",
        margin=_POINTS,
    ),
    Claim(
        "penalty_can_be_tuned",
        "A fixed penalty meets the constraint and keeps the return where it is tuned.",
        "beyond the paper",
        _STATISTIC.format("the best of three penalties in every seed"),
        measure=partial(_slack, name="penalty"),
    ),
    Claim(
        "penalty_needs_tuning",
        "A fixed penalty fails where it is not tuned.",
        "Sec. 5",
        _STATISTIC.format("the worst of three penalties in every seed"),
        measure=partial(_slack, name="penalty", over=np.min),
        expected="below",
        margin=_POINTS,
    ),
    Claim(
        "low_start_fails",
        "A multiplier that begins low finds no policy that meets the constraint.",
        "beyond the paper",
        _STATISTIC.format("multiplier 1 at the first step"),
        measure=partial(_slack, name="lagrangian", words=["multiplier=1.0", _SLOW]),
        expected="below",
        margin=_POINTS,
    ),
    Claim(
        "fast_rate_fails",
        "A multiplier that changes fast does not keep the return.",
        "beyond the paper",
        _STATISTIC.format("a rate of the multiplier of 0.05"),
        measure=partial(_slack, name="lagrangian", words=[_HIGH, _FAST]),
        expected="below",
        margin=_POINTS,
    ),
)
