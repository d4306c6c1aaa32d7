"""Runs made of other people's checkpoints: what a run trained here has, or one sentence and nothing written.

The files are the format's own arrays in NumPy's archive instead of torch's, so that no torch is needed.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsafety.cli import main as command
from jaxsafety.formats import official, official_file
from jaxsafety.recipe import yaml_file
from jaxsafety.rundir import manifest_file, metrics_file, results
from jaxsafety.study import evaluate, imported, pipeline, train
from jaxsafety.tree import flatten
from tests.formats import official_reference as reference

MODELS = ["pretrained", *(f"{method}:{rate}" for method in ("sft", "dpo") for rate in ("eta_M", "eta_S"))]


def mini_of(recipe):
    """The miniature study as models that were trained elsewhere: of their last step alone something is known."""
    models = {label: given | {"chunk_steps": given["steps"], "snapshots": 0} for label, given in recipe.models.items()}
    return replace(recipe, models=models)


def paper_of(recipe):
    """The recipe's subject in the paper's world."""
    return replace(recipe.subject.options, world="paper")


@pytest.fixture(scope="module")
def recipe(mini_recipe):
    return mini_of(mini_recipe)


@pytest.fixture(scope="module")
def tensors_of(tiny_world, recipe):
    """Draws a model of theirs in the sizes of the miniature study, with a window as long as theirs or longer."""

    def draw(number, **changed):
        config = recipe.subject.options.model.build(tiny_world)
        sizes = {"v": config.vocab_size, "t": config.max_tokens + 5, "layers": config.layers, "d": 16, "f": 64}
        return reference.state_dict(**sizes | changed, seed=number)

    return draw


@pytest.fixture(autouse=True, scope="module")
def without_torch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official_file, "read", lambda file: dict(np.load(file)))
        yield


def fill(folder, recipe, tensors_of):
    (folder / "mini.yaml").write_text(yaml_file.to_yaml(recipe))
    for number, (model, seed) in enumerate((model, seed) for model in MODELS for seed in recipe.seeds):
        save(folder / name_of(model, seed), tensors_of(number))
    return folder


@pytest.fixture
def folder(tmp_path, recipe, tensors_of):
    """A directory with the recipe and a file for each of its models and seeds."""
    return fill(tmp_path, recipe, tensors_of)


@pytest.fixture(scope="module")
def made(tmp_path_factory, recipe, tensors_of):
    """Such a directory with the run that was made of it, in an empty directory, and what the command has printed."""
    directory, printed = fill(tmp_path_factory.mktemp("made"), recipe, tensors_of), []
    (directory / "run").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_configure_jax", lambda *_, **__: None)
        patch.setattr("sys.stdout.write", printed.append)
        assert command.main([str(word) for word in words(directory)]) == 0
    return directory, "".join(printed)


@pytest.fixture
def copied(made, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(made[0], tmp_path / "copied")


def name_of(model, seed="{seed}"):
    return f"{model.replace(':', '_')}_{seed}.npz"


def save(file, tensors):
    np.savez(file, **tensors)


def words(folder, *, models=MODELS, **changed):
    """The command line that imports models; ``changed`` has other files or whole words for some of them."""
    paths = {model: str(folder / name_of(model)) for model in models} | changed
    tuned = [f"{model}={path}" for model, path in paths.items() if model != "pretrained"]
    flags = [word for one in tuned for word in ("--tuned", one)]
    return ["import", folder / "mini.yaml", "--pretrained", paths["pretrained"], *flags, "--out", folder / "run"]


def contents(directory):
    """What does not depend on when, where and under which name it was made."""
    found = {name: (directory / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    for path in directory.glob("checkpoints/*/*/digests.json"):
        found[path.relative_to(directory)] = json.loads(path.read_text())["leaves"]
    return found


def test_every_model_is_in_its_place(made, recipe, tensors_of):
    folder, printed = made
    assert printed == f"{folder / 'run'}\n"
    models = evaluate.gather(pipeline.prepare(recipe, folder / "run"))
    assert [":".join(filter(None, label[:2])) for label in models.labels] == MODELS and models.finite.all()
    for h in range(len(MODELS)):
        for s in range(len(recipe.seeds)):
            wanted, _ = official.convert(tensors_of(h * len(recipe.seeds) + s), heads=2)
            own = jax.tree.map(lambda leaf, at=(h, s): leaf[at], models.params)
            for path, leaf in flatten(wanted).items():
                np.testing.assert_array_equal(flatten(own)[path], leaf, err_msg=path)


def test_the_record_says_which_files_they_come_from(made):
    folder, _ = made
    about = manifest_file.read_manifest(folder / "run")["imported"]
    assert len(set(about["sha256"].values())) == 2 * len(MODELS) == len(about["files"])
    assert about["files"]["dpo.eta_S of seed 5"] == str(folder / "dpo_eta_S_5.npz")
    rows = metrics_file.read_metrics(folder / "run")
    assert len(rows) == 2 * len(MODELS) and all(row["step"] == 6 and "loss" not in row for row in rows)
    assert all(0 <= row["safe/exact_match"] <= 1 for row in rows)


@pytest.mark.slow
def test_it_is_evaluated_and_reported_as_a_run_trained_here(main, copied, capsys):
    folder = copied
    before = contents(folder / "run")
    for verb in ("evaluate", "report"):
        assert main(verb, folder / "mini.yaml", "--out", folder / "run") == 0
    assert "SFT" in capsys.readouterr().out and contents(folder / "run") == before
    rows = results.read_results([folder / "run" / "results" / "curves.parquet"])
    assert set(rows["step"]) == {6} and "loss" not in set(rows["metric"])
    assert "imported.sha256.pretrained of seed 3" in (folder / "run" / "report.html").read_text()


@pytest.mark.slow
def test_it_is_analysed_as_a_run_trained_here(main, folder):
    """Nothing is trained; analyses, claims and figures are there, and ``run`` does all of it."""
    assert main(*words(folder)) == 0
    before = contents(folder / "run")
    assert main("run", folder / "mini.yaml", "--out", folder / "run") == 0
    assert main("claims", folder / "run") == 0
    assert main("figure", "clusters", folder / "run", "--out", folder / "clusters.svg") == 0
    assert not {"pretrain", "tune"} & manifest_file.read_manifest(folder / "run").keys()
    assert contents(folder / "run") == before
    rows = results.read_results([folder / "run" / "results" / "analyze.parquet"], schema=results.ANALYSIS_SCHEMA)
    assert rows["value"].is_not_null().any() and set(rows["step"]) == {0, 6}


def test_the_same_command_again_changes_nothing_and_needs_no_torch(main, made, monkeypatch):
    folder, _ = made
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    monkeypatch.setattr(official_file, "read", lambda _: pytest.fail("read again"))
    assert main(*words(folder)) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")} == before


@pytest.mark.slow
def test_killed_while_it_writes_it_leaves_nothing_there_and_goes_again(main, folder, made, monkeypatch):
    """What a kill leaves beside is deleted by the next one, which makes the same run."""
    undisturbed = contents(made[0] / "run")
    adopt, calls = train.adopt, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        adopt(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "adopt", killed)
        patch.setattr(imported.shutil, "rmtree", lambda *_, **__: None)  # no kill -9 tidies up
        assert main(*words(folder)) == 130
    assert not (folder / "run").exists() and (folder / ".run.importing" / "checkpoints" / "pretrained").exists()
    (folder / ".run.importing" / "stray").write_text("")
    assert main(*words(folder)) == 0
    assert contents(folder / "run") == undisturbed and not (folder / ".run.importing").exists()
    assert not (folder / "run" / "stray").exists()


def test_an_error_while_it_writes_leaves_nothing_at_all(main, folder, monkeypatch):
    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(train, "adopt", full)
    before = sorted(folder.iterdir())
    assert main(*words(folder)) == 2
    assert sorted(folder.iterdir()) == before


@pytest.fixture
def refuse(main, tmp_path, capsys):
    """Runs an import that must end in one sentence and exit code 2 and leave all files where they were."""

    def sentence(*words):
        before = sorted(tmp_path.rglob("*"))
        assert main(*words) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("jaxsafety: ") and err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return sentence


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sfft:eta_M": "x"}, "unknown model in --tuned 'sfft:eta_M': expected one of sft:eta_M, sft:eta_S"),
        ({"sft:eta_m": "x"}, "unknown model in --tuned 'sft:eta_m': expected one of sft:eta_M, sft:eta_S"),
        ({"sft": "x"}, "unknown model in --tuned 'sft': expected one of sft:eta_M"),
        ({"sft:eta_M": ""}, "--tuned: got 'sft:eta_M=', expected MODEL:POINT=FILE"),
        ({"pretrained": "one.npz"}, "one.npz is one file for the seeds [3, 5]: expected {seed} in its path"),
    ],
)  # fmt: skip
def test_a_word_that_names_no_model_is_refused(refuse, folder, changed, message):
    assert message in refuse(*words(folder, **changed))


def test_a_model_named_twice_or_not_at_all_is_refused(refuse, folder):
    assert "--tuned names sft:eta_M twice" in refuse(*words(folder), "--tuned", "sft:eta_M=x_{seed}")
    message = refuse(*words(folder, models=MODELS[:3]))
    assert "no file for dpo:eta_M, dpo:eta_S: expected --tuned for every tuned model" in message


@pytest.mark.slow
def test_a_recipe_without_the_missing_models_takes_the_others(main, folder):
    given = words(folder, models=["pretrained", "sft:eta_M"])
    one = "{method: pretrain, steps: 6, chunk_steps: 6}"
    fewer = [
        "--models",
        f"{{pretrained: {one}, sft: {{from: pretrained, method: sft, steps: 6, chunk_steps: 6, lr: {{eta_M: 1e-3}}}}}}",
    ]
    assert main(*given, *fewer) == 0
    assert set(manifest_file.read_manifest(folder / "run")["imported"]["files"]) == {
        f"{model} of seed {seed}" for model in ("pretrained", "sft.eta_M") for seed in (3, 5)
    }
    assert list(yaml_file.read(folder / "run" / "config.yaml").models) == ["pretrained", "sft"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--models.sft.snapshots", "2"], "models.sft.snapshots: got 2, expected 0"),
        (["--models.dpo.chunk_steps", "2"], "models.dpo.chunk_steps: got 2, expected its steps (6)"),
        (["--models.pretrained.chunk_steps", "3"], "models.pretrained.chunk_steps: got 3, expected its steps (6)"),
        (["--subject.worlds", "per_seed"], "import: got worlds: per_seed, expected the one world that the files"),
        (["--grid", "{subject.model.width: [16, 32]}"], "import makes one run, and the recipe has a `grid:`"),
        (["--subject.model.layers", "2"], "pretrained_3.npz: layers is 1, expected 2 by the recipe's model"),
        (["--subject.model.width", "32"], "pretrained_3.npz: width is 16, expected 32 by the recipe's model"),
        (
            ["--subject.model.block", "pre_ln"],
            "pretrained_3.npz: block is paper, expected pre_ln by the recipe's model",
        ),
        (
            ["--subject.model.positions", "rope"],
            "pretrained_3.npz: positions is sinusoidal, expected rope by the recipe's",
        ),
        (["--subject.world", "paper"], "pretrained_3.npz: its window is"),
        (["--models.sft.stps", "2"], "models.sft has no field 'stps'; did you mean 'steps'?"),
    ],
)
def test_a_recipe_that_they_do_not_belong_to_is_refused(refuse, folder, override, message):
    assert message in refuse(*words(folder), *override)


def test_a_file_that_is_not_the_recipes_model_is_refused(refuse, folder, tensors_of):
    file = folder / "sft_eta_S_5.npz"
    good = tensors_of(7)
    for tensors, message in (
        (tensors_of(7, v=20), f"{file}: it has 20 tokens, expected the"),
        (tensors_of(7, f=32), f"{file}: mlp_width is 32, expected 64 by the recipe's model"),
        (
            good | {"module.lm_head.weight": good["module.lm_head.weight"] * np.nan},
            "lm_head.weight holds values that ar",
        ),
        (
            {name: value for name, value in good.items() if "ln_f.bias" not in name},
            "lacks transformer.ln_f.bias, which",
        ),
    ):
        save(file, tensors)
        assert message in refuse(*words(folder))
    file.unlink()
    assert f"no file at {file}: expected a checkpoint of the authors'; did you mean 'sft_eta_S_3.npz" in refuse(
        *words(folder)
    )
    file.write_bytes((folder / "dpo_eta_M_5.npz").read_bytes())
    message = refuse(*words(folder))
    assert "sft.eta_S of seed 5 and dpo.eta_M of seed 5 are files of the same content: expected one for each" in message


def test_a_directory_that_holds_anything_else_is_refused(refuse, copied, tensors_of):
    folder = copied
    assert "models.pretrained.lr is 0.001 there and 0.5 here" in refuse(*words(folder), "--models.pretrained.lr", "0.5")
    save(folder / "sft_eta_M_3.npz", tensors_of(99))
    assert "holds sft.eta_M of seed 3 imported from a file of other content" in refuse(*words(folder))
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("mine")
    assert "is no run and not empty" in refuse(*words(folder)[:-1], folder / "other")
    assert "is no run and not empty" in refuse(*words(folder)[:-1], folder / "mini.yaml")
    (folder / "other" / "config.yaml").write_bytes((folder / "mini.yaml").read_bytes())
    assert "holds a run that was not imported" in refuse(*words(folder)[:-1], folder / "other")


def test_an_empty_directory_is_filled(made):
    assert (made[0] / "run" / "config.yaml").exists()


def test_heads_that_are_not_those_of_the_authors_width_are_refused(paper_world, recipe, monkeypatch):
    tensors = reference.state_dict(v=59, t=120, layers=1, d=48, f=192)
    monkeypatch.setattr(official_file, "read", lambda _: tensors)
    wide = replace(own := paper_of(recipe), model=replace(own.model, width=48))
    with pytest.raises(ValueError, match=r"^subject\.model\.heads: got 2, expected the 3 of the authors' width 48"):
        imported._params(Path("their.pt"), wide, paper_world)


@pytest.mark.parametrize("size", [52, 60])
def test_another_vocabulary_than_the_papers_is_refused(paper_world, recipe, monkeypatch, size):
    tensors = reference.state_dict(v=size, t=120, layers=1, d=16, f=64)
    monkeypatch.setattr(official_file, "read", lambda _: tensors)
    with pytest.raises(ValueError, match=f"it has {size} tokens, expected the 59 of the world paper, or 54 without"):
        imported._params(Path("their.pt"), paper_of(recipe), paper_world)


def test_all_models_know_the_tokens_that_the_smallest_knows(paper_world, recipe, monkeypatch):
    """What a tuned model holds for the tokens of no prompt is no update of a pretrained model without them."""
    sizes = {"pretrained": 54, "tuned": 59}

    def read(file):
        return reference.state_dict(v=sizes[file.name], t=120, layers=1, d=16, f=64)

    monkeypatch.setattr(official_file, "read", read)
    own = paper_of(recipe)
    base, tuned = (imported._params(Path(name), own, paper_world) for name in sizes)
    assert base["embed"].shape == (54, 16) and tuned["embed"].shape == (59, 16)
    same = imported._same_tokens({("pretrained", 0): base, ("sft.eta_M", 0): tuned}, paper_world)
    for loaded, made in zip((base, tuned), same.values(), strict=True):
        np.testing.assert_array_equal(made["embed"], np.pad(loaded["embed"][:54], ((0, 5), (0, 0))))
        begins = made["unembed"][:, [paper_world.special["bos"]]]
        np.testing.assert_array_equal(made["unembed"][:, :54], loaded["unembed"][:, :54])
        np.testing.assert_array_equal(made["unembed"][:, 54:], np.repeat(begins, 5, axis=1))
    alone = imported._same_tokens({("sft.eta_M", 0): tuned}, paper_world)
    jax.tree.map(np.testing.assert_array_equal, *alone.values(), tuned)


@pytest.mark.slow
def test_the_program_reads_files_of_torch_or_says_what_to_install(folder, tensors_of, cache_directory):
    there = importlib.util.find_spec("torch") is not None
    for number, model in enumerate(MODELS if there else ()):
        reference.save(folder / name_of(model, 3), tensors_of(number))
    program = [sys.executable, "-c", "import sys; from jaxsafety.cli.main import main; sys.exit(main())"]
    flags = ["--seeds", "[3]", "--compilation_cache", cache_directory]
    done = subprocess.run(
        [str(word) for word in (*program, *words(folder), *flags)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    if there:
        assert done.returncode == 0, done.stderr
        assert len(manifest_file.read_manifest(folder / "run")["imported"]["files"]) == len(MODELS)
    else:
        assert done.returncode == 2 and not (folder / "run").exists()
        assert done.stderr.count("\n") == 1 and 'pip install ".[official]" in a checkout' in done.stderr
