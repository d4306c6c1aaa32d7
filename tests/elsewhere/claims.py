"""Statements that the package does not know, as somebody would write them, on results of their own."""

from jaxsafety.claims.contrasts import Measurement, over_methods
from jaxsafety.claims.judging import Claim


def attacked(evidence, model):
    rates = evidence.by_strength("strange", "refused", model=model, condition="strange")
    return rates[1.0][0] - rates[0.0][0]


def evaluated(evidence):
    return Measurement(evidence.find("evaluate", "refused", model=evidence.strong[0], condition="strange")[0])


CLAIMS = (
    Claim(
        "mine_is_long",
        "The norms of unsafe prompts are above zero.",
        where="nowhere",
        statistic="mean norm over layers",
        measure=lambda evidence: over_methods(
            evidence,
            lambda found, model: found.find("mine", "norm", model=model, condition="unsafe", part="power 1").mean(0),
        ),
    ),
    Claim(
        "strange_breaks",
        "Without its neurons a model refuses less.",
        where="nowhere",
        statistic="share refused without and with neurons",
        measure=lambda evidence: over_methods(evidence, attacked),
        expected="below",
    ),
    Claim(
        "strange_in_table",
        "Its prompts are judged in the accuracy table, too.",
        where="nowhere",
        statistic="share refused",
        measure=evaluated,
    ),
)
