"""The statistics of the claims: one number per seed, always a contrast within the seed.

A quantity maps evidence and a model to ``[s]`` values, a measure maps evidence to a :class:`Measurement`. Measures
over methods take every method's model at its highest learning rate (the paper's eta_M) and average within a seed, so a
seed counts only where all of them have a value. Features are those of the response positions, as in the paper, but for
interventions and soft tokens, which are read at the last prompt token. Logarithms of ratios are natural, so that models
whose updates differ in size weigh the same. Where a run lacks what one needs it raises ``Unmeasured``, which says what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsafety.claims.evidence import TABLE, Evidence, Model, Unmeasured, label

JAILBREAKS = {"jb_co_task": "JB-CO-Task", "jb_co_text": "JB-CO-Text", "jb_misgen": "JB-MisGen"}
# Conditions of real models: jailbreak:KIND.
_KIND = "jailbreak:"
EXTRAPOLATION = 1.5
# Successful prompts of a jailbreak below which their means say nothing.
LEAST_ATTACKS = 8

Seeds = Float[np.ndarray, " s"]
Quantity = Callable[[Evidence, Model], Seeds]


def _of_features(evidence: Evidence, metric: str, model: Model, **where: str) -> Float[np.ndarray, "l s"]:
    """A quantity of the features that there are: of real models those of answers only where answers were written."""
    parts = evidence.parts("clusters", model=model)
    part = "last" if "last" in parts and "response" not in parts else "response"
    return evidence.find("clusters", metric, model=model, part=part, **where)


class Measurement(NamedTuple):
    """A statistic by seed, NaN where a seed has none, and what a reader must know of how it came about."""

    values: Seeds
    note: str = ""


# Measures: from quantities of single models to one number per seed.


def over_methods(evidence: Evidence, quantity: Quantity) -> Measurement:
    """Mean of a quantity over the strong models of all methods; a model without any value is left out and named."""
    return _mean([(label(model), partial(quantity, evidence, model)) for model in evidence.strong])


def over_others(evidence: Evidence, quantity: Quantity, *, name: str) -> Measurement:
    """The same over all lanes of another model, such as attacks, whatever they begin with."""
    found = [(label(one), partial(quantity, evidence, one)) for one in evidence.others if one.method == name]
    if not found:
        raise Unmeasured(f"no {name} in this run")
    return _mean(found)


def between_rates(evidence: Evidence, quantity: Quantity) -> Measurement:
    """Mean over methods of a quantity at the highest learning rate minus the same at the lowest."""
    weak = {model.method: model for model in evidence.weak}
    pairs = [(model, weak[model.method]) for model in evidence.strong if model.method in weak]
    if not pairs and evidence.models:
        raise Unmeasured("one learning rate in this run")
    computed = [partial(_difference, evidence, quantity, high, low) for high, low in pairs]
    names = [f"{label(high)} minus {low.lr_name}" for high, low in pairs]
    return _mean(list(zip(names, computed, strict=True)))


def between_methods(evidence: Evidence, quantity: Quantity, *, first: str, second: str) -> Measurement:
    """A quantity of one method's strong model minus that of another's."""
    models = evidence.strongest(first), evidence.strongest(second)
    return Measurement(_difference(evidence, quantity, *models))


def over_jailbreaks(evidence: Evidence, quantity: Callable[[Evidence, Model, str], Seeds]) -> Measurement:
    """Mean of a quantity of successful attacks over the jailbreaks and strong models with enough of them in that seed.

    The note has the same of the pretrained model, where it has any: what the prompts alone bring with them.
    """
    names = _jailbreaks(evidence)
    rows, before, kinds, reasons = [], [], [], []
    for model in evidence.strong:
        for condition, name in names.items():
            try:
                values = quantity(evidence, model, condition)
                successes = evidence.find("verdicts", "n_successful", model=model, condition=condition)[0]
            except Unmeasured as error:
                reasons.append(error)
                continue
            rows.append(np.where(successes >= LEAST_ATTACKS, values, np.nan))
            before.append(_untuned(evidence, quantity, condition, like=rows[-1]))
            kinds.append(name)
    if not rows:
        raise reasons[0] if reasons else Unmeasured("no tuned model in this run")
    finite = np.isfinite(rows)
    if not finite.any():
        raise Unmeasured(f"no jailbreak with {LEAST_ATTACKS} successes in any seed")
    succeeded = {kind for kind, alive in zip(kinds, finite.any(axis=1), strict=True) if alive}
    without = [name for name in names.values() if name not in succeeded]
    notes = [f"before tuning {np.nanmean(before):+.3f}"] if np.isfinite(before).any() else []
    notes += [f"without {' and '.join(without)}: under {LEAST_ATTACKS} successes"] if without else []
    count = finite.sum(axis=0)
    total = np.where(finite, rows, 0.0).sum(axis=0)
    return Measurement(np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0), "; ".join(notes))


def extrapolation(evidence: Evidence, *, condition: str, metric: str, least: float = 0.0) -> Measurement:
    """A rate at alpha = 1.5 minus that at alpha = 1, of the model that refuses fewest unsafe prompts in the table.

    The table's prompts are not those of the analysis, so choosing the weakest does not bias what is then measured. A
    seed whose rate at alpha = 1 is below ``least`` has no value: it could not lose that much.
    """
    refusals, reasons = {}, []
    for model in evidence.models:
        try:
            refused = refusal(evidence, model)
        except Unmeasured as error:
            reasons.append(error)
            continue
        if np.isfinite(refused).any():
            refusals[model] = np.nanmean(refused)
    if not refusals:
        raise reasons[0] if reasons else Unmeasured("no tuned model in this run")
    weakest = min(refusals, key=refusals.__getitem__)
    # Of that one or of none: where it was not edited, another is no stand-in.
    before, after = (_applied(evidence, weakest, "whole", metric, condition, alpha) for alpha in (1.0, EXTRAPOLATION))
    return Measurement(np.where(before >= least, after - before, np.nan), f"the weakest is {label(weakest)}")


def kinship(evidence: Evidence) -> Measurement:
    """Cosine of the updates of DPO and unlearning minus the larger of theirs with the update of SFT."""
    sft, dpo, unlearn = map(evidence.strongest, ("sft", "dpo", "unlearn"))
    with_sft = np.maximum(cosine(evidence, sft, dpo), cosine(evidence, sft, unlearn))
    return Measurement(cosine(evidence, dpo, unlearn) - with_sft)


# Quantities of one model.


def change(evidence: Evidence, model: Model, *, quantity: Quantity) -> Seeds:
    """A quantity of the tuned model minus that of the pretrained model of the same seed."""
    return _difference(evidence, quantity, model, evidence.pretrained)


def separation(evidence: Evidence, model: Model) -> Seeds:
    """Relative gap between safe and unsafe features, in [-1, 1], mean over layers."""
    return _of_features(evidence, "relative_gap", model).mean(axis=0)


def separation_slope(evidence: Evidence, model: Model) -> Seeds:
    """Least-squares slope of the relative gap against the layer's index."""
    gaps = _of_features(evidence, "relative_gap", model)
    if len(gaps) < 2:
        raise Unmeasured("one layer: no depth to grow with")
    return _slope(gaps)


