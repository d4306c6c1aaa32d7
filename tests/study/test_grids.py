"""A grid on the command line: what its cells leave, that one failure stops no other, resumption, shards and status."""

import json
import shutil
import signal

import jax
import pytest
import yaml

from jaxsafety.recipe import yaml_file
from jaxsafety.recipe.schema import as_dict
from jaxsafety.rundir import checkpoint, manifest_file, opening, status
from jaxsafety.study import pipeline, train

# Whose program is the smallest.
METHOD = "sft"
GOOD, BAD = "probe_prompts=4", "probe_prompts=2"


@pytest.fixture(scope="module")
def grid_yaml(mini_recipe, tmp_path_factory):
    """Two cells, of a study that pretrains and tunes by one method at one rate."""
    content = as_dict(mini_recipe)
    content |= {"strategy": "map", "grid": {"evaluate.probe_prompts": [4, 2]}}
    content["models"] = {label: content["models"][label] for label in ("pretrained", METHOD)}
    content["models"][METHOD]["lr"] = 1e-3
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def tuned(grid_yaml, tmp_path_factory):
    """The grid after pretraining and tuning, one cell of which diverges, and the exit codes."""
    from jaxsafety.cli import main

    directory, trained = tmp_path_factory.mktemp("tuned") / "out", train.train

    def diverging(study, stage):
        trained(study, stage)
        if stage == "tune" and study.directory.name == BAD:
            raise FloatingPointError(f"every lane of tune {METHOD} diverged: lower its learning rate")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "_configure_jax", lambda *_, **__: None)
        patch.setattr(train, "train", diverging)
        codes = [main.main([verb, str(grid_yaml), "--out", str(directory)]) for verb in ("pretrain", "tune")]
    return directory, codes


@pytest.fixture
def copy(tuned, tmp_path):
    return shutil.copytree(tuned[0], tmp_path / "out", symlinks=True)


def leaves(directory, leg):
    folder = directory / "checkpoints" / leg
    return json.loads((folder / f"{checkpoint.latest(folder):08d}" / "digests.json").read_text())["leaves"]


@pytest.mark.slow
def test_a_cell_that_diverges_fails_alone_with_its_reason(tuned):
    directory, codes = tuned
    assert codes == [0, 1]
    failed = manifest_file.read_manifest(directory / "cells" / BAD)["failed"]
    assert failed["stage"] == "tune" and "diverged: lower its learning rate" in failed["reason"]
    good = directory / "cells" / GOOD
    assert manifest_file.read_manifest(good)["failed"] is None
    assert [checkpoint.latest(good / "checkpoints" / leg) for leg in ("pretrained", METHOD)] == [6, 6]
    assert checkpoint.steps(good / "snapshots" / METHOD) == [2]


@pytest.mark.slow
def test_a_cell_is_the_run_of_its_own_recipe(tuned, main, tmp_path):
    cell = tuned[0] / "cells" / GOOD
    for verb in ("pretrain", "tune"):
        assert main(verb, cell / "config.yaml", "--out", tmp_path / "alone") == 0
    assert (tmp_path / "alone" / "metrics.jsonl").read_bytes() == (cell / "metrics.jsonl").read_bytes()
    for leg in ("pretrained", METHOD):
        assert leaves(tmp_path / "alone", leg) == leaves(cell, leg)


@pytest.mark.slow
def test_finished_cells_are_skipped_and_what_failed_is_tried_again(copy, main, grid_yaml, tuned, capsys):
    good = copy / "cells" / GOOD
    shutil.rmtree(good / "checkpoints" / METHOD)
    assert main("tune", grid_yaml, "--out", copy) == 0
    # The other had failed, and is tried again.
    assert "2 cells finished, 0 had been before" in capsys.readouterr().out
    assert leaves(good, METHOD) == leaves(tuned[0] / "cells" / GOOD, METHOD)
    assert (good / "metrics.jsonl").read_bytes() == (tuned[0] / "cells" / GOOD / "metrics.jsonl").read_bytes()
    assert main("pretrain", grid_yaml, "--out", copy) == 0
    assert "0 cells finished, 2 had been before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_manifest_fails_its_own_cell_only(copy, main, grid_yaml, capsys):
    (copy / "cells" / BAD / "manifest.json").write_text("{")
    shutil.rmtree(copy / "cells" / GOOD / "checkpoints" / METHOD)
    assert main("tune", grid_yaml, "--out", copy) == 1
    said = capsys.readouterr()
    assert "1 cells finished, 0 had been before" in said.out
    assert f"cell {BAD} failed, start: " in said.err and "is not JSON" in said.err
    assert main("status", copy) == 0
    assert "failed: start: " in capsys.readouterr().out


