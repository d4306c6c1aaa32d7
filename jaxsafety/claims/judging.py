"""Statements of papers judged by what a run measured: supported, contradicted, without effect, or undecided.

Every claim has one number per seed, one side of one null value and, declared with it, the smallest effect of interest.
Two tests look at each: whether the mean lies on either side of the null value, and whether it lies within that margin
of it. All tests of a run are one family, in which the expected share of wrong decisions is at most 5 %
(Benjamini-Hochberg); a mark says where the chance of any wrong one is (Holm).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from jaxsafety.claims import hypotheses
from jaxsafety.claims.contrasts import Measurement
from jaxsafety.claims.evidence import Evidence, Unmeasured
from jaxsafety.claims.intervals import Interval, student_interval

Verdict = Literal["supported", "contradicted", "no effect", "undecided"]

ERROR_RATE = 0.05
# Seeds from which the permutation of signs can reach a small p at all: 2 / 2^8 is 0.008.
FLIPPED = 8


class Margin(NamedTuple):
    """The smallest effect of interest, in the unit of the statistic, above 0, and why it is that."""

    value: float
    reason: str


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
        margin: the smallest effect of interest; None where nothing can be said to have no effect.
    """

    name: str
    statement: str
    where: str
    statistic: str
    measure: Callable[[Evidence], Measurement]
    expected: Literal["above", "below"] = "above"
    null: float = 0.0
    margin: Margin | None = None

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 < self.margin.value < np.inf:
            raise ValueError(f"margin of claim {self.name!r}: got {self.margin.value}, expected a number above 0")

    @property
    def side(self) -> str:
        """The side of the null value that the statistic is on, such as ``> 0``."""
        return f"{'>' if self.expected == 'above' else '<'} {self.null:g}"


@dataclass(frozen=True)
class Judgement:
    """A claim with its verdict.

    Attributes:
        claim: what was judged.
        values: the statistic by seed, None where a seed has none; empty if it could not be measured.
        interval: mean and 95 % Student-t interval over the seeds that have a value.
        adjusted: of a decided claim the same, so wide that of the intervals of all that a run decides about 5 % miss
            the truth; of an undecided one without bounds.
        p, p_equivalence: of the tests of side and of equivalence, None where there is none.
        p_flip: of the permutation of signs, from ``FLIPPED`` seeds on, else None: close to p where values are normal.
        verdict: which test rejects; ``no effect`` is that of equivalence, whatever the other says.
        holm: whether Holm's bound decides it, too.
        needed: seeds that would decide what is undecided, with a chance of 90 %, were mean and deviation the truth and
            the other claims as they are; None where it is decided, or more than 1000 would be.
        why: what decided it, or why nothing did; and what was left out.
    """

    claim: Claim
    values: dict[int, float | None]
    interval: Interval
    adjusted: Interval
    p: float | None
    p_equivalence: float | None
    p_flip: float | None
    verdict: Verdict
    holm: bool
    needed: int | None
    why: str


@dataclass(frozen=True)
class Family:
    """How all claims of a run were judged together.

    Attributes:
        judgements: one for each claim.
        tests: how many there were, of both kinds.
        level: coverage of the adjusted intervals, in (0, 1); None where nothing is decided.
    """

    judgements: tuple[Judgement, ...]
    tests: int
    level: float | None


class _Tested(NamedTuple):
    """What a claim measured, its finite values, and their p by test, NaN where there is none."""

    found: Measurement
    finite: np.ndarray
    p: float
    p_equivalence: float
    p_flip: float


def judge(evidence: Evidence, claims: Sequence[Claim]) -> Family:
    """Judges every claim by one run's evidence; what cannot be measured is undecided and says why.

    A seed without a finite value (its lane diverged, or nothing to measure in it) is left out and counted.

    References:
        Benjamini and Yekutieli 2005, JASA 100, definition 1: level of the intervals of what was selected.
    """
    tested = [_tested(claim, _measured(claim, evidence)) for claim in claims]
    pvalues = np.asarray([(one.p, one.p_equivalence) for one in tested], float).reshape(-1, 2)
    rejected, strict = hypotheses.rejected(pvalues, rate=ERROR_RATE)
    tests, selected = int(np.isfinite(pvalues).sum()), int(rejected.any(axis=1).sum())
    level = 1 - ERROR_RATE * selected / int(np.isfinite(pvalues).any(axis=1).sum()) if selected else None
    # A p with which one test more rejects for certain.
    within = ERROR_RATE * min(int(rejected.sum()) + 1, tests) / max(tests, 1)
    judge_one = partial(_judged, seeds=evidence.seeds, level=level, within=within)
    judged = map(judge_one, claims, tested, rejected.tolist(), strict.tolist())
    return Family(tuple(judged), tests, level)


