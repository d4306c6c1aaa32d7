"""Statements of papers judged by what a run measured: supported, contradicted or undecided.

Every claim has one number per seed and one side of one null value. It is judged by the two-sided Student-t interval
over seeds at level ``1 - 0.05 / m``, m being the number of claims that have an interval (Bonferroni): with normal
values, and were every null value the truth, a run would decide any claim at all with a probability of at most 5 %.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxsafety.claims.contrasts import Measurement
from jaxsafety.claims.evidence import Evidence, Unmeasured
from jaxsafety.claims.intervals import Interval, student_interval

Verdict = Literal["supported", "contradicted", "undecided"]

ERROR_RATE = 0.05


@dataclass(frozen=True)
class Claim:
    """One statement that data can contradict.

    Attributes:
        name: identifier.
        statement: the sentence, in our own words.
        where: section and figure of the paper, or that it goes beyond it.
        statistic: what the number of a seed is, with its formula.
        measure: evidence to that number; raises ``Unmeasured``.
        expected: the side of ``null`` on which the statement puts the statistic.
        null: the value between the two sides.
    """

    name: str
    statement: str
    where: str
    statistic: str
    measure: Callable[[Evidence], Measurement]
    expected: Literal["above", "below"] = "above"
    null: float = 0.0


@dataclass(frozen=True)
class Judgement:
    """A claim with its verdict.

    Attributes:
        claim: what was judged.
        values: the statistic by seed, None where a seed has none; empty if it could not be measured.
        interval: mean and interval over the seeds that have a value.
        level: coverage of the interval, in (0, 1).
        family: number of claims that have an interval, which the level is corrected for.
        verdict: ``supported`` or ``contradicted`` if the interval lies wholly on the claim's side or on the other.
        why: what decided it, or why nothing did; and what was left out.
    """

    claim: Claim
    values: dict[int, float | None]
    interval: Interval
    level: float
    family: int
    verdict: Verdict
    why: str


def judge(evidence: Evidence, claims: Sequence[Claim]) -> list[Judgement]:
    """Judges every claim by one run's evidence; what cannot be measured is undecided and says why.

    A seed without a finite value (its lane diverged, or nothing to measure in it) is left out and counted.
    """
    measured = [_measured(claim, evidence) for claim in claims]
    family = sum(np.isfinite(values).sum() >= 2 for values, _ in measured)
    level = 1 - ERROR_RATE / max(int(family), 1)
    return [
        _judged(claim, evidence.seeds, measurement, level, int(family))
        for claim, measurement in zip(claims, measured, strict=True)
    ]


def _measured(claim: Claim, evidence: Evidence) -> Measurement:
    try:
        found = claim.measure(evidence)
    except Unmeasured as reason:
        return Measurement(np.empty(0), str(reason))
    if not isinstance(found, Measurement) or np.shape(found.values) != (len(evidence.seeds),):
        raise ValueError(f"claim {claim.name!r} measured {found!r}, expected a Measurement with a value for every seed")
    return found


def _judged(claim: Claim, seeds: tuple[int, ...], measurement: Measurement, level: float, family: int) -> Judgement:
    numbers = [float(value) if np.isfinite(value) else None for value in measurement.values]
    values = dict(zip(seeds, numbers, strict=False))
    interval = student_interval(numbers, level=level)
    if not values:
        return Judgement(claim, values, interval, level, family, "undecided", measurement.note)
    verdict, why = _verdict(claim, interval)
    if missing := len(values) - interval.n:
        why += f"; {missing} of {len(values)} seeds left out: no finite value"
    if measurement.note:
        why += f"; {measurement.note}"
    return Judgement(claim, values, interval, level, family, verdict, why)


def _verdict(claim: Claim, interval: Interval) -> tuple[Verdict, str]:
    _, low, high, n = interval
    if low is None:
        return "undecided", f"{n} seed{'s' * (n != 1)}: no interval"
    if low == high and n == 2:
        return "undecided", "two equal seeds: no interval"
    if low == high == claim.null:
        return "undecided", f"every seed is exactly {claim.null:g}"
    if low > claim.null or high < claim.null:
        side = "above" if low > claim.null else "below"
        verdict: Verdict = "supported" if side == claim.expected else "contradicted"
        return verdict, f"interval of {n} seeds {side} {claim.null:g}"
    return "undecided", f"interval of {n} seeds includes {claim.null:g}"