@pytest.mark.slow
def test_what_became_of_cells_is_told_to_programs(main, grid_yaml, copy, capsys):
    capsys.readouterr()
    assert main("report", grid_yaml, "--out", copy, "--format", "json") == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {GOOD, BAD} and rows[GOOD]["reason"].startswith("start: no results in ")


@pytest.mark.parametrize("content", ["models: 3", "- a", "a: ["])
def test_the_status_of_what_is_no_run_is_one_sentence(main, tmp_path, capsys, content):
    (tmp_path / "config.yaml").write_text(content)
    assert main("status", tmp_path) == 2
    assert "is not the configuration of a study: expected a directory" in capsys.readouterr().err


@pytest.mark.parametrize("cells", [3, {"a": 3}, {"a": {}}, {"a": {"models": 3}}])
def test_the_status_of_a_damaged_list_of_cells_is_one_sentence(main, mini_yaml, tmp_path, capsys, cells):
    shutil.copy(mini_yaml, tmp_path / "config.yaml")
    (tmp_path / "manifest.json").write_text(json.dumps({"cells": cells}))
    assert main("status", tmp_path) == 2
    assert "manifest.json lists no cells" in capsys.readouterr().err


def test_a_shard_runs_its_own_cells_only(main, grid_yaml, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_, **__: None)
    assert main("pretrain", grid_yaml, "--out", tmp_path / "out", "--shard", "2/2") == 0
    assert [path.name for path in (tmp_path / "out" / "cells").iterdir()] == [BAD]
    assert [row.state for row in status.read(tmp_path / "out")] == ["waiting", "waiting"]


@pytest.mark.slow
def test_a_cell_in_use_is_running_and_no_failure(copy, main, grid_yaml, capsys):
    cell = copy / "cells" / GOOD
    shutil.rmtree(cell / "checkpoints" / METHOD)
    recipe = yaml_file.read(cell / "config.yaml")
    with opening.open_run(cell, as_dict(recipe)):
        assert [row.state for row in status.read(copy)] == ["running", "failed"]
        assert main("tune", grid_yaml, "--out", copy, "--shard", "1/2") == 0
    assert f"cell {GOOD} is running in another process" in capsys.readouterr().err
    assert status.read(copy)[0].state == "waiting"


@pytest.mark.slow
def test_status_is_a_table_of_steps_stages_and_reasons(main, tuned, capsys):
    assert main("status", tuned[0]) == 0
    head, good, bad, summary = capsys.readouterr().out.splitlines()
    assert head.split() == ["cell", "pretrained", METHOD, "evaluate", "analyze", "report", "state"]
    assert good.split() == [GOOD, "6/6", "6/6", "-", "-", "-", "waiting"]
    assert bad.startswith(BAD) and f"failed: tune: every lane of tune {METHOD} diverged" in bad
    assert summary == "2 cells: 0 done, 0 running, 1 failed, 1 waiting"


def test_status_of_a_plain_run(main, finished_run, capsys):
    assert main("status", finished_run) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["mini", "6/6", "12/12", "12/12", *["done"] * 4]


@pytest.mark.slow
def test_a_recipe_is_printed_as_yaml_alone(main, tuned, capsys):
    assert main("report", tuned[0], "--print_config", "--format", "json") == 2
    assert "--format json: a recipe is printed as YAML, expected no --print_config" in capsys.readouterr().err


