"""Options that are the fields of records: from the command line, from a file, printed, and refused."""

import ast
import csv
import io
import json
import re

import pytest

from jaxsafety.cli import declared, short, written
from jaxsafety.config import yaml12
from jaxsafety.subjects import checkpoint


@pytest.fixture
def printed(main, capsys):
    """The recipe that a command's ``--print_config`` prints, as plain values."""

    def run(*words):
        assert main(*words, "--print_config") == 0
        return yaml12.load(capsys.readouterr().out)

    return run


MERGE = ("analyze", "merge", "BASE", "TUNED", "--out", "merged")
WEIGHTS = ("analyze", "weights", "BASE", "TUNED", "--out", "run")
TUNE = ("tune", "BASE", "--data", "x", "--method", "dpo", "--out", "run", "--steps", "3")
REQUIRED = {
    "tune": TUNE,
    "weights": WEIGHTS,
    "activations": ("analyze", "activations", "BASE", "TUNED", "--out", "run", "--prompts", "p"),
    "merge": (*MERGE, "--alpha", "2"),
}


def at(recipe, option):
    """What a recipe has where an option stands for a field of it; of a merge its last model is the merged one."""
    for name in option.place.split("."):
        recipe = recipe[name]
    return recipe


@pytest.mark.parametrize("verb", REQUIRED)
def test_options_have_the_defaults_that_the_help_shows(printed, capsys, verb):
    recipe = printed(*REQUIRED[verb])
    with pytest.raises(SystemExit):
        short.parse_tune(["--help"]) if verb == "tune" else short.parse_analyze([verb, "--help"])
    text = " ".join(capsys.readouterr().out.partition("methods, and the options")[0].split())
    shown = dict(re.findall(r"--(\w+) (?:\[?VALUE\]?) (?:(?! --).)*?\(default: ([^)]*\)?)\)", text))
    assert set(shown) >= {option.name for option in written.OPTIONS[verb] if option.name != "lora_targets"}
    for option in written.OPTIONS[verb]:
        if option.name != "lora_targets":
            found = at(recipe, option)
            found = tuple(found) if isinstance(found, list) else found  # YAML has lists alone
            assert found == ast.literal_eval(shown[option.name]), option


def test_the_defaults_of_tuning_are_those_of_a_recipe(printed):
    tuned, about = (printed(*TUNE)[name] for name in ("models", "subject"))
    tuned = tuned["tuned"]
    assert (tuned["batch_size"], tuned["lr"], tuned["chunk_steps"], tuned["accumulate"]) == (8, 1e-4, 10, 1)
    assert tuned["parametrisation"] == {
        "kind": "lora", "rank": 16, "alpha": 32.0, "targets": ["q", "k", "v", "o", "gate", "up", "down"]
    }  # fmt: skip
    assert tuned["optim"]["weight_decay"] == 0.0 and tuned["weight_chosen"] == 0.1
    assert (about["template"], about["max_tokens"], about["dtype"], about["recompute"]) == (
        "chat",
        1024,
        "float32",
        True,
    )
    # A default that is not a checkpoint's own is named where it is, and nowhere else.
    for option in written.OPTIONS["tune"]:
        if option.instead:
            assert (option.field in getattr(checkpoint, option.instead)) == (option.default != option.declared.default)


def test_options_of_a_merge_have_the_defaults_of_its_edits(printed):
    found = printed(*MERGE, "--alpha", "1.5")
    assert found["name"] == "merged" and found["subject"]["store"] is None
    assert found["models"]["merged"] == {
        "from": "tuned", "edit": "scaled", "role": "model", "base": "root", "part": "whole", "alpha": 1.5
    }  # fmt: skip


