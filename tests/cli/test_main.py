"""The command line: bad input is one sentence and exit code 2 with nothing half-written; samples, help, stages."""

import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from typing import get_args

import jax
import pytest
import yaml

import jaxsafety.report
from jaxsafety import keys, world
from jaxsafety.claims import judging
from jaxsafety.claims.jain2024 import CLAIMS
from jaxsafety.cli import main
from jaxsafety.recipe import yaml_file
from jaxsafety.rundir import checkpoint, manifest_file, opening
from jaxsafety.study import pipeline, train
from jaxsafety.world import text
from tests.disturbed import die_before_saving

STAGES = ("run", "pretrain", "tune", "evaluate", "analyze", "report")

# Recipe text, and what the sentence must hold.
BAD_RECIPES = {
    "old key": ("pretrain: {steps: 5}", "`pretrain` is now a model without `from`"),
    "unknown key": ("models: {a: {method: sft, stps: 5}}", "models.a has no field 'stps'; did you mean 'steps'?"),
    "wrong type": ("models: {a: {method: sft, steps: many}}", "models.a: steps must be an integer, got 'many'"),
    "negative size": ("models: {a: {method: sft, batch_size: -4}}", "models.a: batch_size must be > 0 and finite"),
    "circle": ("models: {a: {from: b}, b: {from: a}}", "models wait for each other: a <- b <- a"),
    "zero size": ("subject: {world: tiny, model: {layers: 0}}", "layers: got 0, expected an integer of at least 1"),
    "heads": ("subject: {world: tiny, model: {heads: 5}}", "heads: got 5, expected a divisor of width 64"),
    "unknown method": (
        "models: {a: {method: dbo}}",
        "unknown method 'dbo': expected one of pretrain, sft, dpo, unlearn",
    ),
    "unknown world": (
        "subject: {world: tinny}",
        "subject: unknown world 'tinny': expected one of paper, tiny; did you mean 'tiny'?",
    ),
    "no subject": ("subject: {}", "subject must have the field world or checkpoint or trajectory, or `kind: "),
    "old world": ("world: paper", "`world` is now a field of `subject`, such as `subject: {world: tiny}`"),
    "old model": ("model: {preset: small}", "`model` is now a field of `subject`, such as `subject: {world: tiny, m"),
    "unknown condition": ("evaluate: {conditions: [jb]}", "expected one of safe, unsafe, jb_co_task"),
    "unknown text condition": ("subject: {world: tiny, grammars: {saf: x.pcfg}}", "unknown text condition 'saf'"),
    "missing grammar": ("subject: {world: tiny, grammars: {safe: nowhere.pcfg}}", "nowhere.pcfg"),
    "no seeds": ("seeds: []", "seeds must name at least one seed, got none"),
    "same seed twice": ("seeds: [2, 2]", "seeds must be distinct, got [2, 2]"),
    "zero rate": ("models: {a: {method: sft, lr: {eta_M: 0}}}", "models.a: lr must be > 0 and finite, got 0.0"),
    "nan rate": ("models: {a: {method: sft, lr: .nan}}", "models.a: lr must be > 0 and finite, got nan"),
    "energy": ("analyses: {output_space: {energy: 1.5}}", "energy must be > 0 and <= 1 and finite, got 1.5"),
    "ranks": ("edits: {r: {edit: rank_part, rank: [4, 0]}}", "edits.r: rank must be >= 1 and finite, got 0"),
    "moved": ("analyze: {ranks: [4]}", "analyze.ranks is called edits.rank.rank"),
    "analyze prompts": ("analyze: {prompts: 1024}", "analyze.prompts must be at most half of evaluate.prompts (1024)"),
    "snapshots": ("models: {a: {method: sft, snapshots: -1}}", "models.a: snapshots must be >= 0 and finite, got -1"),
    "empty": ("", "is empty: expected the fields of a recipe"),
    "not YAML": ("subject: [", "is not YAML"),
    "not fields": ("- tiny", "must hold fields such as `subject: {world: tiny}`, got a list"),
}


