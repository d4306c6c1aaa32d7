"""Rows of made-up runs for the tests of the claims: builders by quantity, and a run in which every statement holds."""

import numpy as np

from jaxsafety.claims import evidence, judging

RATES = {"": 0.0, "eta_M": 1e-3, "eta_S": 1e-4}
SEEDS = (0, 1, 2, 3)
JAILBREAKS = ("jb_co_task", "jb_co_text", "jb_misgen")
SFT, DPO, UNLEARN = ({"method": method} for method in ("sft", "dpo", "unlearn"))
PRE, WEAK, DPO_WEAK = {"method": "pretrained"}, {"lr_name": "eta_S"}, {"method": "dpo", "lr_name": "eta_S"}
SUCCESSFUL = {"subset": "successful"}


def series(analysis, metric, values, *, method="sft", lr_name="eta_M", step=100, part="", **labels):
    """Rows of one quantity: ``values`` is ``[s]``, or ``[l, s]`` with a layer each; None is null."""
    if method == "pretrained":
        lr_name, step = "", 0
    shared = {"analysis": analysis, "metric": metric, "method": method, "lr_name": lr_name, "lr": RATES[lr_name]}
    shared |= {"step": step, "part": part, "condition": "", "subset": "all", "strength": None} | labels
    layered = [(None, values)] if np.ndim(values) == 1 else list(enumerate(values))
    return [shared | {"layer": layer, "seed": s, "value": v} for layer, vs in layered for s, v in enumerate(vs)]


def gaps(values, **labels):
    return series("clusters", "relative_gap", values, part="response", **labels)


def gains(values, **labels):
    return series("input_space", "gain", values, part="up", **labels)


def norms(values, **labels):
    return series("sensitivity", "gradient_norm", values, **labels)


def table(metric, condition, values, **labels):
    return series("evaluate", metric, values, condition=condition, **labels)


def rated(method, point, values, condition="unsafe", metric="complied", analysis="evaluate", **labels):
    """Rows of a model of one lane, whose point is free text."""
    rows = series(analysis, metric, values, method=method, lr_name="", condition=condition, **labels)
    return [row | {"lr_name": point, "lr": 1e-3} for row in rows]


def applied(part, values, strength=None, condition="unsafe", metric="refused", **labels):
    return series("interventions", metric, values, part=part, strength=strength, condition=condition, **labels)


def taus(condition, values, subset="all", **labels):
    return series("clusters", "relative_tau", values, part="response", condition=condition, subset=subset, **labels)


def judged(claims, name, rows, **given):
    """The judgement of one of some claims, which are judged together."""
    found = judging.judge(evidence.gather(rows, **given), claims).judgements
    return next(one for one in found if one.claim.name == name)


def textbook():
    """A run in which every statement is true: three methods at two rates, four seeds, three layers, a little noise."""
    rng = np.random.default_rng(0)

    def noisy(*values):
        values = np.array(values)[:, None] + rng.normal(0, 0.002, (len(values), len(SEEDS)))
        return values.tolist()

    def one(value):
        return noisy(value)[0]

    rows = []
    powers = [("pretrained", "", 0.0)]
    powers += [
        (m, r, p * s)
        for m, p in (("sft", 1), ("dpo", 1.5), ("unlearn", 1.6))
        for r, s in (("eta_M", 1), ("eta_S", 0.5))
    ]
    for method, lr_name, power in powers:
        model = {"method": method, "lr_name": lr_name}
        rows += gaps(noisy(*(0.1 + 0.1 * power * (layer + 1) for layer in range(3))), **model)
        shares = noisy(*[0.2 + 0.1 * power] * 3)
        rows += series("clusters", "leading_share", shares, part="response", condition="unsafe", **model)
        rows += norms(one(1 + power), condition="safe", **model) + norms(
            one(1 / (1 + power)), condition="unsafe", **model
        )
        rows += table("refused", "unsafe", one(0.3 * power), **model)
        for name, rate in zip(JAILBREAKS, (0.4, 0.8, 0.6), strict=True):
            rows += table("complied", name, one(rate - 0.1 * power), **model)
        if power:
            rows += _textbook_of_tuned(model, power, noisy, one)
    for first, second, cosine in (("sft", "dpo", 0.2), ("sft", "unlearn", 0.3), ("dpo", "unlearn", 0.8)):
        rows += series("alignment", "cosine", one(cosine), part=f"{first}~{second}", method=first)
    return rows


def _textbook_of_tuned(model, power, noisy, one):
    rows = taus("unsafe", noisy(*[-0.3] * 3), **model)
    for name, gain in (("safe", 0.1), ("unsafe", 0.5)):
        rows += gains(noisy(*[gain * power] * 3), condition=name, **model)
    for name in JAILBREAKS:
        rows += taus(name, noisy(*[-0.1] * 3), **model) + norms(one(1.0), condition=name, **model)
        rows += gains(noisy(*[0.4 * power] * 3), condition=name, **model)
        rows += taus(name, noisy(*[0.2] * 3), **SUCCESSFUL, **model)
        rows += series("verdicts", "n_successful", [64.0] * len(SEEDS), condition=name, **model)
        rows += gains(noisy(*[0.2 * power] * 3), condition=name, **SUCCESSFUL, **model)
        rows += norms(one(1 + power), condition=name, **SUCCESSFUL, **model)
    for part in ("up", "down"):
        rows += series("output_space", "excess", noisy(*[0.1] * 3), part=part, **model)
    for alpha in (0.0, 0.5, 1.0, 1.5):
        rows += applied("whole", noisy(*[power * alpha] * 3), alpha, "", "effect_size", **model)
        rows += applied("whole", one(0.3 * power * alpha), alpha, **model)
        rows += applied("whole", one(0.98), alpha, "safe", "exact_match", **model)
    parts = {"only_null": 0.8, "only_random": 0.3, "only_range": 0.2, "all_but_null": 0.2, "all_but_random": 0.7}
    for part, rate in (parts | {"mlp": 0.9, "attention": 0.1}).items():
        rows += applied(part, one(rate), **model)
    for rank, strength in enumerate((10.0, 20.0, 80.0)):
        tau = noisy(*[-0.3 + 0.1 * rank] * 3)
        rows += series(
            "soft_tokens", "relative_tau", tau, part="tokens", strength=strength, condition="unsafe", **model
        )
    return rows