def test_a_file_gives_options_and_the_command_line_wins(printed, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text("alpha: 2e-1\npart: mlp\nrank: 4\n")
    models = printed(*MERGE, "--config", path, "--rank=8")["models"]
    assert [(one["edit"], one.get("rank")) for one in list(models.values())[2:]] == [
        ("scaled", None),
        ("rank_part", 8),
        ("scaled", None),
    ]
    assert models["merged"]["alpha"] == 0.2 and models["merged_1"]["part"] == "mlp"
    assert printed(*MERGE, f"--config={path}")["models"]["merged_2"]["rank"] == 4


def test_options_of_a_file_are_those_of_the_command_line(printed, tmp_path):
    found = printed(*WEIGHTS, "--attention", "--energy", "0.8")
    assert found["analyses"]["weights"]["attention"] is True
    path = tmp_path / "weights.yaml"
    path.write_text("attention: true\nenergy: 0.8\n")
    assert printed(*WEIGHTS[:-2], "--config", path, *WEIGHTS[-2:]) == found
    found["analyses"]["weights"]["attention"] = False
    assert printed(*WEIGHTS, "--config", path, "--attention=false") == found
    # As the last word, too, before the checkpoints.
    path.write_text("energy: 0.8\nattention: true\n")
    assert printed(*WEIGHTS, "--config", path)["analyses"]["weights"]["attention"] is True
    path.write_text("recompute: false\nstore: null\n")
    found = printed(*TUNE, "--config", path)["subject"]
    assert found["recompute"] is False and found["store"] is None
    path.write_text("lora_targets: [q, v]\nseeds: [0, 2]\nfull: false\nweight_chosen: 0.3\n")
    given = printed(*TUNE, "--config", path)
    assert given == printed(*TUNE, "--lora_targets", "q, v", "--seeds", "0,2", "--weight_chosen", "0.3")
    assert given["seeds"] == [0, 2] and given["models"]["tuned"]["parametrisation"]["targets"] == ["q", "v"]


def test_what_is_printed_is_a_recipe_that_is_printed_again(printed, tmp_path):
    for words in REQUIRED.values():
        found = printed(*words)
        (tmp_path / "recipe.yaml").write_text(yaml12.dump(found))
        assert printed("run", tmp_path / "recipe.yaml") == found


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: expected the fields of options, such as `lr: 1e-4`"),
        ("- a", "must hold fields such as `lr: 1e-4`, got a list"),
        ("alpha: [", "is not YAML"),
        ("alpha: 1\nalpha: 2", "names 'alpha' twice"),
        ("alpha: 1\npart: mlpp", "unknown part 'mlpp'"),
        ("alpha: fast", "analyze merge: models.merged.alpha must be a number, got 'fast'"),
        ("alpha: 1\nrank: few", "analyze merge: models.merged.rank must be an integer, got 'few'"),
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


def test_the_options_of_tuning_are_fields_of_its_recipe(printed):
    found = printed(*TUNE, "--lora_targets", "q, v", "--recompute", "false", "--weight_chosen", "0.3")
    tuned = found["models"]["tuned"]
    assert tuned["parametrisation"]["targets"] == ["q", "v"] and found["subject"]["recompute"] is False
    assert tuned["weight_chosen"] == 0.3 and tuned["parametrisation"]["rank"] == checkpoint.ADAPTER["rank"]
    full = printed(*TUNE, "--full")["models"]["tuned"]
    assert full["parametrisation"] == {"kind": "full"} and full["lr"] == 1e-5
    assert printed(*TUNE, "--full", "--lr", "3e-4")["models"]["tuned"]["lr"] == 3e-4


def test_every_field_that_an_option_stands_for_is_there():
    for verb, options in written.OPTIONS.items():
        assert len({option.name for option in options}) == len(options), verb
        assert all(option.declared.doc for option in options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4", 4), ("q, v", ["q", "v"]), ("[q,v]", ["q", "v"]), ("1e-3", 1e-3), ("true", True)],
)
def test_words_are_values(text, expected):
    names = {"q, v": "lora_targets", "[q,v]": "lora_targets"}
    option = next(one for one in written.OPTIONS["tune"] if one.name == names.get(text, "lr"))
    assert declared.value(option, text) == expected


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