@pytest.fixture
def refuse(main, capsys):
    """Runs a command line that must end in one sentence on standard error and exit code 2; returns the sentence."""

    def sentence(*words):
        capsys.readouterr()
        assert main(*words) == 2
        out, err = capsys.readouterr()
        # What stands before the last line is the progress of stages that went well.
        assert out == "" and err.endswith("\n") and "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith("jaxsafety: ")
        return last

    return sentence


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished_run, tmp_path / "mini")


def python(*words, **environment):
    command = [sys.executable, *map(str, words)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_is_one_sentence_and_leaves_nothing(refuse, tmp_path, monkeypatch, case):
    text, message = BAD_RECIPES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    assert message in refuse("run", "bad.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_grammar_too_short_for_the_window_is_one_sentence(refuse, tmp_path):
    (tmp_path / "short.pcfg").write_text("v -> 'a' 'b' [1.0]\n")
    (tmp_path / "bad.yaml").write_text(f"subject: {{world: tiny, grammars: {{safe: {tmp_path / 'short.pcfg'}}}}}")
    message = refuse("pretrain", tmp_path / "bad.yaml", "--out", tmp_path / "out")
    assert "is too short for windows of 8 letters" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evaluate.promts", "5"], "unrecognized arguments: --evaluate.promts 5; did you mean 'evaluate.prompts'?"),
        (["--models.sft.stps", "5"], "models.sft has no field 'stps'; did you mean 'steps'?"),
        (["--models.*.steps", "0"], "models.pretrained: steps must be > 0 and finite, got 0"),
        (["--tune.steps", "5"], "--tune.steps: `tune` is now a model for each of its methods"),
        (["--world", "paper"], "--world: `world` is now a field of `subject`, such as `subject: {world: tiny}`"),
        (["--model.width", "8"], "--model.width: `model` is now a field of `subject`"),
        (["--subject.model.widht", "8"], "subject.model has no field 'widht': it has preset, block, positions, layers"),
        (["--seeds", "[1,1]"], "seeds must be distinct, got [1, 1]"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_bad_override_is_one_sentence(refuse, mini_yaml, tmp_path, words, message):
    assert message in refuse("run", mini_yaml, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_one_sentence(refuse, tmp_path):
    assert "no recipe file at" in refuse("run", tmp_path / "nowhere.yaml")


def test_a_changed_recipe_in_the_same_directory_is_refused_naming_the_fields(refuse, mini_yaml, run):
    before = (run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    message = refuse("run", mini_yaml, "--out", run, "--models.sft.steps", "8", "--seeds", "[3,6]")
    assert "models.sft.steps is 6 there and 8 here" in message and "seeds is [3, 5] there and [3, 6] here" in message
    assert "choose another output directory (--out)" in message
    assert ((run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before


def test_an_output_directory_that_cannot_be_written_is_one_sentence(refuse, mini_yaml, tmp_path):
    (tmp_path / "file").write_text("")
    message = refuse("run", mini_yaml, "--out", tmp_path / "file" / "out")
    assert "cannot write to the run directory" in message and "choose another" in message


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("tune", "run `jaxsafety pretrain` on it first"),
        ("evaluate", "run `jaxsafety pretrain` on it first"),
        ("analyze", "run `jaxsafety pretrain` on it first"),
        ("report", "run `jaxsafety evaluate` on it first"),
    ],
)
def test_a_stage_before_its_turn_is_one_sentence(refuse, mini_yaml, tmp_path, verb, message):
    assert message in refuse(verb, mini_yaml, "--out", tmp_path / "out")


def newest(run, leg="pretrained"):
    return run / "checkpoints" / leg / "00000006"


def test_a_truncated_checkpoint_is_named_with_what_to_do(refuse, mini_yaml, run):
    shutil.rmtree(run / "results")
    file = max((path for path in newest(run).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-7])
    message = refuse("evaluate", mini_yaml, "--out", run)
    assert f"checkpoint {newest(run)} is damaged" in message
    assert f"remove {newest(run).parent}, which holds no intact one, to train pretrained again" in message


@pytest.fixture
def torn(main, mini_yaml, tmp_path):
    """A run that died at the end of pretraining, of which two checkpoints are there."""
    run = tmp_path / "torn"
    die_before_saving(lambda: main("pretrain", mini_yaml, "--out", run), "pretrained", 6)
    assert checkpoint.steps(run / "checkpoints" / "pretrained") == [2, 4]
    return run


@pytest.mark.slow
def test_a_damaged_checkpoint_of_unfinished_training_comes_with_advice_too(refuse, main, mini_yaml, torn, finished_run):
    folder = torn / "checkpoints" / "pretrained"
    cut(folder / "00000004" / "digests.json")
    message = refuse("pretrain", mini_yaml, "--out", torn)
    assert "remove it to continue from step 2" in message and "which is intact" in message
    shutil.rmtree(folder / "00000004")
    assert main("pretrain", mini_yaml, "--out", torn) == 0
    assert digests(newest(torn)) == digests(newest(finished_run))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def digests(path):
    return json.loads((path / "digests.json").read_text())["leaves"]


def rows(path):
    from jaxsafety.rundir import results

    schema = results.ANALYSIS_SCHEMA if path.name == "analyze.parquet" else results.SCHEMA
    return results.read_results([path], schema=schema).drop("revision")


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda path: cut(path / "digests.json"), shutil.rmtree], ids=["cut", "gone"])
def test_the_advice_for_a_damaged_snapshot_brings_it_back(refuse, main, mini_yaml, run, finished_run, damage):
    snapshot, results = run / "snapshots" / "sft.eta_S" / "00000002", run / "results"
    damage(snapshot)
    (results / "analyze" / "step_00000002.parquet").unlink()
    (results / "analyze.parquet").unlink()
    message = refuse("analyze", mini_yaml, "--out", run)
    assert str(snapshot.parent) in message
    assert message.partition(": remove ")[2] == (
        f"{run / 'checkpoints' / 'sft.eta_S'} and run `jaxsafety tune` to train sft.eta_S again from the start, "
        "which saves the same snapshots"
    )
    shutil.rmtree(run / "checkpoints" / "sft.eta_S")
    for verb in ("tune", "analyze"):
        assert main(verb, mini_yaml, "--out", run) == 0
    assert digests(snapshot) == digests(finished_run / "snapshots" / "sft.eta_S" / "00000002")
    assert digests(newest(run, "sft.eta_S")) == digests(newest(finished_run, "sft.eta_S"))
    assert rows(results / "analyze.parquet").equals(rows(finished_run / "results" / "analyze.parquet"))


@pytest.mark.slow
def test_the_advice_for_a_damaged_checkpoint_trains_from_the_start(refuse, main, mini_yaml, run, finished_run):
    folder = run / "checkpoints" / "pretrained"
    cut(folder / "00000006" / "digests.json")
    (run / "results" / "examples.json").unlink()
    assert f"remove {folder}, which holds no intact one, to train" in refuse("evaluate", mini_yaml, "--out", run)
    shutil.rmtree(folder)
    assert main("pretrain", mini_yaml, "--out", run) == 0
    assert digests(newest(run)) == digests(newest(finished_run))


@pytest.mark.slow
def test_the_advice_for_lost_rows_of_the_metrics_brings_them_back(refuse, main, mini_yaml, run, finished_run):
    name = "results/curves.parquet"
    (run / name).unlink()
    path = run / "metrics.jsonl"
    path.write_text(
        "".join(
            line
            for line in path.read_text().splitlines(keepends=True)
            if '"dpo"' not in line or '"step": 4' not in line
        )
    )
    message = refuse("evaluate", mini_yaml, "--out", run)
    lost = run / "checkpoints" / "dpo.eta_M"
    assert f"{path} lacks a row of dpo.eta_M (lr 0.001, seed 3, step 4): remove {lost} and" in message
    for rate in ("eta_M", "eta_S"):
        shutil.rmtree(run / "checkpoints" / f"dpo.{rate}")
    for verb in ("tune", "evaluate"):
        assert main(verb, mini_yaml, "--out", run) == 0
    assert path.read_bytes() == (finished_run / "metrics.jsonl").read_bytes()
    assert rows(run / name).equals(rows(finished_run / name))


@pytest.mark.parametrize(
    "name",
    ["analyze.parquet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("curves.parquet", "examples.json"))],
)
def test_the_advice_for_a_damaged_result_brings_it_back(refuse, main, mini_yaml, run, finished_run, name):
    path = run / "results" / name
    cut(path)
    assert f"{path} is not" in (message := refuse("report", mini_yaml, "--out", run))
    assert message.endswith(": remove it and run its stage again, which writes it anew")
    path.unlink()
    assert main("analyze" if name == "analyze.parquet" else "evaluate", mini_yaml, "--out", run) == 0
    whole = finished_run / "results" / name
    assert path.read_bytes() == whole.read_bytes() if path.suffix == ".json" else rows(path).equals(rows(whole))


def test_a_checkpoint_of_another_model_is_refused_naming_both_sides(refuse, mini_yaml, run):
    shutil.rmtree(run / "results")
    ready = pipeline.prepare(yaml_file.read(run / "config.yaml"), run)
    found = pipeline.load(ready, ready.recipe.lanes[:1])
    checkpoint.save(newest(run).parent, jax.tree.map(lambda leaf: leaf[0, :1], found._asdict()), step=6)
    message = refuse("evaluate", mini_yaml, "--out", run)
    assert "is of another state" in message and "found float32[1," in message and "expected float32[2," in message


@pytest.mark.slow
def test_a_full_disk_while_saving_is_one_sentence_and_the_previous_checkpoint_survives(
    refuse, main, mini_yaml, torn, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "posix_fallocate", full)
        message = refuse("pretrain", mini_yaml, "--out", torn)
    assert "No space left on device" in message and "earlier checkpoints are intact" in message
    folder = torn / "checkpoints" / "pretrained"
    assert sorted(path.name for path in folder.iterdir()) == ["00000002", "00000004"]
    assert main("pretrain", mini_yaml, "--out", torn) == 0
    assert checkpoint.latest(folder) == 6


def test_a_missing_extra_is_said_before_the_work(refuse, mini_yaml, tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else object())
    monkeypatch.delitem(sys.modules, "jaxsafety.report")
    monkeypatch.delattr(jaxsafety, "report")
    message = refuse("run", mini_yaml, "--out", tmp_path / "out")
    assert 'needs jinja2: pip install ".[report]" in a checkout' in message
    assert not (tmp_path / "out").exists()


def test_a_run_in_use_by_another_process_is_one_sentence(refuse, mini_yaml, run):
    recipe = yaml_file.read(mini_yaml)
    with opening.open_run(run, yaml_file.as_dict(recipe)):
        message = refuse("report", mini_yaml, "--out", run)
    assert "is in use by another process" in message


def test_an_interrupt_says_how_to_continue(main, mini_yaml, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    assert main("run", mini_yaml, "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err == "jaxsafety: interrupted; the same command continues from the last checkpoint\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_between_stages_with_the_conventional_code(
    main, mini_yaml, tmp_path, capsys, monkeypatch, number, code
):
    stages = []

    def asked(_, stage):
        stages.append(stage)
        signal.raise_signal(number)

    monkeypatch.setattr(train, "train", asked)
    assert main("run", mini_yaml, "--out", tmp_path / "out") == code
    assert stages == ["pretrain"]
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"jaxsafety: stopped by {number.name} after pretrain: the same command continues"
    assert {"seconds", "devices"} <= manifest_file.read_manifest(tmp_path / "out")["pretrain"].keys()


def test_the_printed_configuration_is_a_recipe_that_repeats_the_study(main, mini_yaml, tmp_path, capsys):
    assert main("run", mini_yaml, "--print_config", "--models.sft.steps", "8") == 0
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text)
    again = yaml_file.read(tmp_path / "again.yaml")
    assert again == yaml_file.read(mini_yaml, overrides=["--models.sft.steps", "8"])
    assert main("run", tmp_path / "again.yaml", "--print_config") == 0
    assert capsys.readouterr().out == text


@pytest.mark.usefixtures("undrawn")
def test_the_recorded_configuration_continues_its_own_run(main, run, capsys):
    assert main("report", run / "config.yaml", "--out", run) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:1] and f"report: {run / 'report.html'}" in out
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "mini"


@pytest.mark.parametrize(
    "recorded",
    [
        "world: tiny\nmodel: {}\npretrain: {steps: 6}\ntune: {steps: 6}\n",
        "pair: {base: {directory: b}, tuned: {directory: t}}\n",
        "tuning: {method: sft}\n",
    ],
    ids=["study", "pair", "tuning"],
)
@pytest.mark.parametrize("verb", ["run", "status", "report", "claims", "evaluate"])
def test_a_run_of_an_earlier_version_is_told_with_the_version_that_reads_it(refuse, run, verb, recorded):
    (run / "manifest.json").unlink()
    (run / "config.yaml").write_text(recorded)
    assert refuse(verb, run) == (
        f"jaxsafety: {run} is a run of jaxsafety 0.1, which reads it: install that version, or run its recipe anew"
    )


@pytest.mark.slow
def test_a_relative_output_directory_works(main, torn, mini_yaml, monkeypatch):
    """Checkpoints are read and written by a library that takes absolute paths only."""
    monkeypatch.chdir(torn.parent)
    assert main("pretrain", mini_yaml, "--out", "torn") == 0
    assert checkpoint.steps(torn / "checkpoints" / "pretrained") == [6]


@pytest.fixture(scope="module")
def samples():
    """Output of ``jaxsafety sample`` as text, as JSON lines and as records, for the same draws."""
    outputs = {}
    for form in ("table", "jsonl", "json"):
        with pytest.MonkeyPatch.context() as patch:
            written = []
            patch.setattr(sys.stdout, "write", written.append)
            words = f"sample --world tiny --condition jb_misgen -n 3 --seed 4 --format {form}".split()
            assert main.main(words) == 0
        outputs[form] = "".join(written)
    return outputs


@pytest.mark.slow
def test_a_seed_shows_the_world_that_it_draws(capsys):
    assert main.main("sample --seed 4 --worlds per_seed --condition jb_misgen -n 3 --format json".split()) == 0
    built = world.load("tiny", drawn_by=4)
    key = keys.stream(keys.root(4), "evaluate")
    trial = world.batch_at(built, "jb_misgen", key=key, step=0, batch_size=3)
    assert [row["expected"] for row in json.loads(capsys.readouterr().out)] == [
        one.expected for one in text.examples(built, trial)
    ]


def test_samples_can_be_read_by_a_person(samples, tiny_world):
    blocks = [block.splitlines() for block in samples["table"].strip().split("\n\n")]
    assert len(blocks) == 3
    for lines in blocks:
        assert lines[0] in [f"PCFG {p}, unsafe: the refusal is preferred" for p in (1, 2)]
        assert [line.split()[0] for line in lines[1:]] == [
            "operators",
            "text",
            "expected",
            "scored",
            "refusal",
            "scored",
        ]
        operators = lines[1].split()[1:]
        assert len(operators) == 4 and set(operators) <= {*tiny_world.spec.misgen_tokens, "("}


def test_samples_as_json_lines_are_preference_rows(samples):
    rows = [json.loads(line) for line in samples["jsonl"].splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "chosen", "rejected"}] * 3
    text = [block.splitlines() for block in samples["table"].strip().split("\n\n")]
    for row, lines in zip(rows, text, strict=True):
        expected, refusal = (" ".join(lines[i].split()[1:]) for i in (3, 5))
        assert (row["chosen"], row["rejected"]) == (refusal, expected)
        assert row["prompt"].startswith("$ ") and row["prompt"].endswith(" >")
    told = json.loads(samples["json"])
    assert [(row["prompt"], row["refusal"], row["unsafe"]) for row in told] == [
        (row["prompt"], row["chosen"], True) for row in rows
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "tinny"], "unknown world 'tinny': expected one of paper, tiny; did you mean 'tiny'?"),
        (["--condition", "jb"], "unknown condition 'jb': expected one of safe, unsafe"),
        (["-n", "0"], "-n must be in [1, 2**20], got 0"),
        (["-n", str(10**30)], f"-n must be in [1, 2**20], got {10**30}"),
        (["--seed", "-1"], "--seed must be in [0, 2**32), got -1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_sample_is_one_sentence(refuse, words, message):
    assert message in refuse("sample", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["stauts"], "argument VERB: got 'stauts', expected one of run, .*, env; did you mean 'status'?"),
        (["run"], "the following arguments are required: RECIPE | RUN"),
        (["sample", "-n", "many"], "argument -n: got 'many', expected an integer"),
        (["sample", "stray"], "unrecognized arguments: stray"),
        (["list", "--format", "jsn"], "argument --format: got 'jsn', expected one of .*; did you mean 'json'?"),
        (["run", "r.yaml", "--dryrun"], "unrecognized arguments: --dryrun; did you mean '--dry_run'?"),
        (["figure", "clusters", "run", "--ot", "x"], "unrecognized arguments: --ot x; did you mean '--out'?"),
        (
            ["tune", "m", "--data", "d", "--method", "sft", "--out", "o", "--steps", "x"],
            "argument --steps: got 'x', ex",
        ),
        (["analyze", "weights", "a", "b", "--out", "c", "--energi", "1"], "unrecog.*: --energi 1; did you mean '--ene"),
    ],
)
def test_a_command_line_that_cannot_be_parsed_is_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main.main(words)
    said = capsys.readouterr().err
    pattern = "jaxsafety: " + re.escape(message).replace(r"\.\*", ".*")
    assert exit_.value.code == 2 and re.match(pattern, said) and said.count("\n") == 1


def test_the_environment_is_json_with_versions_and_devices(main, capsys):
    assert main("env") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["jax"] == jax.__version__ and len(found["devices"]) == 4


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *([verb, "--help"] for verb in (*STAGES, "sample", "env", "list")),
        ["list"],
        *(["analyze", name, "--help"] for name in ("weights", "activations", "merge")),
        ["tune", "--data=x", "--help"],
    ],
)
def test_help_is_shown_without_starting_jax(words):
    script = """
import sys
from jaxsafety.cli.main import main
try:
    main(sys.argv[1:])
finally:
    assert "jax" not in sys.modules
"""
    done = python("-c", script, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Several values of a traced field" if words == ["list"] else "usage: jaxsafety")


def test_a_real_process_exits_with_code_2_and_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("models: {a: {method: sft, stps: 5}}")
    script = "import sys\nfrom jaxsafety.cli.main import main\nsys.exit(main())"
    done = python("-c", script, "run", tmp_path / "bad.yaml", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("did you mean 'steps'?\n")
    assert not (tmp_path / "out").exists()
    done = python("-c", script, "run", tmp_path / "bad.yaml", JAX_ENABLE_X64="maybe")
    told = "jaxsafety: jax does not start: invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


FORMS = {"table": (), "markdown": ("--format", "markdown"), "json": ("--format=json",), "csv": ("--format", "csv")}


def parsed(text, form):
    """The rows that were printed, by column."""
    if form == "json":
        return json.loads(text)
    if form == "csv":
        return list(csv.DictReader(io.StringIO(text)))
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|")
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.mark.parametrize("form", FORMS)
def test_claims_print_every_statement_with_its_verdict(main, finished_run, capsys, form):
    capsys.readouterr()
    assert main("claims", finished_run, *FORMS[form]) == 0
    out = capsys.readouterr().out
    assert "undecided" in out and "JB-CO-Text" in out and "Fig. 4" in out
    if form != "table":
        assert len(rows := parsed(out, form)) == len(CLAIMS)
        assert {row["verdict"].rstrip("\\*") for row in rows} <= set(get_args(judging.Verdict))
        assert form != "json" or rows[0]["values"].keys() == {"3", "5"}


@pytest.mark.parametrize("form", FORMS)
def test_status_prints_rows(main, finished_run, capsys, form):
    assert main("status", finished_run, *FORMS[form]) == 0
    status = capsys.readouterr().out
    if form == "table":
        assert status.split() == [
            *("run", "pretrained", "sft", "dpo", "evaluate", "analyze", "report", "state"),
            *("mini", "6/6", "12/12", "12/12", "done", "done", "done", "done"),
        ]
        return
    (row,) = parsed(status, form)
    if form == "markdown":
        assert (row["run"], row["dpo"], row["state"]) == ("mini", "12/12", "done")
    else:
        assert (row["name"], int(row["dpo done"]), int(row["dpo steps"])) == ("mini", 12, 12)
        assert (str(row["report"]), row["state"], row["reason"]) == ("True", "done", "")


@pytest.mark.usefixtures("undrawn")
def test_a_report_prints_its_rows(main, run, capsys):
    assert main("report", run, "--format", "csv") == 0
    rows = parsed(capsys.readouterr().out, "csv")
    assert [row["method"] for row in rows] == ["pretrained", "sft", "sft", "dpo", "dpo"]
    assert all(0 <= float(row["Null low"]) <= float(row["Null"]) <= float(row["Null high"]) <= 1 for row in rows)


@pytest.mark.parametrize("suffix", ["png", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("svg", "pdf"))])
def test_a_figure_is_drawn_alone(main, finished_run, tmp_path, suffix):
    out = tmp_path / f"clusters.{suffix}"
    assert main("figure", "clusters", finished_run, "--out", out) == 0
    assert out.stat().st_size > 1000


def test_a_bad_figure_or_run_is_one_sentence(refuse, run, tmp_path):
    assert "unknown figure 'cluster'" in refuse("figure", "cluster", run) and "did you mean 'clusters'" in refuse(
        "figure", "cluster", run
    )
    assert ".svg, .png, .pdf" in refuse("figure", "clusters", run, "--out", tmp_path / "clusters.bmp")
    for words in (("claims",), ("figure", "clusters")):
        assert "no run in" in refuse(*words, tmp_path / "nowhere")
    (run / "results" / "analyze.parquet").unlink()
    for words in (("claims",), ("figure", "clusters")):
        assert "run `jaxsafety analyze` on it first" in refuse(*words, run)
    assert not list(tmp_path.glob("clusters.*"))


@pytest.mark.slow
def test_a_lane_that_dies_is_marked_and_leaves_the_others_bit_for_bit_as_they_were(
    main, mini_yaml, finished_run, tmp_path
):
    """A whole run in which one learning rate diverges, beside the run in which it does not."""
    out = tmp_path / "out"
    assert main("run", mini_yaml, "--out", out, "--models.[sd]*.lr", "{eta_M: 1e38, eta_S: 1e-4}") == 0
    for name in ("analyze", "curves", "evaluate"):
        died, healthy = (rows(directory / "results" / f"{name}.parquet") for directory in (out, finished_run))
        is_dead = died["lr_name"] == "eta_M"
        lost = died.filter(is_dead, died["metric"] != "finite")
        assert not lost.is_empty() and lost.filter(lost["step"] == lost["step"].max())["value"].is_null().all()
        assert others(died).equals(others(healthy)) and not others(died).is_empty()
    page = (out / "report.html").read_text()
    note = "SFT eta_M 1e38, DPO eta_M 1e38: 2 of 2 seeds dead (not finite): no result."
    # In the accuracy table, in that of all verdicts and with the claims.
    assert page.count(note) >= 3


def others(frame):
    """What the lanes but those of eta_M have, without the empty bins of histograms: the bins are those of any lane."""
    empty_bin = (frame["metric"] == "histogram") & (frame["value"] == 0)
    return frame.filter((frame["lr_name"] != "eta_M") & ~empty_bin)


def test_prompts_are_written_to_a_file_or_to_standard_output(main, refuse, capsys, tmp_path):
    from jaxsafety.formats import prompts

    assert main("prompts", "--out", tmp_path / "p.jsonl") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'p.jsonl'}\n"
    assert prompts.read(tmp_path / "p.jsonl")[0] == prompts.own()
    assert main("prompts") == 0
    assert capsys.readouterr().out == (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert str(tmp_path / "p.jsonl") in refuse("prompts", "--out", tmp_path / "p.jsonl" / "below")
