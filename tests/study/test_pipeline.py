"""The stages of a miniature study: what they leave, that nothing is repeated, and that resuming changes no bit."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxsafety.report import study_report
from jaxsafety.rundir import checkpoint, manifest_file, metrics_file, results
from jaxsafety.study import evaluate, pipeline, stages, train
from tests.disturbed import die_before_saving

LEGS = ("pretrained", "sft.eta_M", "sft.eta_S", "dpo.eta_M", "dpo.eta_S")


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished_run, tmp_path / "mini")


def prepare(recipe, directory):
    return pipeline.prepare(recipe, directory)


def digests(directory, leg, step):
    """Digests of every leaf of a checkpoint: equal if and only if the states are, bit for bit."""
    return json.loads((directory / "checkpoints" / leg / f"{step:08d}" / "digests.json").read_text())["leaves"]


def snapshot(directory):
    """Content and time of every file but the lock, the manifest (timings) and what the report makes anew."""
    files = (path for path in directory.rglob("*") if path.is_file())
    ignored = (".lock", "manifest.json", "report.html")
    kept = (path for path in files if path.name not in ignored and path.parent.name != "tables")
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept}


def test_a_run_leaves_what_it_should(finished_run, mini_recipe):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {"config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "results", "report.html"}
    assert {path.name for path in (finished_run / "checkpoints").iterdir()} == set(LEGS)
    # Of a finished model its parameters are kept, and nothing to go on from.
    assert all(checkpoint.steps(finished_run / "checkpoints" / leg) == [6] for leg in LEGS)
    assert {name.split("/")[0] for name in digests(finished_run, "dpo.eta_M", 6)} == {"params", "finite"}
    manifest = manifest_file.read_manifest(finished_run)
    stages = ("pretrain", "tune", "evaluate", "analyze")
    assert set(manifest) == {*stages, "models", "failed"} and manifest["failed"] is None
    assert manifest["models"]["dpo"] == {"dpo.eta_M": 6, "dpo.eta_S": 6}
    assert all({"seconds", "strategy", "revision", "devices"} <= set(manifest[stage]) for stage in stages)
    rows = metrics_file.read_metrics(finished_run)
    # 3 chunks of: 2 seeds of pretraining, and 2 methods x 2 learning rates x 2 seeds.
    assert len(rows) == 3 * (2 + 2 * 2 * 2)
    assert {row["seed"] for row in rows} == set(mini_recipe.seeds)
    assert all({"loss", "grad_norm", "safe/exact_match", "unsafe/refused"} <= row.keys() for row in rows)


def test_methods_and_rates_train_different_models_from_the_same_one(finished_run, mini_recipe):
    ready = prepare(mini_recipe, finished_run)
    models = jax.device_get(pipeline.load(ready, mini_recipe.lanes).params["embed"])
    base, tuned = models[0], models[1:]
    assert len({embed.tobytes() for lane in tuned for embed in lane}) == 2 * len(tuned) == 8
    # At the small rate a few steps move little: every lane started from its own seed's pretrained model.
    for s in (0, 1):
        assert all(np.abs(lane[s] - base[s]).max() < 0.01 for lane in tuned[1::2])
        assert np.abs(base[s] - base[1 - s]).max() > 0.01


@pytest.mark.usefixtures("undrawn")
def test_a_second_run_repeats_nothing(main, run, mini_yaml):
    before = snapshot(run)
    assert main("run", mini_yaml, "--out", run) == 0
    assert snapshot(run) == before


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("verb", ["run", *(pytest.param(verb, marks=pytest.mark.slow) for verb in ("tune", "report"))])
def test_a_verb_takes_the_directory_of_a_run(main, run, verb, monkeypatch):
    before = snapshot(run)
    monkeypatch.chdir(run.parent)
    (run / "report.html").unlink()
    assert main(verb, run.name) == 0
    assert snapshot(run) == before and (run / "report.html").exists() == (verb != "tune")
    assert not (run.parent / "runs").exists()


def read_results(directory, name):
    """The table without the revision, which may change while these tests are worked on."""
    return results.read_results([directory / "results" / f"{name}.parquet"]).drop("revision")


@pytest.mark.slow
@pytest.mark.parametrize("label", ["pretrained", "dpo"])
def test_a_run_resumed_from_an_earlier_chunk_ends_as_the_uninterrupted_one(
    main, finished_run, tmp_path, mini_yaml, label
):
    run = tmp_path / "mini"
    # Between the saves of two lanes that train together.
    last = next(leg for leg in reversed(LEGS) if leg.startswith(label))
    die_before_saving(lambda: main("run", mini_yaml, "--out", run), last, 6)
    assert checkpoint.latest(run / "checkpoints" / last) == 4
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-20])
    assert main("run", mini_yaml, "--out", run) == 0
    assert (run / "metrics.jsonl").read_bytes() == (finished_run / "metrics.jsonl").read_bytes()
    assert [digests(run, name, 6) for name in LEGS] == [digests(finished_run, name, 6) for name in LEGS]
    for name in ("evaluate", "curves"):
        frames = [read_results(where, name) for where in (run, finished_run)]
        assert frames[0].equals(frames[1])
    assert (run / "results" / "examples.json").read_bytes() == (finished_run / "results" / "examples.json").read_bytes()


@pytest.mark.slow
def test_a_lane_of_the_grid_is_the_single_run_of_its_seed(finished_run, mini_recipe, tmp_path):
    """The same pipeline with one seed and no sharding: its own initialisation, data and prompts."""
    single = prepare(replace(mini_recipe, seeds=(5,), strategy="map"), tmp_path)
    train.train(single, "pretrain")
    root = mini_recipe.lanes[:1]
    alone, both = (pipeline.load(ready, root) for ready in (single, prepare(mini_recipe, finished_run)))
    second = jax.tree.map(lambda leaf: leaf[:, 1:], both)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(alone), jax.device_get(second))
    rows = [row for row in metrics_file.read_metrics(finished_run) if row["stage"] == "pretrain" and row["seed"] == 5]
    assert metrics_file.read_metrics(tmp_path) == rows


@pytest.mark.parametrize(
    ("missing", "stage", "message"),
    [
        (
            "checkpoints/pretrained",
            partial(train.train, stage="tune"),
            "no finished pretrained in .*: run `jaxsafety pretrain` on it first",
        ),
        ("checkpoints/pretrained", evaluate.write, "no finished pretrained in .*: run `jaxsafety pretrain`"),
        ("checkpoints/dpo.eta_S", evaluate.write, "no finished dpo.eta_S in .*: run `jaxsafety tune` on it first"),
    ],
)
def test_a_stage_before_its_turn_says_which_comes_first(run, mini_recipe, missing, stage, message):
    shutil.rmtree(run / missing)
    shutil.rmtree(run / "results")
    with pytest.raises(ValueError, match=message):
        stage(prepare(mini_recipe, run))
    assert not list((run / "results").glob("*")) if (run / "results").exists() else True


def test_a_report_before_the_evaluation_says_so(run):
    (run / "results" / "evaluate.parquet").unlink()
    with pytest.raises(ValueError, match=r"no results in .*: run `jaxsafety evaluate` on it first"):
        study_report.write(run)


def test_a_damaged_checkpoint_is_named_with_what_to_do(run, mini_recipe):
    damaged = run / "checkpoints" / "pretrained" / "00000006"
    file = max((path for path in damaged.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"00000006 is damaged .*: remove .* to train pretrained again from the start"):
        pipeline.load(prepare(mini_recipe, run), mini_recipe.lanes[:1])


def test_the_report_is_one_self_contained_page(finished_run):
    page = (finished_run / "report.html").read_text()
    assert not re.search(r"<script|<link|<img|@import|src\s*=|url\((?!#)", page)
    assert not re.search(r"href\s*=\s*[\"'](?!#|results/tables/\w+\.(csv|parquet)\")", page)
    for text in ("Instruct", "Null", "pretrained", "SFT", "DPO", "eta_M", "world: tiny", "preset: tiny", "<svg"):
        assert text in page, text


def test_a_run_recorded_before_a_field_was_there_is_the_run_with_its_default(mini_recipe, tmp_path):
    study = pipeline.prepare(mini_recipe, tmp_path)
    stages.record(study)
    path = tmp_path / "config.yaml"
    written = path.read_text()
    # As an earlier revision wrote it: without fields that are as they always were, at any depth.
    for field in ("stored_dtype", "attention", "worlds", "duplicate_share"):
        assert field in written
        path.write_text("".join(line for line in written.splitlines(True) if field not in line))
        stages.record(study)
    # What is missing and was another value is another run.
    path.write_text("".join(line for line in written.splitlines(True) if "width:" not in line))
    with pytest.raises(ValueError, match=r"another configuration \(subject.model.width is None there and 16 here\)"):
        stages.record(study)