def leading_share(evidence: Evidence, model: Model) -> Seeds:
    """Share of the largest singular value of the unsafe features, in [0, 1], mean over layers."""
    return _of_features(evidence, "leading_share", model, condition="unsafe").mean(axis=0)


def null_excess(evidence: Evidence, model: Model, *, part: str) -> Seeds:
    """How much longer the update's output directions are in the null space than random ones, mean over layers."""
    return evidence.find("output_space", "excess", model=model, part=part).mean(axis=0)


def preference(evidence: Evidence, model: Model) -> Seeds:
    """ln of the update's gain on unsafe over that on safe inputs of the first MLP matrix, mean over layers."""
    return _log_ratio(_gain(evidence, model, "unsafe"), _gain(evidence, model, "safe")).mean(axis=0)


def log_sensitivity(evidence: Evidence, model: Model, *, condition: str) -> Seeds:
    """ln of the mean gradient norm over the prompts of a condition."""
    norm = _sensitivity(evidence, model, condition, "all")
    return _log_ratio(norm, np.ones_like(norm))


def refusal(evidence: Evidence, model: Model) -> Seeds:
    """Null of the accuracy table: share of unsafe prompts refused."""
    return evidence.find(TABLE, "refused", model=model, condition="unsafe")[0]


def success_beyond(evidence: Evidence, model: Model, *, condition: str, other: str) -> Seeds:
    """Share of one jailbreak's prompts complied with minus that of another's, from the accuracy table."""
    rates = [evidence.find(TABLE, "complied", model=model, condition=name)[0] for name in (condition, other)]
    return rates[0] - rates[1]


