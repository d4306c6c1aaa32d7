"""Options that are the fields of records: from the command line, from a file, printed, and refused."""

import csv
import io
import json

import pytest
import yaml

from jaxsafety.cli import pair, tune
from jaxsafety.study.pairs.merge import MergeConfig
from jaxsafety.study.tuning.options import TuningConfig


@pytest.fixture
def printed(main, capsys, tmp_path):
    """What a command's ``--print_config`` prints, as plain values."""

    def run(*words):
        assert main(*words, "--print_config") == 0
        return yaml.safe_load(capsys.readouterr().out)

    return run


MERGE = ("analyze", "merge", "BASE", "TUNED", "--out", "merged")


def test_options_have_the_defaults_of_their_record(printed):
    found = printed(*MERGE, "--alpha", "1.5")
    config = MergeConfig(1.5)
    assert found == {"alpha": 1.5, "part": config.part, "energy": config.energy, "rank": None, "dtype": None,
                     "out": "merged"}  # fmt: skip


def test_a_file_gives_options_and_the_command_line_wins(printed, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text("alpha: 2e-1\npart: mlp\nrank: 4\n")
    found = printed(*MERGE, "--config", path, "--rank=8")
    assert (found["alpha"], found["part"], found["rank"]) == (0.2, "mlp", 8)
    assert printed(*MERGE, f"--config={path}")["rank"] == 4


def test_what_is_printed_is_read_back(printed, tmp_path):
    words = ("analyze", "weights", "BASE", "TUNED", "--out", "run")
    found = printed(*words, "--attention", "--energy", "0.8")
    assert found["attention"] is True
    path = tmp_path / "weights.yaml"
    path.write_text(yaml.safe_dump(found))
    assert printed(*words[:-2], "--config", path, *words[-2:]) == found
    assert printed(*words, "--config", path, "--attention=false") == found | {"attention": False}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: expected the fields of options, such as `lr: 1e-4`"),
        ("- a", "must hold fields such as `lr: 1e-4`, got a list"),
        ("alpha: [", "is not YAML"),
        ("alpha: 1\nalpha: 2", "names 'alpha' twice"),
        ("alpha: fast", "analyze merge: alpha must be a number, got 'fast'"),
        ("alpha: 1\npart: mlpp", "unknown part 'mlpp'"),
    ],
)
def test_a_bad_file_of_options_is_one_sentence(main, capsys, tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main(*MERGE, "--config", path) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_that_is_not_there_is_one_sentence(main, capsys):
    assert main(*MERGE, "--config", "nowhere.yaml") == 2
    assert capsys.readouterr().err == "jaxsafety: no options file at nowhere.yaml\n"


def test_the_options_of_tuning_are_the_fields_of_its_record():
    words = ["DIR", "--data", "x", "--method", "dpo", "--out", "run", "--lora_targets", "q, v", "--recompute", "false"]
    config = tune._config(tune.parse([*words, "--weight_chosen", "0.3"]))
    assert isinstance(config, TuningConfig) and config.lora_targets == ("q", "v") and not config.recompute
    assert config.options.weight_chosen == 0.3 and config.lora_rank == TuningConfig("sft", 1).lora_rank
    full = tune._config(tune.parse([*words, "--full"]))
    assert (full.lora_rank, full.lr) == (None, 1e-5)
    assert tune._config(tune.parse([*words, "--full", "--lr", "3e-4"])).lr == 3e-4


def test_every_analysis_of_two_checkpoints_has_its_options():
    for name in pair.VERBS:
        extra = {"activations": ["--prompts", "p"], "merge": ["--alpha", "1"]}.get(name, [])
        options = pair.parse([name, "A", "B", "--out", "run", *extra])
        assert pair._config(options)


@pytest.mark.parametrize("form", ["json", "csv", "markdown"])
def test_what_a_recipe_can_name_is_printed_for_programs(main, capsys, form):
    assert main("list", "--format", form) == 0
    out = capsys.readouterr().out
    if form == "json":
        rows = json.loads(out)
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
    else:
        assert out.startswith("| folder | name | summary | field |")
        return
    found = {(row["folder"], row["name"], row["field"]): row for row in rows}
    assert found["methods", "dpo", "weight_chosen"]["kind"] == "traced"
    assert found["pools", "text", "ramp_start"]["default"] == "0.1" and found["pools", "text", "ramp_start"]["meaning"]
    assert ("methods", "sft", "") in found and ("claims", "jain2024", "") in found


@pytest.mark.parametrize("form", ["json", "csv", "markdown", "table"])
def test_the_environment_is_printed_in_any_form(main, capsys, form):
    assert main("env", "--format", form) == 0
    assert "jax" in capsys.readouterr().out
