"""The stages of a miniature study: what they leave, that nothing is repeated, and that resuming changes no bit."""

import json
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsafety.report import study_report
from jaxsafety.rundir import checkpoint, manifest_file, metrics_file, results
from jaxsafety.study import evaluate, pipeline

LEGS = ("pretrained", "sft", "dpo")


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
    assert all(checkpoint.latest(finished_run / "checkpoints" / leg) == 6 for leg in LEGS)
    manifest = manifest_file.read_manifest(finished_run)
    stages = ("pretrain", "tune", "evaluate", "analyze")
    assert set(manifest) == set(stages)
    assert all({"seconds", "strategy", "revision", "devices"} <= set(manifest[stage]) for stage in stages)
    rows = metrics_file.read_metrics(finished_run)
    # 3 chunks of: 2 seeds of pretraining, and 2 methods x 2 learning rates x 2 seeds.
    assert len(rows) == 3 * (2 + 2 * 2 * 2)
    assert {row["seed"] for row in rows} == set(mini_recipe.seeds)
    assert all({"loss", "grad_norm", "safe/exact_match", "unsafe/refused"} <= row.keys() for row in rows)


def test_methods_and_rates_train_different_models_from_the_same_one(finished_run, mini_recipe):
    ready = prepare(mini_recipe, finished_run)
    base, states = pipeline.pretrained(ready).params, pipeline.tuned(ready)
    embeds = [np.asarray(state.params["embed"])[h, s] for state in states.values() for h in (0, 1) for s in (0, 1)]
    assert len({embed.tobytes() for embed in embeds}) == len(embeds)
    # At the small rate a few steps move little: every lane started from its own seed's pretrained model.
    for s in (0, 1):
        start = np.asarray(base["embed"])[0, s]
        assert all(np.abs(np.asarray(state.params["embed"])[1, s] - start).max() < 0.01 for state in states.values())
        assert np.abs(start - np.asarray(base["embed"])[0, 1 - s]).max() > 0.01


@pytest.mark.usefixtures("undrawn")
def test_a_second_run_repeats_nothing(main, run, mini_yaml):
    before = snapshot(run)
    assert main("run", mini_yaml, "--out", run) == 0
    assert snapshot(run) == before


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("verb", ["run", "tune", "report"])
def test_a_verb_takes_the_directory_of_a_run(main, run, verb, monkeypatch):
    before = snapshot(run)
    monkeypatch.chdir(run.parent)
    (run / "report.html").unlink()
    assert main(verb, run.name) == 0
    assert snapshot(run) == before and (run / "report.html").exists() == (verb != "tune")
    assert not (run.parent / "runs").exists()


def killed_while_tuning(run, leg, after):
    """Makes a finished run look as if it had been killed in the chunk of ``leg`` after step ``after``."""
    later = LEGS[LEGS.index(leg) + 1 :]
    shutil.rmtree(run / "results")
    (run / "report.html").unlink()
    for name in later:
        shutil.rmtree(run / "checkpoints" / name)
    for step in checkpoint.steps(run / "checkpoints" / leg):
        if step > after:
            shutil.rmtree(run / "checkpoints" / leg / f"{step:08d}")
    # The last chunk's rows may have been written, the last of them in part.
    lines = [
        line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["method"] not in later
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines)[:-20])


def read_results(directory, name):
    """The table without the revision, which may change while these tests are worked on."""
    return results.read_results([directory / "results" / f"{name}.parquet"]).drop("revision")


@pytest.mark.slow
@pytest.mark.parametrize("leg", ["pretrained", "dpo"])
def test_a_run_resumed_from_an_earlier_chunk_ends_as_the_uninterrupted_one(main, finished_run, run, mini_yaml, leg):
    killed_while_tuning(run, leg, after=4)
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
    alone, grid = pipeline.pretrain(single), pipeline.pretrained(prepare(mini_recipe, finished_run))
    second = jax.tree.map(lambda leaf: leaf[:, 1:], grid)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(alone), jax.device_get(second))
    rows = [row for row in metrics_file.read_metrics(finished_run) if row["stage"] == "pretrain" and row["seed"] == 5]
    assert metrics_file.read_metrics(tmp_path) == rows


@pytest.mark.parametrize(
    ("missing", "stage", "message"),
    [
        (
            "checkpoints/pretrained",
            pipeline.tune,
            "no finished pretraining in .*: run `jaxsafety pretrain` on it first",
        ),
        ("checkpoints/pretrained", evaluate.write, "no finished pretraining in .*: run `jaxsafety pretrain`"),
        ("checkpoints/dpo", evaluate.write, "no finished dpo in .*: run `jaxsafety tune` on it first"),
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


def test_a_damaged_checkpoint_is_named_with_the_good_one_before_it(run, mini_recipe):
    damaged = run / "checkpoints" / "pretrained" / "00000006"
    file = max((path for path in damaged.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(
        ValueError, match=r"00000006 is damaged .*: remove it to continue from step 4 .*which is intact"
    ):
        pipeline.pretrained(prepare(mini_recipe, run))


def test_the_report_is_one_self_contained_page(finished_run):
    page = (finished_run / "report.html").read_text()
    assert not re.search(r"<script|<link|<img|@import|src\s*=|url\((?!#)", page)
    assert not re.search(r"href\s*=\s*[\"'](?!#|results/tables/\w+\.(csv|parquet)\")", page)
    for text in ("Instruct", "Null", "pretrained", "SFT", "DPO", "eta_M", "world: tiny", "<svg"):
        assert text in page, text
