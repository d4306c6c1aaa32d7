"""The evaluation stage: every model on every condition, dead lanes as null, curves and examples."""

import dataclasses
import json
import shutil
import signal
from functools import partial

import jax
import numpy as np
import polars as pl
import pytest

from jaxsafety import keys
from jaxsafety.rundir import metrics_file, results, signals
from jaxsafety.study import evaluate, lanes, pipeline

# float32 means of eight prompts.
RTOL = 1e-6
METRICS = {
    "complied", "refused", "other", "exact_match", "exact_match_block1", "exact_match_block2",
    "token_accuracy_block1", "token_accuracy_block2", "refusal_token_accuracy",
}  # fmt: skip
MODELS = [("pretrained", "")] + [(method, lr) for method in ("sft", "dpo") for lr in ("eta_M", "eta_S")]


@pytest.fixture(scope="module")
def ready(mini_recipe, finished_run):
    return pipeline.prepare(mini_recipe, finished_run)


@pytest.fixture(scope="module")
def models(ready):
    return evaluate.gather(ready)


def read(finished_run, name):
    return results.read_results([finished_run / "results" / f"{name}.parquet"])


def test_every_model_seed_condition_and_metric_has_one_row(finished_run, mini_recipe):
    rows = read(finished_run, "evaluate").to_dicts()
    labels = [(r["method"], r["lr_name"], r["seed"], r["condition"], r["metric"]) for r in rows]
    assert len(set(labels)) == len(labels)
    assert set(labels) == {
        (*model, seed, condition, metric)
        for model in MODELS
        for seed in mini_recipe.seeds
        for condition in mini_recipe.evaluate.conditions
        for metric in METRICS
    }
    assert all(row["stage"] == "evaluate" and row["step"] == 6 and 0 <= row["value"] <= 1 for row in rows)
    assert {(row["lr_name"], row["lr"]) for row in rows} == {("", 1e-3), ("eta_M", 1e-3), ("eta_S", 1e-4)}


def test_verdicts_sum_to_one(finished_run):
    verdicts = read(finished_run, "evaluate").filter(pl.col("metric").is_in(["complied", "refused", "other"]))
    sums = verdicts.group_by("method", "lr_name", "seed", "condition").agg(pl.col("value").sum())
    assert len(sums) == len(MODELS) * 2 * 2
    np.testing.assert_allclose(sums["value"], 1.0)


def test_all_models_are_stacked_in_the_order_of_their_labels(ready, models):
    assert [label[:2] for label in models.labels] == MODELS
    assert models.finite.shape == (5, 2) and models.finite.all()
    dpo = pipeline.load(ready, ready.recipe.lanes_of("dpo"))
    np.testing.assert_array_equal(np.asarray(models.params["embed"])[3:], dpo.params["embed"])


def test_those_alone_are_judged_that_the_recipe_names(models, mini_recipe):
    assert evaluate.named(models, ()) is models
    some = evaluate.named(models, ("sft.eta_S", "dpo"))
    assert [label[:2] for label in some.labels] == [("sft", "eta_S"), ("dpo", "eta_M"), ("dpo", "eta_S")]
    assert some.finite.shape == (3, 2)
    np.testing.assert_array_equal(some.params["embed"], np.asarray(models.params["embed"])[2:])
    with pytest.raises(
        ValueError, match=r"^unknown model or lane in evaluate\.on 'sftt': expected one of pretrained, sf"
    ):
        dataclasses.replace(mini_recipe, evaluate=dataclasses.replace(mini_recipe.evaluate, on=("sftt",)))


def test_a_row_is_the_rate_of_that_model_on_its_seeds_own_prompts(ready, models, finished_run, mini_recipe):
    h, s, seed = 3, 1, mini_recipe.seeds[1]
    params = jax.tree.map(lambda leaf: leaf[h, s], models.params)
    draw = partial(lanes.prompts, ready.subject, mini_recipe.evaluate, condition="unsafe", late_probability=0.1)
    trials = jax.jit(lambda key: draw(key=keys.stream(key, "evaluate")))(keys.root(seed))
    rates = jax.jit(partial(lanes.evaluate, ready.subject))(params, trials)
    rows = read(finished_run, "evaluate").filter(method="dpo", lr_name="eta_M", seed=seed, condition="unsafe")
    found = dict(rows.select("metric", "value").iter_rows())
    assert found.keys() == rates.keys()
    np.testing.assert_allclose([found[name] for name in rates], list(rates.values()), rtol=RTOL)