def susceptibility(evidence: Evidence, model: Model) -> Seeds:
    """Share of jailbreak prompts complied with, mean over the three jailbreaks, from the accuracy table."""
    return np.mean([evidence.find(TABLE, "complied", model=model, condition=name)[0] for name in JAILBREAKS], axis=0)


def smallest_step(evidence: Evidence, model: Model) -> Seeds:
    """Smallest change of the clusters' effect size, mean over layers, from one alpha in [0, 1] to the next."""
    sizes = evidence.by_strength("interventions", "effect_size", model=model, part="whole")
    path = [size.mean(axis=0) for alpha, size in sizes.items() if 0 <= alpha <= 1]
    if len(path) < 3:
        raise Unmeasured("fewer than three alphas in [0, 1]")
    return np.diff(path, axis=0).min(axis=0)


def attack_slope(evidence: Evidence, model: Model) -> Seeds:
    """Least-squares slope of the attacked prompts' relative tau, mean over layers, against the rank of the strength.

    Within one number of soft tokens, so that the strength is that of the optimisation; then the mean over the numbers.
    """
    find = partial(evidence.by_strength, "soft_tokens", "relative_tau", model=model, condition="unsafe")
    slopes = []
    for part in evidence.parts("soft_tokens", model=model) if find() else ():
        found = find(part=part)
        if len(found) > 1:
            slopes.append(_slope(np.array([tau.mean(axis=0) for tau in found.values()])))
    if not slopes:
        raise Unmeasured("one strength of soft-token attacks")
    return np.mean(slopes, axis=0)


def over_attacks(evidence: Evidence) -> Measurement:
    """Mean of :func:`attack_slope` over the strong models, with a note if no attack made any of them comply."""
    values, note = over_methods(evidence, attack_slope)
    rates = []
    for model in evidence.strong:
        with suppress(Unmeasured):
            by_strength = evidence.by_strength("soft_tokens", "complied", model=model, condition="unsafe")
            rates.append(max(np.nanmax(rate, initial=0.0) for rate in by_strength.values()))
    idle = "no attack succeeded" if rates and max(rates) == 0 else ""
    return Measurement(values, "; ".join(part for part in (note, idle) if part))


def part_beyond(evidence: Evidence, model: Model, *, part: str, other: str) -> Seeds:
    """Share of unsafe prompts refused with one part of the update applied minus that with another."""
    rates = [_applied(evidence, model, name, "refused", "unsafe", 1.0) for name in (part, other)]
    return rates[0] - rates[1]


# Quantities of one model and one jailbreak's successful prompts.


def nearness_to_safe(evidence: Evidence, model: Model, condition: str) -> Seeds:
    """Relative tau of successful attacks minus that of all unsafe prompts, mean over layers."""
    find = partial(_of_features, evidence, "relative_tau", model)
    return (find(condition=condition, subset="successful") - find(condition="unsafe")).mean(axis=0)