def _measured(claim: Claim, evidence: Evidence) -> Measurement:
    try:
        found = claim.measure(evidence)
    except Unmeasured as reason:
        return Measurement(np.empty(0), str(reason))
    if not isinstance(found, Measurement) or np.shape(found.values) != (len(evidence.seeds),):
        raise ValueError(f"claim {claim.name!r} measured {found!r}, expected a Measurement with a value for every seed")
    return found


def _tested(claim: Claim, found: Measurement) -> _Tested:
    finite, null = np.asarray(found.values, float)[np.isfinite(found.values)], claim.null
    equal = np.nan if claim.margin is None else hypotheses.equivalence(finite, null=null, margin=claim.margin.value)
    flip = hypotheses.sign_flip(finite, null=null) if len(finite) >= FLIPPED else np.nan
    return _Tested(found, finite, hypotheses.directional(finite, null=null), equal, flip)


def _judged(
    claim: Claim, tested: _Tested, rejects: Sequence[bool], strict: Sequence[bool], *, seeds: tuple[int, ...],
    level: float | None, within: float,
) -> Judgement:  # fmt: skip
    plain = [float(value) if np.isfinite(value) else None for value in tested.found.values]
    values = dict(zip(seeds, plain, strict=False))
    interval = student_interval(plain)
    verdict = _verdict(claim, interval, rejects)
    undecided = verdict == "undecided"
    needed, way = _needed(claim, tested, within=within) if undecided else (None, "")
    why = _why(claim, tested, verdict, side=rejects[0], more=f"{needed or 'more than 1000'} seeds would decide it{way}")
    # Of what could not be measured there is nothing to say but why.
    told = [why, _left_out(values, interval)] if values else []
    return Judgement(
        claim=claim,
        values=values,
        interval=interval,
        adjusted=interval._replace(low=None, high=None) if undecided else student_interval(plain, level=level),
        p=_there(tested.p),
        p_equivalence=_there(tested.p_equivalence),
        p_flip=_there(tested.p_flip),
        verdict=verdict,
        holm=strict[1] if verdict == "no effect" else strict[0] and not undecided,
        needed=needed,
        why="; ".join(filter(None, [*told, tested.found.note])),
    )


def _verdict(claim: Claim, interval: Interval, rejects: Sequence[bool]) -> Verdict:
    if rejects[1]:
        return "no effect"
    if not rejects[0]:
        return "undecided"
    return "supported" if (interval.mean > claim.null) == (claim.expected == "above") else "contradicted"


def _needed(claim: Claim, tested: _Tested, *, within: float) -> tuple[int | None, str]:
    """How many seeds would decide a claim, and, where that is not its side, what they would say."""
    if np.isnan(tested.p) or hypotheses.are_equal(tested.finite):
        return None, ""
    shift, deviation = float(tested.finite.mean()) - claim.null, float(tested.finite.std(ddof=1))
    sided = hypotheses.seeds_needed(shift, deviation, margin=None, level=within)
    if claim.margin is None:
        return sided, ""
    either = hypotheses.seeds_needed(shift, deviation, margin=claim.margin.value, level=within)
    return either, "" if either == sided else " (no effect)"


def _why(claim: Claim, tested: _Tested, verdict: Verdict, *, side: bool, more: str) -> str:
    finite, null, n = tested.finite, claim.null, len(tested.finite)
    counted = f"{n} seed{'s' * (n != 1)}"
    if n < 2:
        return f"{counted}: no interval"
    if hypotheses.are_equal(finite):
        if n == 2:
            return "two equal seeds: no interval"
        return f"every seed is {finite[0]:g}" + ("" if side else ": nothing varies to be judged by")
    which = "above" if finite.mean() > null else "below"
    p = f"p {tested.p:.2g}" + ("" if np.isnan(tested.p_flip) else f" ({tested.p_flip:.2g} by signs)")
    if verdict == "no effect":
        also = f", {which} it with {p}" if side else ""
        return f"mean of {counted} within {claim.margin.value:.3g} of {null:g}, p {tested.p_equivalence:.2g}{also}"
    return f"mean of {counted} {which} {null:g}, {p}" if verdict != "undecided" else f"{counted}, {p}: {more}"


def _there(p: float) -> float | None:
    return None if np.isnan(p) else p


def _left_out(values: dict[int, float | None], interval: Interval) -> str:
    missing = len(values) - interval.n
    return f"{missing} of {len(values)} seeds left out: no finite value" if missing else ""
