"""A recipe over checkpoints from its first model to its report: all seeds, whole wherever it was stopped."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import yaml

from jaxsafety.claims.intervals import student_interval
from jaxsafety.cli import main as command
from jaxsafety.formats import hf
from jaxsafety.recipe import cells, yaml_file
from jaxsafety.recipe.schema import Recipe
from jaxsafety.report import figures, plotting
from jaxsafety.report.seed_tables import SHARES
from jaxsafety.rundir import checkpoint, metrics_file, signals
from jaxsafety.study.checkpoints import answers, export, places, rows, tuned
from jaxsafety.study.checkpoints.places import Places
from tests.conftest import undrawn_svg
from tests.disturbed import Killed

SEEDS = (0, 3)
LEARNT = ("sft", "attacked.lr=0.001", "attacked.lr=0.01")


@pytest.fixture(scope="module")
def run():
    """The command line on one device, in this process; figures are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_configure_jax", lambda *_, **__: None)
        patch.setattr(places, "local", lambda: Places(None))
        for module in (plotting, figures):
            patch.setattr(module, "svg", undrawn_svg)
        yield lambda *words: command.main([str(word) for word in words])


def written(folder, content):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def recipe(checkpoints, few, pairs, tmp_path_factory):
    """Three generations, the third of which is trained on examples of its own and compares with the first."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "own.jsonl").write_text("".join(pairs.read_text().splitlines(keepends=True)[::-1]))
    for file in (few, pairs):
        shutil.copy(file, folder)
    (folder / "base").symlink_to(checkpoints[0])
    how = {"steps": 4, "chunk_steps": 2, "batch_size": 4, "parametrisation": {"rank": 2}}
    attack = {"method": "dpo", "reference": "root", "role": "attack", "lr": [1e-3, 1e-2]}
    return written(folder, {
        "subject": {"checkpoint": "base", "pairs": "pairs.jsonl", "prompts": "few.jsonl", "max_tokens": 64},
        "seeds": list(SEEDS),
        "models": {
            "sft": {"from": "pretrained", "method": "sft", "lr": 1e-2, "role": "defence"} | how,
            "half": {"from": "sft", "edit": "rank_part", "rank": 1, "method": "gram"},
            "attacked": {"from": "half", "data": {"file": "own.jsonl", "prompts": 6}} | attack | how,
        },
        "evaluate": {"answers": 3},
        "analyses": {"weights": {"on": ["sft", "half"]}, "activations": {"on": ["pretrained", "half"]}},
    })  # fmt: skip


@pytest.fixture(scope="module")
def whole(run, recipe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("study") / "whole"
    assert run("run", recipe, "--out", directory) == 0
    return directory


def table(directory, name):
    """Rows of a result, without what tells the code that wrote them."""
    return pl.read_parquet(directory / "results" / f"{name}.parquet").drop("revision", "run")


def weights(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in (directory / "models").glob("*/*/*.*")}


def test_every_model_of_every_seed_is_there(whole):
    names = {path.name for path in (whole / "models").iterdir()}
    assert names == {"sft", "half", "attacked.lr=0.001", "attacked.lr=0.01"}
    for name in names:
        assert [path.name for path in sorted((whole / "models" / name).iterdir())] == ["seed_0", "seed_3"]
        one, other = (hf.load(whole / "models" / name / f"seed_{seed}", dtype="float32")[1] for seed in SEEDS)
        assert not np.array_equal(one["blocks"]["mlp"]["up"], other["blocks"]["mlp"]["up"])
        assert (whole / "models" / name / "seed_3" / "tokenizer.json").exists()
    assert not [path for path in (whole / "checkpoints").rglob("*") if path.is_file()]


def test_curves_are_those_of_all_seeds(whole):
    curves = table(whole, "curves").filter(metric="loss")
    lanes = curves.select("method", "lr_name", "seed", "step").rows()
    expected = [(name.partition(".")[0], name.partition(".")[2]) for name in LEARNT]
    assert sorted(lanes) == sorted((*one, seed, step) for one in expected for seed in SEEDS for step in (2, 4))
    assert curves["value"].is_finite().all() and set(curves["stage"]) == {"tune"}


def test_a_reference_is_the_models_first_ancestor(whole):
    """The loss does not begin at that of a model that is compared with itself."""
    losses = [row["loss"] for row in metrics_file.read_metrics(whole) if row["method"] == "attacked"]
    assert len(losses) == 8 and min(abs(loss - np.log(2)) for loss in losses) > 1e-4


def test_answers_are_judged_in_every_seeds_rows(whole, few):
    judged = table(whole, "evaluate")
    labels = {json.loads(line)["label"] for line in few.read_text().splitlines()}
    shares = judged.pivot("metric", index=["method", "lr_name", "seed", "condition"], values="value")
    assert shares.height == 5 * 2 * 4 and set(shares["condition"]) == labels
    assert ((shares["complied"] + shares["refused"] + shares["other"] - 1).abs() < 1e-6).all()
    steps = judged.select("method", "step").unique().rows()
    assert dict(steps) == {"pretrained": 0, "sft": 4, "half": 0, "attacked": 4}
    # What is one model for all seeds has been asked once.
    folder = whole / "results" / "answers"
    assert [path.name for path in (folder / "pretrained").glob("*.json")] == ["seed_0.json"]
    assert len(list((folder / "sft").glob("*.json"))) == 2
    assert len(json.loads((folder / "sft" / "seed_3.json").read_text())) == 24
    lines = (folder / "sft" / "seed_3.jsonl").read_text().split("\n")[:-1]
    assert len(lines) == 24 and all("answer" in json.loads(line) for line in lines)


def test_examples_show_the_answers_of_all_models(whole):
    shown = json.loads((whole / "results" / "examples.json").read_text())
    assert len(shown) == 2 * 4
    models = ["pretrained", "sft", "half", "attacked lr=0.001", "attacked lr=0.01"]
    assert all([one["model"] for one in row["answers"]] == models for row in shown)
    told = {(bool(one["answer"].strip()), one["verdict"]) for row in shown for one in row["answers"]}
    assert told <= {(True, "complied"), (True, "refused"), (True, "other"), (False, "other")}


def test_analyses_have_rows_of_every_seed(whole):
    found = table(whole, "analyze")
    assert set(found.filter(analysis="output_space")["method"]) == {"sft", "half"}
    assert set(found.filter(analysis="clusters")["method"]) == {"pretrained", "half"}
    for method in ("pretrained", "sft", "half"):
        one, other = (found.filter(method=method, seed=seed).drop("seed") for seed in SEEDS)
        assert one.height == other.height > 0
        # One checkpoint for all seeds has the same rows in each.
        assert one.equals(other) == (method == "pretrained")
    # The edit, from which no training comes, has its own update from the root.
    ranks = found.filter(analysis="output_space", metric="rank_delta", layer=1, part="up").select("method", "value")
    assert set(ranks.rows()) == {("sft", 2.0), ("half", 1.0)}
    assert set(found.filter(analysis="verdicts")["metric"]) >= {"complied", "n_successful"}


def expected_interval(metric, values):
    found = student_interval(values)
    return found.clipped() if metric in SHARES and 0 <= found.mean <= 1 else found


def test_the_reports_intervals_are_over_seeds(whole):
    found, seeds = table(whole, "analyze"), [f"seed_{seed}" for seed in SEEDS]
    count = 0
    for name in ("separation", "input_alignment", "output_space", "input_space", "jailbreaks"):
        csv = pl.read_csv(whole / "results" / "tables" / f"{name}.csv", infer_schema_length=None)
        for row in csv.filter(pl.col("method") != "pretrained").iter_rows(named=True):
            interval = expected_interval(row["metric"], [row[seed] for seed in seeds])
            got = [row[part] for part in ("mean", "low", "high", "n")]
            assert got == pytest.approx(list(interval), rel=1e-9, abs=1e-12), row
            count += row["mean"] is not None and row["low"] < row["high"]
    assert count > 20
    # One value of them by hand, from the rows themselves.
    where = {"analysis": "clusters", "method": "half", "metric": "effect_size", "layer": 1, "part": "last"}
    one, other = found.filter(**where).sort("seed")["value"]
    csv = pl.read_csv(whole / "results" / "tables" / "separation.csv", infer_schema_length=None)
    row = csv.filter(**where).to_dicts()[0]
    assert row["high"] - row["mean"] == pytest.approx(12.7062 * abs(one - other) / 2, rel=1e-4) and row["n"] == 2


def test_a_checkpoint_of_all_seeds_has_its_interval_over_prompts(whole):
    found = table(whole, "analyze").filter(method="pretrained", seed=0)
    csv = pl.read_csv(whole / "results" / "tables" / "separation.csv", infer_schema_length=None)
    own = csv.filter(method="pretrained", metric="accuracy", part="last").to_dicts()
    assert len(own) >= 3
    for row in (row for row in own if row["layer"] is not None):
        where = {"analysis": "clusters", "layer": row["layer"], "part": "last"}
        given = [found.filter(metric=f"accuracy{end}", **where)["value"].item() for end in ("", "_low", "_high", "_n")]
        # The interval of a share stays one.
        expected = [given[0], max(given[1], 0), min(given[2], 1), given[3]]
        assert [row[part] for part in ("mean", "low", "high", "n")] == pytest.approx(expected)
        assert given[3] == 12 and row["seed_0"] == row["seed_3"] == row["mean"]


def test_a_finished_run_repeats_nothing(whole, run, recipe, monkeypatch, capsys):
    assert run("status", whole) == 0
    assert capsys.readouterr().out.rstrip().endswith("done")
    before = {path: path.stat().st_mtime_ns for path in (*(whole / "results").glob("*.*"), whole / "metrics.jsonl")}
    for module, name in ((tuned, "write"), (hf, "load"), (hf.Checkpoint, "matrix"), (answers, "_writer")):
        monkeypatch.setattr(module, name, None)
    assert run("run", recipe, "--out", whole) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    page = (whole / "report.html").read_text()
    assert "over the prompts of a label" in page and "stands in every seed&#x27;s rows" in page.replace(
        "&#39;", "&#x27;"
    )


def test_a_report_needs_results_alone(whole, run, recipe, capsys):
    page = (whole / "report.html").read_bytes()
    (whole / "report.html").unlink()
    gone = recipe.parent.rename(recipe.parent.with_name("gone"))
    try:
        assert run("report", whole) == 0
        capsys.readouterr()
        assert run("run", whole) == 2 and "few.jsonl" in capsys.readouterr().err
    finally:
        gone.rename(recipe.parent)
    assert (whole / "report.html").read_bytes() == page


def assert_same(directory, whole):
    assert weights(directory) == weights(whole)
    assert (directory / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("curves", "evaluate", "analyze"):
        assert table(directory, name).equals(table(whole, name)), name
    names = [{str(path.relative_to(where)) for path in where.rglob("*")} for where in (directory, whole)]
    assert names[0] == names[1]
    for path in (whole / "results").rglob("*.json"):
        assert (directory / path.relative_to(whole)).read_bytes() == path.read_bytes()


# Where a signal is heard, in the order of the work.
HEARD = (
    *("before sft seed 3", "after step 2 of tune sft seed 3", "after pretrain", "before blocks/mlp/up of layer 1"),
    *("after 4 of 6 examples of the reference", "after step 2 of tune attacked.lr=0.01 seed 0", "after tune"),
    *("after 1 of 2 batches of answers", "after evaluate", "after mlp/gate of layer 1", "after layer 1 of 3"),
)


@pytest.mark.slow
@pytest.mark.parametrize("heard", [HEARD[3:6:2], HEARD], ids=len)
def test_a_run_stopped_again_and_again_ends_as_an_undisturbed_one(
    whole, run, recipe, tmp_path, monkeypatch, capsys, heard
):
    for wanted in heard:

        def check(where, wanted=wanted):
            if wanted in where:
                raise signals.Stopped(15, where)

        with monkeypatch.context() as patch:
            patch.setattr(signals, "asked", lambda wanted=wanted: 15 if "step" in wanted else 0)
            patch.setattr(signals, "check", check)
            assert run("run", recipe, "--out", tmp_path / "torn") == 143, wanted
        assert wanted in capsys.readouterr().err
    assert run("run", recipe, "--out", tmp_path / "torn") == 0
    assert_same(tmp_path / "torn", whole)


# What is called in the order of the work, which call of it since the last kill, and whether it is done.
KILLS = (
    (metrics_file, "append_metrics", 1, "after"),
    (checkpoint, "save", 2, "before"),
    (checkpoint, "save", 2, "after"),
    (metrics_file, "append_metrics", 1, "before"),
    (export, "write", 1, "before"),
    (checkpoint, "save", 1, "before"),  # that of the references
    (checkpoint, "save", 1, "after"),
    (export, "write", 2, "after"),  # a model is there, and what it was made from
    (rows, "write", 5, "before"),
)


@pytest.mark.slow
def test_a_run_killed_where_no_one_can_catch_it_ends_as_an_undisturbed_one(whole, run, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "_SAVE_EVERY_S", -1.0)
    for module, name, count, when in KILLS:
        real, calls = getattr(module, name), []

        def dying(*given, real=real, calls=calls, count=count, when=when, **more):
            calls.append(None)
            if len(calls) == count and when == "before":
                raise Killed
            found = real(*given, **more)
            if len(calls) == count:
                raise Killed
            return found

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, dying)
            run("run", recipe, "--out", tmp_path / "torn")
    assert run("run", recipe, "--out", tmp_path / "torn") == 0
    assert_same(tmp_path / "torn", whole)


@pytest.mark.slow
def test_a_study_grows_by_analyses(checkpoints, few, run, tmp_path, capsys):
    """The short forms of both analyses have one directory, and neither is measured twice."""
    out = tmp_path / "run"
    words = {"weights": [], "activations": ["--prompts", few, "--answers", "3", "--max_tokens", "64"]}
    kept = {}
    for name in ("weights", "activations", "weights"):
        assert run("analyze", name, *checkpoints, "--out", out, *words[name]) == 0, capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        pieces = (out / "results" / "analyze").rglob("*.parquet")
        kept = {path: path.stat().st_mtime_ns for path in pieces if path.name != "verdicts.parquet"}
    found = table(out, "analyze")
    assert set(found.filter(method="tuned")["analysis"]) >= {"output_space", "spectrum", "clusters", "verdicts"}
    assert set(found.filter(method="pretrained")["analysis"]) == {"clusters", "verdicts"}
    capsys.readouterr()
    for name, more in (
        ("weights", ["--energy", "0.5"]),
        ("activations", [*words["activations"][:2], "--answers", "2"]),
    ):
        assert run("analyze", name, *checkpoints, "--out", out, *more) == 2
        assert "holds a run of another configuration" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text("".join(few.read_text().splitlines(keepends=True)[::-1]))
    assert run("analyze", "activations", *checkpoints, "--out", out, "--prompts", other, *words["activations"][2:]) == 2
    assert "subject.prompts is" in capsys.readouterr().err


def test_a_seed_may_have_its_own_checkpoint(params, checkpoints, encoder, run, tmp_path):
    """What others begin with; a model that is one for all seeds has an update from each."""
    (tmp_path / "base_0").symlink_to(checkpoints[0])
    shutil.copytree(checkpoints[0], tmp_path / "base_3")
    moved = hf.load(checkpoints[0], dtype="float32")[1]
    moved["blocks"]["mlp"]["up"] = 2 * moved["blocks"]["mlp"]["up"]
    shutil.rmtree(tmp_path / "base_3")
    hf.save(tmp_path / "base_3", moved, hf.read_config(checkpoints[0]), dtype="float32", source=checkpoints[0])
    models = {"t": {"from": "pretrained", "checkpoint": str(checkpoints[1])},
              "third": {"from": "t", "edit": "scaled", "alpha": 0.5}}  # fmt: skip
    about = {"checkpoint": "base_{seed}"}
    file = written(tmp_path, {"subject": about, "seeds": [0, 3], "models": models, "analyses": {"weights": {}}})
    assert run("run", file, "--out", tmp_path / "run") == 0
    where = {"analysis": "output_space", "metric": "changed_norm", "layer": 0, "part": "up"}
    found = table(tmp_path / "run", "analyze").filter(**where)
    after = hf.load(checkpoints[1], dtype="float32")[1]["blocks"]["mlp"]["up"][0]
    for seed, factor in ((0, 1), (3, 2)):
        base = factor * params[0]["blocks"]["mlp"]["up"][0]
        size = np.linalg.norm(after - base) / np.linalg.norm(base)
        for method, expected in (("t", size), ("third", size / 2)):
            assert found.filter(method=method, seed=seed)["value"].item() == pytest.approx(expected, rel=1e-4)
        made = hf.load(tmp_path / "run" / "models" / "third" / f"seed_{seed}", dtype="float32")[1]
        np.testing.assert_allclose(made["blocks"]["mlp"]["up"][0], (after + base) / 2, atol=2e-6)


@pytest.mark.slow
def test_examples_are_those_of_the_model(checkpoints, pairs, run, tmp_path, capsys):
    """A number of them are the first; a file of its own takes the place of the subject's. What reads them goes along,
    here a tokenizer whose template writes no end of an answer."""
    other = shutil.copytree(checkpoints[0], tmp_path / "other")
    template = json.loads((other / "tokenizer_config.json").read_text())["chat_template"]
    (other / "chat_template.jinja").write_text(template.replace("{{ eos_token }}", ""))
    (tmp_path / "first.jsonl").write_text("".join(pairs.read_text().splitlines(keepends=True)[:4]))
    how = {
        "from": "pretrained",
        "method": "sft",
        "steps": 3,
        "batch_size": 4,
        "lr": 1e-2,
        "parametrisation": {"rank": 2},
    }
    data = {"some": {"prompts": 4}, "own": {"file": "first.jsonl"}, "all": {}}
    models = {name: how | {"data": one} for name, one in data.items()}
    about = {"checkpoint": str(checkpoints[0]), "tokenizer": "other", "pairs": str(pairs), "max_tokens": 64}
    file = written(tmp_path, {"subject": about, "seeds": [0], "models": models})
    assert run("tune", file, "--out", tmp_path / "run") == 0
    made = [tmp_path / "run" / "models" / name / "seed_0" for name in data]
    some, own, every = ((place / "model.safetensors").read_bytes() for place in made)
    assert some == own != every
    assert all((place / "chat_template.jinja").exists() for place in made)
    assert "4 of 4 examples of some have an answer that no special token ends" in capsys.readouterr().err


def test_what_is_cut_of_examples_is_said(checkpoints, pairs, run, tmp_path, capsys):
    words = ("--method", "sft", "--steps", "1", "--batch_size", "4", "--lora_rank", "2", "--max_tokens", "16")
    words += ("--special_tokens", "text", "--seeds", "0,1")
    spelt = {"prompt": "Say", "chosen": "</s>"}
    (tmp_path / "pairs.jsonl").write_text(pairs.read_text() + json.dumps(spelt) + "\n")
    assert run("tune", checkpoints[0], "--data", tmp_path / "pairs.jsonl", "--out", tmp_path / "run", *words) == 0
    said = capsys.readouterr().err
    assert said.count("examples of tuned have more than 16 tokens and are cut") == 1
    assert said.count("1 of 9 examples of tuned spell special tokens of the model, which are encoded as text") == 1
    assert len(list((tmp_path / "run" / "models" / "tuned").iterdir())) == 2


def test_a_dry_run_tells_the_graph_and_the_memory_and_writes_nothing(recipe, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hf, "load", None)
    assert run("run", recipe, "--out", tmp_path / "run", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "sft: sft (defence) from pretrained; 1 lane x 2 seeds, program 1" in said
    assert "half: edit rank_part from sft; 1 lane x 2 seeds" in said
    assert "attacked: dpo (attack) from half; 2 lanes x 2 seeds, program 2" in said
    assert "attacked.lr=0.001, attacked.lr=0.01: 48,864 parameters, 2,784 trained; on one device:" in said
    assert "half: edited a tensor at a time; the largest need, 0.00 GiB, is that of " in said
    assert said.count("together") == said.count("it fits into the") - 1 == 2
    assert run("run", recipe, "--out", tmp_path / "run", "--dry_run", "--format", "json") == 0
    rows = {row["lane"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["pretrained", "sft", "half", *LEARNT[1:]]
    assert [rows[name]["program"] for name in rows] == [None, 1, None, 2, 2]
    assert [rows[name]["from"] for name in rows] == [None, "pretrained", "sft", "half", "half"]
    assert rows["sft"] == {
        "cell": "", "model": "sft", "lane": "sft", "made": "sft (defence)", "from": "pretrained", "seeds": 2,
        "program": 1, "steps": 4, "there": False,
    }  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_grid_over_checkpoints_begins_with_each(checkpoints, recipe, tmp_path):
    content = yaml.safe_load(recipe.read_text()) | {
        "grid": {"subject.checkpoint": [str(place) for place in checkpoints]}
    }
    found = cells.expand(yaml_file.parse(content, where="r"))
    assert [cell.name for cell in found] == ["checkpoint=base", "checkpoint=tuned"]
    for cell, place in zip(found, checkpoints, strict=True):
        assert (
            cell.recipe.lanes_of("pretrained")[0].how.checkpoint == cell.recipe.subject.options.checkpoint == str(place)
        )


def test_a_dry_run_of_a_finished_one_has_nothing_to_plan(recipe, run, whole, capsys):
    before = sorted(path.name for path in whole.iterdir())
    assert run("run", recipe, "--out", whole, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "2 lanes x 2 seeds, program 2, 2 there already" in said and "together" not in said
    assert sorted(path.name for path in whole.iterdir()) == before


def test_bad_input_in_an_edit_leaves_nothing_in_the_way(run, checkpoints, tmp_path, capsys):
    words = ("analyze", "merge", *checkpoints, "--out", tmp_path / "run", "--store", "float16", "--rank", "1")
    assert run(*words, "--alpha", "1e9") == 2
    assert "is not finite as float16" in capsys.readouterr().err
    # The first edit of the chain was made; the same command would go on from it.
    assert sorted(path.name for path in (tmp_path / "run" / "models").iterdir()) == ["merged_1"]
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    words = ("analyze", "merge", *checkpoints, "--out", tmp_path / "other", "--store", "float16")
    assert run(*words, "--alpha", "1e9") == 2 and not (tmp_path / "other").exists()
    assert run(*words, "--alpha", "0.5") == 0


SUBJECT = {"checkpoint": "b", "pairs": "p.jsonl", "prompts": "q.jsonl"}
SFT = {"from": "pretrained", "method": "sft"}
WORLD = {"a": {"method": "sft"}}
REUSED = {"from": {"run": "r", "model": "sft"}}
# Fields of a recipe, and the sentence.
UNSUITED = {
    "edits": (
        {"edits": {"e": {"edit": "scaled"}}},
        "edits.e: got one in a study of checkpoints, expected none: give the edited model a name below `models`",
    ),
    "attacks": (
        {"attacks": {"misgen": {}}},
        "attacks.misgen: misgen is not made on written answers, as a study of che",
    ),
    "analysis": (
        {"analyses": {"c": {"analysis": "clusters"}}},
        "analyses.c: clusters is of models in memory, expected one of checkpoints: weights, activations",
    ),
    "conditions": (
        {"evaluate": {"conditions": ["safe"]}},
        "evaluate.conditions: expected none, as a prompt's label says",
    ),
    "evaluated": ({"evaluate": {"on": ["a"]}}, "evaluate.on: expected none in a study of checkpoints, which judges e"),
    "answers": (
        {"evaluate": {"answers": 3}, "subject": {"checkpoint": "b"}},
        "evaluate.answers: got 3, and there are no subject.prompts to answer",
    ),
    "selected": (
        {"models": {"a": SFT, "s": {"select": "a"}}},
        "models.s.select: got a selection, expected none in a study of checkpoints",
    ),
    "reused": (
        {"models": {"a": REUSED}},
        "models.a.from: got a model of another run, expected `checkpoint: RUN/models/"
        "NAME/seed_{seed}`, as what another run has made is a directory",
    ),
    "whole": (
        {"models": {"a": SFT, "e": {"from": "a", "edit": "layer_part", "layer": 0}}},
        "models.e.edit: layer_part looks at whole models, expected one that goes matrix by matrix",
    ),
    "pool": (
        {"models": {"a": SFT | {"data": {"pool": "safety"}}}},
        "models.a.data.pool: safety is of a world, expected pairs",
    ),
    "no examples": (
        {"models": {"a": SFT}, "subject": {"checkpoint": "b"}},
        "models.a: there are no examples to train on, expected subject.pairs or data.file",
    ),
    "fresh": (
        {"models": {"a": {"method": "sft", "parametrisation": {"kind": "full"}}}},
        "models.a has no `from`: expected the model that training begins with",
    ),
    "part": (
        {"models": {"a": SFT, "c": SFT | {"from": "a", "parametrisation": {"kind": "mask"}}}},
        "models.c.parametrisation: got 'mask', expected full or lora over a checkpoint",
    ),
    "text": (
        {"models": {"a": SFT | {"method": "pretrain"}}},
        "models.a: method: 'pretrain' learns from text, expected one "
        "that learns from preferences, which the pool 'pairs' has",
    ),
    "other text": (
        {"models": {"a": SFT | {"method": "pretrain", "data": {"pool": "strange:TEXT"}}}},
        "models.a.method: pretrain learns from text, expected one that learns from preferences",
    ),
    "transformed": (
        {"models": {"a": SFT | {"method": "strange:BOTH"}}},
        "models.a.method: strange:BOTH asks a reference "
        "about examples that it transforms at every step, and a checkpoint's reference is read once: "
        "expected a method without one of the two",
    ),
    "an option of a command": (
        {"models": {"a": SFT | {"lora_rank": 2}}},
        "models.a has no field 'lora_rank'; did you mean 'parametrisation.rank'?",
    ),
    "a seed's": (
        {"models": {"a": SFT}, "subject": {"checkpoint": "b", "pairs": "p{seed}.jsonl"}},
        "subject: pairs: got p{seed}.jsonl, expected one for all seeds, without {seed}",
    ),
    "snapshots": ({"models": {"a": SFT | {"snapshots": 2}}}, "models.a.snapshots: got 2, expected 0 over a checkpoint"),
    "world, given": (
        {"subject": {"world": "tiny"}, "models": {"a": {"checkpoint": "b"}}},
        "models.a.checkpoint: expected a study of checkpoints, such as `subject: {checkpoint: DIR}`",
    ),
    "world, files": (
        {"subject": {"world": "tiny"}, "models": WORLD, "analyses": {"weights": {}}},
        "analyses.weights: weights is of checkpoints, and the study of world",
    ),
    "world, answers": (
        {"subject": {"world": "tiny"}, "models": WORLD, "evaluate": {"answers": 3}},
        "evaluate.answers: got 3, expected 0 but in a study of checkpoints",
    ),
    "world, pool": (
        {"subject": {"world": "tiny"}, "models": {"a": {"method": "sft", "data": {"pool": "pairs"}}}},
        "models.a.data.pool: pairs is of checkpoints: expected a pool of the subject's own",
    ),
}
STRANGE = """
from jaxsafety.methods import dpo
from jaxsafety.pools import pairs
TEXT = pairs.POOL._replace(examples="text")
BOTH = dpo.METHOD._replace(data=lambda batch, *, key, config: batch)
"""


@pytest.mark.parametrize("case", UNSUITED)
def test_what_a_study_cannot_have_is_one_sentence(case, tmp_path, monkeypatch):
    (tmp_path / "strange.py").write_text(STRANGE)
    monkeypatch.syspath_prepend(tmp_path)
    fields, message = UNSUITED[case]
    with pytest.raises(ValueError) as told:
        yaml_file.parse({"name": "r", "subject": SUBJECT, "models": {"a": SFT}} | fields, where="here")
    assert str(told.value).removeprefix("here: ").startswith(message)


def test_what_a_study_has_by_default():
    """The checkpoint as the first model, an adapter, and nothing that is of a world."""
    plain = Recipe(name="r", subject={"checkpoint": "b"}, seeds=(0,))
    assert list(plain.models) == ["pretrained"] and not (plain.edits or plain.attacks or plain.analyses)
    (_, lane) = Recipe(name="r", subject=SUBJECT, models={"a": SFT}).lanes
    how = lane.training
    assert (how.batch_size, how.lr, how.chunk_steps, how.optim.weight_decay) == (8, 1e-4, 10, 0.0)
    assert (how.parametrisation.kind, how.parametrisation.options.rank, how.data.pool) == ("lora", 16, "pairs")
    named = {"mine": {"checkpoint": "c"}, "a": SFT | {"from": "mine"}}
    assert list(Recipe(name="r", subject=SUBJECT, models=named).models) == ["mine", "a"]
    given = {"t": {"from": "pretrained", "checkpoint": "c"}}
    assert list(Recipe(name="r", subject=SUBJECT, models=given).models) == ["pretrained", "t"]


def test_a_model_that_diverges_stops_none_but_those_that_go_by_it(run, recipe, checkpoints, tmp_path, capsys):
    content = yaml.safe_load(recipe.read_text())
    sft = content["models"]["sft"] | {"lr": {"bad": 1e38, "ok": 1e-3}, "chunk_steps": 4}
    content["models"] = {"sft": sft, "half": {"from": "sft", "edit": "scaled", "alpha": 0.5}}
    for file in ("few.jsonl", "pairs.jsonl"):
        shutil.copy(recipe.parent / file, tmp_path)
    (tmp_path / "base").symlink_to(checkpoints[0])
    for _ in range(2):
        assert run("run", written(tmp_path, content), "--out", tmp_path / "run") == 1
        err = capsys.readouterr().err
        assert "sft.bad seed 0: the loss or its gradient is not finite" in err and "2 diverged in all" in err
        made = {path.parent.parent.name for path in (tmp_path / "run" / "models").rglob("config.json")}
        assert made == {"sft.ok", "half.from=sft.ok"}


def test_seeds_take_no_cpu_device_each(recipe, tmp_path, monkeypatch):
    """Where models are made one by one two devices would share each, as no short form's do."""
    configured = []
    monkeypatch.setattr(command, "_configure_jax", lambda _, *, seeds: configured.append(seeds))
    assert command.main(["run", str(recipe), "--out", str(tmp_path / "run"), "--dry_run"]) == 0
    assert configured == [1]
