"""Rows of every analysis as a run would write them, made up: smooth in layer, step and strength, seeds that differ.

``Shape`` sets the size. The numbers tell the paper's story roughly, so that a figure of them can be judged by eye.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

ETA = {"eta_M": 1e-3, "eta_S": 1e-4}
CONDITIONS = ("safe", "unsafe", "jb_co_task", "jb_co_text", "jb_misgen", "ood")
STRONG = {"sft": 0.6, "dpo": 0.9, "unlearn": 1.0}
# How near to unsafe a condition looks to the model: 0 like safe, 1 like unsafe.
NEAR = {"safe": 0.0, "unsafe": 1.0, "jb_co_task": 0.7, "jb_co_text": 0.15, "jb_misgen": 0.4, "ood": 0.8}
PARTS = ("mlp_matrices", "only_null", "all_but_null", "only_range", "all_but_range", "only_random", "all_but_random")


@dataclass(frozen=True)
class Shape:
    """How much there is: every field may be cut down for a fast test."""

    methods: tuple[str, ...] = ("sft", "dpo", "unlearn")
    rates: tuple[str, ...] = ("eta_M", "eta_S")
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    layers: int = 4
    steps: tuple[int, ...] = (0, 10, 40, 150, 600)
    conditions: tuple[str, ...] = CONDITIONS
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


class _Rows:
    """Collects the rows of one lane."""

    def __init__(self, rng, **lane):
        self.rng, self.lane, self.rows = rng, lane, []

    def add(self, analysis, metric, value, *, noise=0.0, share=False, **labels):
        value = value + noise * self.rng.standard_normal()
        value = min(1.0, max(0.0, value)) if share else value
        blank = {"condition": "", "subset": "all", "layer": None, "part": "", "strength": None}
        self.rows.append(
            {"run": "r0", "revision": "abc1234", "device": "cpu", "analysis": analysis}
            | self.lane
            | blank
            | labels
            | {"metric": metric, "value": float(value)}
        )


def analysis_rows(shape=None):
    """Every analysis of every model of ``shape``, rows as mappings."""
    shape = shape or Shape()
    rng = np.random.default_rng(0)
    rows = []
    for seed in shape.seeds:
        lane = _Rows(rng, method="pretrained", lr_name="", lr=1e-3, seed=seed, step=0)
        _observations(lane, shape, power=0.08)
        _soft_tokens(lane, shape, power=0.0)
        rows += lane.rows
        for method, rate, step in itertools.product(shape.methods, shape.rates, shape.steps):
            lane = _Rows(rng, method=method, lr_name=rate, lr=ETA[rate], seed=seed, step=step)
            done = math.log1p(step) / math.log1p(shape.steps[-1])
            power = STRONG[method] * (1.0 if rate == "eta_M" else 0.6) * done
            _observations(lane, shape, power=power)
            if step:
                _updates(lane, shape, power=power, step=step)
            if step == shape.steps[-1]:
                _interventions(lane, shape, power=power)
                _soft_tokens(lane, shape, power=power)
                _prefill(lane, shape, power=power)
            rows += lane.rows
        rows += _alignment(rng, shape, seed)
    return rows


def _observations(lane, shape, *, power):
    for condition, layer in itertools.product(shape.conditions, range(shape.layers)):
        depth = (layer + 1) / shape.layers
        side = 1 - 2 * NEAR[condition]
        for part, subset in itertools.product(("last", "response"), ("all", "successful")):
            if subset == "successful" and condition == "safe":
                continue
            shift = 0.15 if subset == "successful" else 0.0
            tau = (0.05 + power * depth) * side * (0.7 if part == "last" else 1.0) + shift * power
            labels = {"condition": condition, "layer": layer, "part": part, "subset": subset}
            lane.add("clusters", "relative_tau", tau, noise=0.04, **labels)
            lane.add("clusters", "tau", 40 * tau, noise=1.0, **labels)
    for layer, part in itertools.product(range(shape.layers), ("last", "response")):
        gap = 0.05 + power * (layer + 1) / shape.layers
        lane.add("clusters", "relative_gap", gap, noise=0.03, layer=layer, part=part)
        lane.add("clusters", "effect_size", 6 * gap, noise=0.3, layer=layer, part=part)
        for condition in ("safe", "unsafe"):
            share = 0.1 + 0.5 * power * NEAR[condition] * (layer + 1) / shape.layers
            labels = {"condition": condition, "layer": layer, "part": part}
            lane.add("clusters", "leading_share", share, noise=0.02, share=True, **labels)
    for condition, subset in itertools.product(shape.conditions, ("all", "successful")):
        if subset == "successful" and condition == "safe":
            continue
        norm = 10 ** (0.3 + 0.5 * power * (0.5 - NEAR[condition] * (0.8 if subset == "successful" else 1)))
        labels = {"condition": condition, "subset": subset}
        lane.add("sensitivity", "gradient_norm", norm, noise=0.05 * norm, **labels)
        lane.add("sensitivity", "jacobian_norm", 8 * norm, noise=0.4 * norm, **labels)
        if subset == "all" and condition in ("safe", "unsafe"):
            bins = np.linspace(-1.5, 1.5, 25)
            shares = np.exp(-((bins - math.log10(norm)) ** 2) / 0.08)
            for centre, value in zip(bins, shares / shares.sum(), strict=True):
                lane.add("sensitivity", "histogram", value, noise=0.01, share=True, strength=float(centre), **labels)
    for condition in shape.conditions:
        refused = power * NEAR[condition]
        rates = {"complied": 1 - refused, "refused": refused, "other": 0.0, "exact_match": 1 - refused}
        for metric, value in rates.items():
            lane.add("verdicts", metric, value, noise=0.02, share=True, condition=condition)
    _uncertainty(lane, shape, power=power)
    for condition, part in itertools.product(shape.conditions[1:], ("plain", "own")):
        for layer in range(shape.layers):
            value = 0.6 + 0.1 * layer + 0.05 * (part == "own")
            lane.add("probe", "auc", value, noise=0.02, share=True, condition=condition, part=part, layer=layer)


def _uncertainty(lane, shape, *, power):
    for condition, (part, harm) in itertools.product(
        shape.conditions, {"true": 0.02, "false": 0.15, "random": 0.08}.items()
    ):
        lost, labels = harm * (1 + power) + 0.4 * power * NEAR[condition], {"condition": condition, "part": part}
        for metric, value in {"accuracy": 1 - lost, "probability": 0.97 - lost}.items():
            lane.add("uncertainty", metric, value, noise=0.01, share=True, **labels)
        for metric, value in {"entropy": 2 * lost, "perplexity": math.exp(2 * lost)}.items():
            lane.add("uncertainty", metric, value, noise=0.02, **labels)


def _updates(lane, shape, *, power, step):
    for part, layer in itertools.product(("up", "down"), range(shape.layers)):
        labels = {"part": part, "layer": layer}
        baseline = 0.82 if part == "up" else 0.6
        excess = 0.12 * power - 0.03 * layer / shape.layers
        lane.add("output_space", "baseline_norm", baseline, **labels)
        lane.add("output_space", "excess", excess, noise=0.015, **labels)
        lane.add("output_space", "null_norm_mean", baseline + excess, noise=0.015, **labels)
        for index in range(4 + 2 * layer + lane.lane["seed"] % 2):
            value = baseline + excess + 0.1 * math.tanh(1 - index / 3)
            lane.add("output_space", "null_norm", value, noise=0.02, share=True, strength=float(index), **labels)
        for condition, subset in itertools.product(shape.conditions, ("all", "successful")):
            if subset == "successful" and condition == "safe":
                continue
            gain = (0.02 + 0.2 * power) * (0.2 + NEAR[condition] * (0.7 if subset == "successful" else 1.0))
            gain *= 1 + layer / shape.layers
            shown = {**labels, "condition": condition, "subset": subset}
            lane.add("input_space", "gain", gain, noise=0.05 * gain, **shown)
            lane.add("input_space", "ratio", 0.4 * gain, noise=0.02 * gain, **shown)
            for index in range(8 if subset == "all" else 0):
                value = gain * 0.6**index
                lane.add("input_space", "projection", value, noise=0.1 * value, strength=float(index), **shown)
    for part, share in itertools.product(("up", "down"), (1 / 16, 1 / 8, 1 / 4, 1 / 2)):
        for space, bent in (("reads", 0.8), ("writes", 1.2), ("unsafe", 0.4), ("safe", 0.6)):
            labels = {"part": f"{part}:{space}", "strength": share}
            lane.add("kept_energy", "kept_mean", share**bent, noise=0.02, share=True, **labels)
            lane.add("kept_energy", "chance", share, **labels)
        for (wanted, side), bent in zip(
            itertools.product(("safe", "unsafe"), ("reads", "writes")), (0.6, 0.5, 0.5, 0.3), strict=True
        ):
            labels = {"part": f"{part}:{wanted}:{side}", "strength": share}
            lane.add("gradient_spaces", "kept_mean", share**bent, noise=0.02, share=True, **labels)
            lane.add("gradient_spaces", "chance", share, **labels)
    for part, below in itertools.product(("up", "down"), (0.5, 0.6, 0.7, 0.8, 0.9)):
        for metric, most in (("intruders_mean", power), ("intruders_random_mean", 0.5)):
            lane.add("intruders", metric, most * below**2, noise=0.02, share=True, part=part, strength=below)
    lane.add("undoing", "undone", 0.3 - 0.3 * power, noise=0.05)
    lane.add("undoing", "relative_norm", 0.5 * power, noise=0.02)
    for part, layer in itertools.product(("up", "down"), range(shape.layers)):
        labels = {"part": part, "layer": layer}
        for side, share in (("inputs", 0.5), ("outputs", 0.4)):
            lane.add("undoing", f"kept_{side}", share, noise=0.03, share=True, **labels)
            lane.add("undoing", f"chance_{side}", 0.2, **labels)
        lane.add("undoing", "null_energy", 0.5, noise=0.03, share=True, **labels)
        lane.add("undoing", "chance_null", 0.6, **labels)


def _rates(lane, analysis, condition, refused, *, good=1.0, **labels):
    rates = {"complied": (1 - refused) * good, "refused": refused, "exact_match": (1 - refused) * good}
    rates["other"] = 1 - rates["complied"] - rates["refused"]
    for metric, value in rates.items():
        lane.add(analysis, metric, value, noise=0.02, share=True, condition=condition, **labels)


def _interventions(lane, shape, *, power):
    others = [f"transfer:{method}" for method in shape.methods if method != lane.lane["method"]]
    scaled = {"whole": 1.0, "mlp": 0.8, "up": 0.5, "down": 0.35}
    fixed = dict(zip(PARTS, (0.8, 0.7, 0.2, 0.1, 0.9, 0.4, 0.5), strict=True)) | {"attention": 0.3}
    # Nothing of any part is the pretrained model, which the whole update stands for.
    done = [(part, a, scale * a) for part, scale in scaled.items() for a in shape.alphas if a or part == "whole"]
    done += [(part, alpha, 1 + 0.6 * alpha) for part in others for alpha in (0.5, 1.0)]
    done += [(part, 1.0, scale) for part, scale in fixed.items()]
    done += [("rank", float(rank), 1 - 1 / (1 + rank)) for rank in (1, 2, 4, 8)]
    done += [("layer", float(layer), 0.2 + 0.1 * layer) for layer in range(shape.layers)]
    choices = {"directions_singular": 2, "directions_activations": 1, "directions_random": 8}
    done += [(part, float(k), 0.1 + 0.9 * k / (k + half)) for part, half in choices.items() for k in (0, 1, 4, 16, 64)]
    for (part, strength, scale), condition in itertools.product(done, shape.conditions):
        refused = math.tanh(1.6 * power * scale * NEAR[condition])
        good = 1 - 0.3 * max(0.0, scale - 1.2)
        _rates(lane, "interventions", condition, refused, good=good, part=part, strength=strength)
        labels = {"condition": condition, "part": part, "strength": strength}
        side = 1 - 2 * NEAR[condition]
        for layer in range(shape.layers):
            tau = (0.05 + power * scale * (layer + 1) / shape.layers) * side
            lane.add("interventions", "relative_tau", tau, noise=0.04, layer=layer, **labels)
        if condition in ("safe", "unsafe"):
            norm = 10 ** (0.3 + 0.25 * power * scale * side)
            lane.add("interventions", "gradient_norm", norm, noise=0.05 * norm, **labels)


def _soft_tokens(lane, shape, *, power):
    for count, steps in itertools.product((1, 4, 8), (0, 2, 5, 10)):
        strength = float(count * steps)
        success = 1 - power * math.exp(-strength / 25)
        labels = {"condition": "unsafe", "part": f"count={count}", "strength": float(steps)}
        lane.add("soft_tokens", "complied", success, noise=0.02, share=True, **labels)
        for layer in range(shape.layers):
            depth = (layer + 1) / shape.layers
            lane.add(
                "soft_tokens", "relative_tau", power * depth * (2 * success - 1.3), noise=0.03, layer=layer, **labels
            )
            if power:
                lane.add("soft_tokens", "gain", 0.2 * power * (1.4 - success), noise=0.01, layer=layer, **labels)


def _prefill(lane, shape, *, power):
    for condition, depth in itertools.product(shape.conditions[1:4], (0, 1, 2, 3, 5, 8)):
        refused = power * math.exp(-depth / 2.5) * NEAR[condition]
        _rates(lane, "prefill", condition, refused, good=0.9, strength=float(depth))
    for condition in shape.conditions[1:4]:
        for position in range(10):
            share = 0.5 * power * math.exp(-position / 1.5)
            labels = {"condition": condition, "strength": float(position)}
            lane.add("refusal_depth", "first_refusal", share, noise=0.01, share=True, **labels)
        lane.add("refusal_depth", "never_refuses", 1 - 0.9 * power, noise=0.02, share=True, condition=condition)


def _alignment(rng, shape, seed):
    rows = []
    for a, b in itertools.combinations(shape.methods, 2):
        start = _Rows(rng, method="pretrained", lr_name="", lr=1e-3, seed=seed, step=0)
        start.add("gradients", "gradient_cosine", 0.3, noise=0.05, part=f"{a}~{b}")
        rows += start.rows
        for rate in shape.rates:
            lane = _Rows(rng, method=a, lr_name=rate, lr=ETA[rate], seed=seed, step=shape.steps[-1])
            lane.add("alignment", "cosine", 0.5 if "sft" in (a, b) else 0.7, noise=0.04, part=f"{a}~{b}")
            for matrix, layer in itertools.product(("up", "down"), range(shape.layers)):
                labels = {"part": f"{a}~{b}:{matrix}", "layer": layer}
                lane.add("alignment", "matrix_cosine", 0.4 + 0.05 * layer, noise=0.03, **labels)
                lane.add("alignment", "input_overlap", 0.3 + 0.06 * layer, noise=0.03, **labels)
                lane.add("alignment", "output_overlap", 0.5 + 0.06 * layer, noise=0.03, **labels)
                lane.add("alignment", "input_chance", 0.06 if matrix == "up" else 0.1, **labels)
                lane.add("alignment", "output_chance", 0.1 if matrix == "up" else 0.06, **labels)
            rows += lane.rows
    return rows


def slope_rows(shape=None):
    """The slope of DPO's loss along training, as rows of the learning curves."""
    shape = shape or Shape()
    lane = {"run": "r0", "revision": "abc1234", "device": "cpu", "stage": "tune", "method": "dpo"}
    return [
        lane
        | {"lr_name": rate, "lr": ETA[rate], "seed": seed, "step": step, "condition": "train"}
        | {"metric": "rewards/slope", "value": 0.5 / (1 + step * ETA[rate] * (1 + 0.1 * seed))}
        for rate in shape.rates
        for seed in shape.seeds
        for step in range(50, shape.steps[-1] + 1, 50)
    ]


