"""What tells beforehand which defences are undone, of made-up defences of which it is known."""

import numpy as np
import polars as pl
import pytest

from experiments import resistance
from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.schema import EvaluateConfig, Recipe
from jaxsafety.report import sections
from jaxsafety.rundir import results

SEEDS, DEFENCES = (0, 1, 2), 16


@pytest.fixture(scope="module")
def recipe():
    tuned = {"from": "pretrained", "method": "sft", "steps": 2, "role": "defence"}
    return Recipe(
        subject={"world": "tiny"}, seeds=SEEDS, attacks={}, edits={}, analyses={},
        models={"pretrained": {"method": "pretrain", "data": {"pool": "text"}, "steps": 2},
                "sft": tuned | {"lr": [round(1e-3 * (i + 1), 4) for i in range(DEFENCES)]},
                "worst_tuned": {"from": "sft", "edit": "scaled", "alpha": 0.5, "role": "attack"}},
        evaluate=EvaluateConfig(conditions=("safe", "unsafe")),
    )  # fmt: skip


@pytest.fixture
def run(recipe, monkeypatch, tmp_path):
    """Defences of which the separation tells the outcome, whatever they complied with before."""
    rng = np.random.default_rng(0)
    evaluated, analysed = [], []
    for lane in (one for one in recipe.lanes if one.label == "sft"):
        gap, before = rng.uniform(size=2)
        noise = rng.normal(size=4)
        attacked = {"method": "worst_tuned", "lr_name": f"from={lane.name}"}
        for seed in SEEDS:
            same = {"run": "", "revision": "", "device": "", "lr": lane.lr, "seed": seed, "step": 2}
            own = same | {"method": "sft", "lr_name": lane.point}
            for label, condition, metric, value in (
                (own, "safe", "exact_match", 1.0), (own, "unsafe", "complied", 0.1 * before),
                (same | attacked, "unsafe", "complied", min(1, max(0, 0.9 - 0.6 * gap + 0.05 * before))),
            ):  # fmt: skip
                evaluated.append(
                    label | {"stage": "evaluate", "condition": condition, "metric": metric, "value": value}
                )
            blank = {"condition": "", "subset": "all", "part": "", "strength": None}
            measured = (
                ("clusters", "relative_gap", gap, {"part": "last"}), ("output_space", "changed_norm", noise[0], {}),
                ("output_space", "excess_energy", noise[1], {}), ("output_space", "stable_rank", noise[2], {}),
                ("sensitivity", "gradient_norm_log", noise[3], {"condition": "unsafe"}),
            )  # fmt: skip
            for layer in (0, 1):
                analysed += [
                    own | blank | {"analysis": name, "metric": metric, "layer": layer, "value": value} | labels
                    for name, metric, value, labels in measured
                ]
    frames = {
        "analyze": pl.DataFrame(analysed, schema=results.ANALYSIS_SCHEMA),
        "evaluate": pl.DataFrame(evaluated, schema=results.SCHEMA),
    }
    monkeypatch.setattr(sections, "read", lambda run: frames)
    monkeypatch.setattr(yaml_file, "recorded", lambda run: recipe)
    return tmp_path


def test_defences_are_the_units_and_seeds_and_layers_means(run):
    found = resistance.measured(run)
    assert found.height == DEFENCES and found["defence"][0] == "sft.lr=0.001"
    # Nothing was measured under noise.
    assert found["compliance under noise"].is_nan().all()
    gap = found["separation of safe and unsafe"]
    np.testing.assert_allclose(found["outcome"], 0.9 - 0.6 * gap + 0.5 * found["compliance before"], rtol=1e-9)


def test_what_tells_the_outcome_is_found_and_nothing_else(run):
    table = resistance.table(run)
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    told = {name: "| yes |" in line for name, line in lines.items()}
    assert [name for name, yes in told.items() if yes] == ["separation of safe and unsafe"]
    assert "Correlations of 0.68 and 0.72 would have been seen" in table
    assert "compliance under noise" not in table


def test_a_run_without_a_matrix_is_one_sentence(mini_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(yaml_file, "recorded", lambda run: mini_recipe)
    with pytest.raises(ValueError, match=r"has no matrix: expected a study of defences and attacks$"):
        resistance.measured(tmp_path)