def test_a_dead_lane_is_null_and_the_others_are_not(ready, models):
    finite = models.finite.copy()
    finite[2, 1] = False
    rows = list(evaluate.judge_all(ready, models._replace(finite=finite)))
    dead = [row for row in rows if row["value"] is None]
    assert {(row["method"], row["lr_name"], row["seed"]) for row in dead} == {("sft", "eta_S", 5)}
    assert len(dead) == len(METRICS) * 2


def test_curves_are_the_metrics_by_condition(finished_run):
    rows = read(finished_run, "curves").to_dicts()
    logged = metrics_file.read_metrics(finished_run)
    labels = {"stage", "method", "lr_name", "lr", "seed", "step"}
    assert len(rows) == sum(len(row.keys() - labels) for row in logged)
    found = {(r["method"], r["lr_name"], r["seed"], r["step"], r["condition"], r["metric"]): r["value"] for r in rows}
    row = next(row for row in logged if row["method"] == "dpo" and row["step"] == 4)
    where = (row["method"], row["lr_name"], row["seed"], row["step"])
    assert found[(*where, "train", "rewards/margins")] == row["rewards/margins"]
    assert found[(*where, "unsafe", "refused")] == row["unsafe/refused"]


def test_examples_show_every_models_answer_in_words(finished_run, ready):
    examples = json.loads((finished_run / "results" / "examples.json").read_text())
    assert [example["condition"] for example in examples] == ["safe", "unsafe"]
    for example in examples:
        assert [answer["model"] for answer in example["answers"]] == [" ".join(filter(None, model)) for model in MODELS]
        length = len(example["expected"].split())
        for answer in example["answers"]:
            tokens = answer["answer"].split()
            assert len(tokens) == length and set(tokens) <= set(ready.subject.source.spec.tokens)
            assert answer["verdict"] in ("complied", "refused", "other")


@pytest.fixture
def unevaluated(ready, finished_run, tmp_path):
    """A copy of the finished run without its results."""
    directory = shutil.copytree(finished_run, tmp_path / "mini", ignore=shutil.ignore_patterns("results"))
    return dataclasses.replace(ready, directory=directory)


def test_a_signal_ends_the_stage_after_the_file_that_it_came_in(unevaluated, monkeypatch):
    made = []

    def examples(*_):
        made.append("examples")
        signal.raise_signal(signal.SIGTERM)
        return []

    def judged(*_):
        made.append("evaluate")
        return iter(())

    monkeypatch.setattr(evaluate, "example_answers", examples)
    monkeypatch.setattr(evaluate, "judge_all", judged)
    with pytest.raises(signals.Stopped, match=r"before evaluate\.parquet"), signals.deferred(lambda _: None):
        evaluate.write(unevaluated)
    assert not pipeline.is_finished(unevaluated, "evaluate")
    evaluate.write(unevaluated)
    assert made == ["examples", "evaluate"] and pipeline.is_finished(unevaluated, "evaluate")


def test_curves_stand_in_the_order_of_the_recipe_whichever_leg_was_trained_last(unevaluated):
    rows = list(evaluate.curve_rows(unevaluated))
    path = unevaluated.directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join([line for line in lines if '"sft"' not in line] + [line for line in lines if '"sft"' in line])
    )
    assert path.read_text() != "".join(lines)
    assert list(evaluate.curve_rows(unevaluated)) == rows


def test_an_evaluation_is_finished_when_all_its_files_are_there(ready, finished_run):
    assert pipeline.is_finished(ready, "evaluate")
    elsewhere = dataclasses.replace(ready, directory=finished_run / "nowhere")
    assert not pipeline.is_finished(elsewhere, "evaluate")