def killed(rows, dead):
    """The rows as a run writes them in which lanes died in their last steps: of the end, nothing of them is finite.

    Args:
        rows: of the analyses, or of the curves.
        dead: (method, lr_name) to the seeds that died.
    """
    last = max(row["step"] for row in rows)

    def is_dead(row):
        # What is of two models is null where either is dead.
        pair = row.get("part", "").removeprefix("transfer:").partition(":")[0].split("~")
        return any(row["seed"] in dead.get((method, row["lr_name"]), ()) for method in (row["method"], *pair))

    return [row | {"value": None} if row["step"] == last and is_dead(row) else row for row in rows]


def pair_rows(layers=2, parts=("gate", "up", "down", "q"), labels=("safe", "unsafe", "jailbreak:role_play")):
    """Every analysis of two checkpoints that a study has not; what is a mean over prompts with its interval."""
    lanes = {
        method: _Rows(np.random.default_rng(1), method=method, lr_name="", lr=0.0, seed=0, step=0)
        for method in ("pretrained", "tuned")
    }
    for layer, part in itertools.product(range(layers), parts):
        _pair_weights(lanes["tuned"], layer=layer, part=part)
    for (method, lane), layer in itertools.product(lanes.items(), range(layers)):
        apart = (0.1 if method == "pretrained" else 0.6) * (layer + 1) / layers
        lane.add("clusters", "accuracy", 0.5 + apart / 2, layer=layer, part="last")
        lane.add("clusters", "effect_size", 4 * apart, layer=layer, part="last")
        for place, label in enumerate(labels):
            shown = {"layer": layer, "part": "last", "condition": label}
            value = apart * (1, -1, 0.4)[place]
            summary = {"": value, "_low": value - 0.05, "_high": value + 0.05, "_n": 40.0}
            for metric, (ending, number) in itertools.product(("cosine_tau", "relative_tau"), summary.items()):
                lane.add("clusters", metric + ending, number, **shown)
    return [row for lane in lanes.values() for row in lane.rows]


def _pair_weights(lane, *, layer, part):
    labels = {"layer": layer, "part": part}
    for analysis in ("output_space", "input_alignment"):
        sizes = {
            "baseline_norm": 0.6,
            "excess": 0.1,
            "null_norm_mean": 0.7,
            "null_energy": 0.5,
            "baseline_energy": 0.36,
        }
        for metric, value in (sizes | {"rank_delta": 12.0 + layer}).items():
            lane.add(analysis, metric, value, **labels)
        for index in range(8):
            lane.add(analysis, "null_norm", 0.6 + 0.04 * index, strength=float(index), **labels)
    for metric, value in {"stable_rank": 3.0 + layer, "changed_norm": 0.02}.items():
        lane.add("output_space", metric, value, **labels)
    for index in range(40):
        lane.add("spectrum", "value_base", 2.0 / (1 + index), strength=float(index), **labels)
        lane.add("spectrum", "value_delta", 0.1 * 0.8**index, strength=float(index), **labels)