@pytest.mark.slow
def test_a_grid_is_no_run(main, tuned, capsys):
    assert main("claims", tuned[0]) == 2
    assert "is a grid: name one of its cells, such as" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_touches_no_disk_and_knows_only_what_was_measured(main, grid_yaml, tuned, copy, tmp_path, capsys):
    assert main("run", grid_yaml, "--dry_run", "--out", tmp_path / "nowhere") == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "nowhere").exists()
    assert (
        "2 of 2 cells, 0 of them trained already" in out and f"{METHOD}: sft from pretrained; 1 lane x 2 seeds" in out
    )
    assert "programs to compile for training: 4" in out
    assert "seed-steps left: 24 of pretraining, 24 of tuning" in out
    assert "unknown: no earlier run to go by for 4 of 4 trainings" in out
    shutil.rmtree(copy / "cells" / GOOD / "checkpoints" / METHOD)
    assert main("run", grid_yaml, "--dry_run", "--out", copy, "--shard", "1/2") == 0
    assert "time: about 0:" in capsys.readouterr().out


def test_the_memory_of_a_dry_run_is_that_of_the_states(main, mini_yaml, mini_recipe, tmp_path, capsys):
    assert main("run", mini_yaml, "--dry_run", "--out", tmp_path / "nowhere") == 0
    state = train.shapes(pipeline.prepare(mini_recipe, tmp_path), mini_recipe.lanes_of("dpo"))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 2**20
    assert f"has 2 lanes x 2 seeds of parameters and optimiser state, {size:.1f} MiB in all" in capsys.readouterr().out


def test_a_bad_grid_or_shard_exits_with_2(main, mini_yaml, grid_yaml, tmp_path, capsys):
    words = ("run", grid_yaml, "--out", tmp_path / "out")
    assert main(*words, "--shard", "3/2") == main(*words, "--grid", "{subject.model.widht: [1]}") == 2
    assert main("run", mini_yaml, "--shard", "1/2") == main(*words, "--grid", "{1: [1]}") == 2
    # As of a variable that is not set.
    assert main(*words, "--shard", "") == main("run", mini_yaml, "--shard", "") == 2
    flags = ("--coordinator", "node1:5000", "--processes", "2", "--process", "0")
    assert main(*words, "--shard", "1/2", *flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert "got '3/2'" in err[0] and "did you mean 'subject.model.width'" in err[1] and "has no `grid:`" in err[2]
    assert "has a key that is no text: put 1 in quotes" in err[3] and "got ''" in err[4] and "has no `grid:`" in err[5]
    assert "and --coordinator joins processes: give one of them" in err[6]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_a_grid_after_the_chunk_and_fails_no_cell(
    copy, main, grid_yaml, tuned, monkeypatch, number, code
):
    good = copy / "cells" / GOOD
    shutil.rmtree(good / "checkpoints" / METHOD)

    def save(folder, *words, step, **named):
        checkpoint_save(folder, *words, step=step, **named)
        # Once: a second signal would end the process, and a snapshot comes before the checkpoint. It comes while the
        # chunk after step 2 computes.
        if folder.parent.name == "checkpoints" and step == 2:
            signal.raise_signal(number)

    checkpoint_save = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        assert main("tune", grid_yaml, "--out", copy, "--shard", "1/2") == code
    assert checkpoint.latest(good / "checkpoints" / METHOD) == 4
    assert manifest_file.read_manifest(good)["failed"] is None
    assert main("tune", grid_yaml, "--out", copy, "--shard", "1/2") == 0
    assert leaves(good, METHOD) == leaves(tuned[0] / "cells" / GOOD, METHOD)


def test_a_plain_run_that_failed_says_so_until_it_is_started_again(main, mini_yaml, tmp_path, monkeypatch, capsys):
    words = ("pretrain", mini_yaml, "--out", tmp_path / "out")

    def full(*_, **__):
        raise OSError("cannot save: the disk is full")

    monkeypatch.setattr(train, "train", full)
    assert main(*words) == 2
    assert status.read(tmp_path / "out")[0].reason == "pretrain: cannot save: the disk is full"
    assert main("status", tmp_path / "out") == 0
    assert "failed: pretrain: cannot save: the disk is full" in capsys.readouterr().out
    monkeypatch.setattr(train, "train", lambda *_, **__: None)
    assert main(*words) == 0
    assert [row.state for row in status.read(tmp_path / "out")] == ["waiting"]
