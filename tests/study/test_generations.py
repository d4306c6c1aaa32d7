"""A graph of several generations: what each begins with, what compiles once, and values as lanes of one run."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import polars as pl
import pytest

from jaxsafety.recipe.cells import Cell
from jaxsafety.rundir import checkpoint, manifest_file, metrics_file, results
from jaxsafety.study import evaluate, forecast, grids, pipeline, probe, train

# Two programs of other sizes may sum in another order.
RTOL = 1e-5
# Products of another batch size add up in another order, and steps of an optimiser pass it on.
BATCHED_RTOL = 1e-4


@pytest.mark.slow
def test_every_generation_begins_with_its_parents(graph_run, graph):
    trained = [lane for lane in graph.lanes if lane.training is not None]
    assert len(trained) == 1 + 2 + 2 + 8 + 8 + 4 + 8
    assert all(checkpoint.steps(graph_run.leg(lane).checkpoints) == [2] for lane in trained)
    params = dict(
        zip(
            [lane.name for lane in graph.lanes],
            np.asarray(pipeline.load(graph_run, graph.lanes).params["embed"]),
            strict=True,
        )
    )
    for lane in (lane for lane in trained[1:] if lane.label in ("sft", "dpo", "attacked", "again")):
        moved = {other.name: np.abs(params[lane.name] - params[other.name]).max() for other in lane.ancestors}
        # Two steps at most a thousandth each.
        assert 0 < moved[lane.parent.name] < 0.01 and min(moved.values()) == moved[lane.parent.name]


@pytest.mark.slow
def test_lanes_of_one_program_are_compiled_once_whatever_they_begin_with(graph_run):
    traces = Counter(json.loads((graph_run.directory.parent / "traces.json").read_text()))
    # Once a stage; and once a number of lanes, of which there are 1, then 2, 4 and 8.
    assert traces.pop("prompts") == 2 and traces.pop("readout") == 4
    # Another generation than dpo's two lanes, again's eight are of the same method: the same program for their number.
    counts = dict.fromkeys(["adapted", "attacked", "dpo", "masked", "pretrained", "sft"], 1)
    assert traces == counts | {"dpo": 2}
    rows = metrics_file.read_metrics(graph_run.directory)
    assert len({(row["method"], row["lr_name"]) for row in rows}) == 33


@pytest.mark.slow
@pytest.mark.parametrize("chain", [False, True])
def test_ten_models_of_one_method_compile_once(graph, traced, tmp_path, caplog, chain):
    """Whether they all begin with one model, or each with the one before."""
    tuned, first = graph.models["sft"], {"pretrained": graph.models["pretrained"]}
    ten = {f"m{i}": tuned | {"lr": 1e-4 * (i + 1), "data": {"p_unsafe": i / 10}} for i in range(10)}
    if chain:
        ten = {label: given | {"from": before} for (label, given), before in zip(
            ten.items(), ["pretrained", *ten], strict=False)}  # fmt: skip
    ready = pipeline.prepare(replace(graph, models=first | ten, attacks={}, analyses={}), tmp_path)
    jobs = [grids.Job(Cell("", ready.recipe, {}), ready)]
    assert "programs to compile for training: 2\n" in forecast.render(jobs, jobs).text
    train.train(ready, "pretrain")
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train.train(ready, "tune")
    assert traced == ["pretrained", "m0"]
    compiled = Counter(re.findall(r"Compiling jit\((steps_of_a_lane|init|read)\)", caplog.text))
    assert compiled == {"steps_of_a_lane": 1, "init": 1, "read": 1}
    found = np.asarray(pipeline.load(ready, ready.recipe.tuned).params["embed"])
    assert len({lane.tobytes() for lane in found}) == 10


@pytest.mark.slow
def test_a_later_generation_of_several_methods_compiles_nothing(graph, traced, tmp_path):
    """However many programs lie between the two trainings of one method."""
    ways = {"sft": {}, "dpo": {}, "unlearn": {}, "pretrain": {"data": {"pool": "text"}}}
    how = {"steps": 2, "chunk_steps": 2, "batch_size": 4}
    first = {f"{name}1": how | own | {"from": "pretrained", "method": name} for name, own in ways.items()}
    second = {f"{name}2": how | own | {"from": "sft1", "method": name} for name, own in ways.items()}
    models = {"pretrained": graph.models["pretrained"]} | first | second
    ready = pipeline.prepare(replace(graph, models=models, attacks={}, analyses={}), tmp_path)
    train.train(ready, "pretrain")
    traced.clear()
    train.train(ready, "tune")
    assert sorted(traced) == sorted(first)


@pytest.mark.slow
def test_a_lane_is_the_run_of_its_values_alone(graph_run, graph, tmp_path):
    alone = {label: dict(given) for label, given in graph.models.items() if label in ("pretrained", "dpo", "attacked")}
    alone["dpo"]["lr"] = 1e-4
    alone["attacked"] |= {"from": "dpo", "data": {"pool": "explicit", "prompts": 3}}
    ready = pipeline.prepare(replace(graph, models=alone, attacks={}, analyses={}), tmp_path)
    for stage in ("pretrain", "tune"):
        train.train(ready, stage)
    one = pipeline.load(ready, ready.recipe.lanes_of("attacked"))
    (lane,) = [lane for lane in graph.lanes if lane.name == "attacked.from=dpo.eta_S.prompts=3"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=1e-7), one, pipeline.load(graph_run, [lane])
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["vmap", "sharded"])
def test_lanes_in_batches_or_on_devices_agree_with_those_one_by_one(graph_run, graph, tmp_path, strategy):
    models = {label: graph.models[label] for label in ("pretrained", "sft", "dpo", "attacked")}
    ready = pipeline.prepare(replace(graph, models=models, strategy=strategy, attacks={}, analyses={}), tmp_path)
    assert ready.strategy == strategy
    for stage in ("pretrain", "tune"):
        train.train(ready, stage)
    losses = [
        {
            (row["method"], row["lr_name"], row["seed"], row["step"]): row["loss"]
            for row in metrics_file.read_metrics(where)
        }
        for where in (ready.directory, graph_run.directory)
    ]
    assert len(losses[0]) == 2 * 13 and losses[0].keys() <= losses[1].keys()
    for lane, loss in losses[0].items():
        np.testing.assert_allclose(loss, losses[1][lane], rtol=BATCHED_RTOL, err_msg=str(lane))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_an_update_is_taken_from_the_finished_parent_at_every_step(graph_run, graph):
    """And not from where the parent was at that step of its own training."""
    parents = replace(graph, analyze=replace(graph.analyze, base="parent"))
    ready = replace(graph_run, recipe=parents)
    lanes_ = parents.lanes
    models = evaluate.Models(lanes_, pipeline.load(graph_run, lanes_).params, np.ones((len(lanes_), 2), bool))
    subjects = SimpleNamespace(run=ready, models=models)
    then = models._replace(params=jax.tree.map(lambda leaf: 0 * leaf, models.params))
    rows = [lane.name for lane in lanes_].index("attacked.from=sft.eta_M.prompts=2"), 0
    now, base = probe.with_bases(subjects, then, rows)
    sft = [lane.name for lane in lanes_].index("sft.eta_M")
    np.testing.assert_array_equal(base["embed"], models.params["embed"][np.asarray([sft, 0])])
    assert not np.asarray(now["embed"]).any()
    # A further update stands beside the parent's, from what that is compared with.
    subjects = SimpleNamespace(run=graph_run, models=models)
    now, base, tuned = probe.with_parents(subjects, models, rows[:1])
    for found, row in ((now, rows[0]), (base, [lane.name for lane in lanes_].index("pretrained")), (tuned, sft)):
        np.testing.assert_array_equal(found["embed"], models.params["embed"][np.asarray([row])])
    of = {further: probe.measured_rows(models, ["sft", "attacked"], further) for further in (False, True)}
    assert {lanes_[row].label for row in of[True]} == {"attacked"} and len(of[False]) == len(of[True]) + 2


@pytest.mark.slow
def test_results_are_of_the_models_that_analyses_and_attacks_are_on(graph_run, main, graph, tmp_path):
    directory = shutil.copytree(graph_run.directory, tmp_path / "run")
    assert main("analyze", directory) == 0
    frame = results.read_results([directory / "results" / "analyze.parquet"], schema=results.ANALYSIS_SCHEMA)
    of = {name: set(rows["method"]) for (name,), rows in frame.group_by("analysis")}
    assert of["clusters"] == {"sft", "attacked"} and of["prefill"] == {"attacked"}
    assert {*frame.filter(analysis="clusters", method="sft")["lr_name"]} == {"eta_M"}
    assert of["verdicts"] == {"pretrained", "sft", "dpo", "attacked", "again"}
    assert of["output_space"] == {"sft", "dpo", "attacked", "again"}
    # A tuned model's own update is no further one.
    assert of["undoing"] == {"attacked", "again"}
    pairs = frame.filter(pl.col("analysis") == "alignment")
    # Only models of one parent at one point are compared.
    assert {part.partition(":")[0] for part in pairs["part"]} == {"sft~dpo"}
    assert manifest_file.read_manifest(directory)["models"]["again"] == {
        lane.name: 2 for lane in graph.lanes_of("again")
    }