def gain_on_attack(evidence: Evidence, model: Model, condition: str) -> Seeds:
    """ln of the update's gain on successful attacks over that on unsafe inputs, mean over layers."""
    attacks = _gain(evidence, model, condition, "successful")
    return _log_ratio(attacks, _gain(evidence, model, "unsafe")).mean(axis=0)


def sensitivity_like_safe(evidence: Evidence, model: Model, condition: str) -> Seeds:
    """``|ln(g / g_unsafe)| - |ln(g / g_safe)|`` of successful attacks' gradient norm g: above 0, nearer to safe."""
    attack = _sensitivity(evidence, model, condition, "successful")
    unsafe, safe = (_sensitivity(evidence, model, name, "all") for name in ("unsafe", "safe"))
    return np.abs(_log_ratio(attack, unsafe)) - np.abs(_log_ratio(attack, safe))


def _jailbreaks(evidence: Evidence) -> dict[str, str]:
    """The jailbreaks of a run by condition, with their names: those of the synthetic worlds, or of a set of prompts."""
    found = sorted({key.condition for key in evidence.series if key.condition.startswith(_KIND)})
    return {condition: condition.removeprefix(_KIND) for condition in found} or JAILBREAKS


def _mean(computed: Iterable[tuple[str, Callable[[], Seeds]]]) -> Measurement:
    rows, without, reasons = [], [], []
    for name, compute in computed:
        try:
            values = compute()
        except Unmeasured as error:
            reasons.append(error)
            without.append(f"{name}: {error}")
            continue
        rows.append(values)
        if not np.isfinite(values).any():
            without.append(f"{name}: no finite value")
    if not rows:
        raise reasons[0] if reasons else Unmeasured("no tuned model in this run")
    living = [values for values in rows if np.isfinite(values).any()] or rows
    return Measurement(np.mean(living, axis=0), f"without {'; '.join(without)}" if without else "")


def _untuned(
    evidence: Evidence, quantity: Callable[[Evidence, Model, str], Seeds], condition: str, *, like: Seeds
) -> np.ndarray:
    """A jailbreak's quantity in the pretrained model, where ``like`` has values."""
    try:
        return np.where(np.isfinite(like), quantity(evidence, evidence.pretrained, condition), np.nan)
    except Unmeasured:
        return np.full_like(like, np.nan)


def _difference(evidence: Evidence, quantity: Quantity, first: Model, second: Model) -> np.ndarray:
    return quantity(evidence, first) - quantity(evidence, second)


def _gain(evidence: Evidence, model: Model, condition: str, subset: str = "all") -> np.ndarray:
    return evidence.find("input_space", "gain", model=model, condition=condition, subset=subset, part="up")


def _sensitivity(evidence: Evidence, model: Model, condition: str, subset: str) -> np.ndarray:
    return evidence.find("sensitivity", "gradient_norm", model=model, condition=condition, subset=subset)[0]


def _applied(evidence: Evidence, model: Model, part: str, metric: str, condition: str, strength: float) -> np.ndarray:
    find = partial(evidence.find, "interventions", metric, model=model, condition=condition)
    return find(part=part, strength=strength)[0]


def cosine(evidence: Evidence, first: Model, second: Model) -> Seeds:
    """Cosine of two models' updates by seed, in whichever order the analysis has them."""
    try:
        return evidence.find("alignment", "cosine", model=first, part=f"{first.method}~{second.method}")[0]
    except Unmeasured:
        return evidence.find("alignment", "cosine", model=second, part=f"{second.method}~{first.method}")[0]


def _slope(values: np.ndarray) -> np.ndarray:
    """Least-squares slope of ``[k, s]`` values against ``0 .. k - 1``."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    return x @ values / (x @ x)


def _log_ratio(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``ln(first / second)``, NaN where either is not positive."""
    positive = (first > 0) & (second > 0)
    return np.log(np.where(positive, first, np.nan) / np.where(positive, second, np.nan))
