"""Models named on the command line and in recipes: GGUF files and names on the Hub where directories may stand."""

import json

import numpy as np
import polars as pl
import pytest

from experiments import llama_world
from jaxsafety.config import yaml12
from jaxsafety.formats import hf
from jaxsafety.tree import flatten
from tests.formats import gguf_files, hub_cache, peft_files
from tests.study.checkpoints.conftest import CONFIG

COMMITS = ["1" * 40, "2" * 40]


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home of one's own, and the Hub's cache in it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / ".cache" / "huggingface" / "hub"


@pytest.fixture
def pair(home, checkpoints):
    """The two checkpoints as models on the Hub."""
    for name, directory in zip(("org/base", "org/tuned"), checkpoints, strict=True):
        hub_cache.put(home, name, COMMITS[0], directory)
    return home


@pytest.fixture
def begin(main, tmp_path):
    """Begins a study of two models, or goes on with it: its inputs are put on record. Returns the exit code."""

    def begin(base, tuned, **about):
        models = {"pretrained": {"checkpoint": base}, "tuned": {"from": "pretrained", "checkpoint": tuned}}
        content = {"subject": {"checkpoint": base} | about, "seeds": [0], "models": models, "analyses": {}}
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        return main("pretrain", "recipe.yaml", "--out", "run")

    return begin


def recorded(run):
    """The recipe and the inputs of a run."""
    return [yaml12.read(run / name) for name in ("config.yaml", "inputs.yaml")]


def test_names_on_the_hub_are_recorded_and_resumed_by_their_commit(pair, begin, main, checkpoints, tmp_path, capsys):
    assert begin("org/base", "org/tuned@main", tokenizer="org/tuned") == 0
    recipe, told = recorded(tmp_path / "run")
    assert recipe["models"]["tuned"]["checkpoint"] == "org/tuned@main"
    assert recipe["subject"] | {"checkpoint": "org/base", "tokenizer": "org/tuned"} == recipe["subject"]
    assert (told["version of org/base"], told["version of org/tuned@main"]) == (COMMITS[0], COMMITS[0])
    assert {"org/base", "org/tuned@main"} <= told.keys()
    assert begin("org/base", "org/tuned@main", tokenizer="org/tuned") == 0
    assert main("pretrain", "run") == 0
    # The branch moves on: no other commit goes into the same run, though its weights be the same.
    hub_cache.put(pair, "org/tuned", COMMITS[1], checkpoints[1])
    capsys.readouterr()
    assert main("pretrain", "run") == 2
    said = capsys.readouterr().err
    assert "whose files have changed since it began" in said
    assert f"version of org/tuned@main is '{COMMITS[0]}' there and '{COMMITS[1]}' here" in said


def test_seeds_have_their_own_names(pair, begin, checkpoints, tmp_path):
    hub_cache.put(pair, "org/seeds", COMMITS[1], checkpoints[1], refs=["seed0"])
    assert begin("org/base", "org/seeds@seed{seed}") == 0
    assert recorded(tmp_path / "run")[1]["version of org/seeds@seed0"] == COMMITS[1]


def test_a_file_is_recorded_and_resumed_by_its_content(home, begin, params, encoder, checkpoints, tmp_path, capsys):
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "m.gguf", params[1], encoder)
    assert begin(str(checkpoints[0]), "m.gguf") == 0
    recipe, told = recorded(tmp_path / "run")
    assert recipe["models"]["tuned"]["checkpoint"] == str(file)
    (converted,) = (tmp_path / "home" / ".cache" / "jaxsafety" / "models").iterdir()
    assert converted.name.startswith(told[f"version of {file}"])
    write_gguf(file, params[1] | {"norm": {"scale": np.full(CONFIG.width, 0.5, np.float32)}}, encoder)
    capsys.readouterr()
    assert begin(str(checkpoints[0]), "m.gguf") == 2
    assert f"version of {file} is " in capsys.readouterr().err


def test_a_model_with_an_adapter_is_recorded_as_named_and_resumed_by_its_content(
    home, begin, checkpoints, tmp_path, capsys
):
    base = checkpoints[0]
    held = peft_files.tensors(CONFIG, modules=("q_proj",))
    adapter = peft_files.write(tmp_path / "ad", held)
    assert begin(str(base), f"{base}+ad") == 0
    recipe, told = recorded(tmp_path / "run")
    assert recipe["models"]["tuned"]["checkpoint"] == f"{base}+{adapter}"
    (merged,) = (tmp_path / "home" / ".cache" / "jaxsafety" / "models").iterdir()
    assert merged.name.startswith(told[f"version of {base}+{adapter}"])
    assert begin(str(base), f"{base}+ad") == 0
    peft_files.write(tmp_path / "ad", held, lora_alpha=7)
    capsys.readouterr()
    assert begin(str(base), f"{base}+ad") == 2
    assert f"version of {base}+{adapter} is " in capsys.readouterr().err


def test_an_adapter_alone_is_of_its_model_or_tells_how_to_name_it(home, begin, checkpoints, tmp_path, capsys):
    held = peft_files.tensors(CONFIG, modules=("q_proj",))
    adapter = peft_files.write(tmp_path / "ad", held, base_model_name_or_path="/none/there")
    assert begin(str(checkpoints[0]), "ad") == 2
    assert capsys.readouterr().err == (
        f"jaxsafety: {adapter} is an adapter of /none/there, which is not here: name its model, as BASE+{adapter}\n"
    )
    peft_files.write(tmp_path / "ad", held, base_model_name_or_path=str(checkpoints[0]))
    assert begin(str(checkpoints[0]), "ad") == 0


def test_a_dry_run_and_a_printed_recipe_have_the_names(pair, begin, main, capsys):
    assert begin("org/base", "org/tuned") == 0
    assert main("run", "recipe.yaml", "--dry_run") == 0
    assert "org/tuned" in capsys.readouterr().out
    assert (
        main("analyze", "activations", "org/base", "org/tuned", "--prompts", "p", "--out", "x", "--print_config") == 0
    )
    shown = capsys.readouterr().out
    assert ("checkpoint: org/base\n" in shown, "tokenizer: org/tuned\n" in shown) == (True, True)


@pytest.mark.slow
def test_an_analysis_goes_by_what_is_named_alone(pair, main, checkpoints, tmp_path):
    assert main("analyze", "weights", "org/base", "org/tuned", "--out", "named") == 0
    assert main("analyze", "weights", *checkpoints, "--out", "plain") == 0
    named, plain = (pl.read_parquet(tmp_path / run / "results" / "analyze.parquet") for run in ("named", "plain"))
    assert named.drop("run").equals(plain.drop("run"))


@pytest.mark.parametrize("words", [["analyze", "weights", "org/base", "org/none"], ["tune", "org/none"]])
def test_what_the_cache_lacks_is_one_sentence(pair, main, pairs, capsys, words):
    more = ["--data", str(pairs), "--method", "sft"] if words[0] == "tune" else []
    assert main(*words, *more, "--out", "run") == 2
    assert capsys.readouterr().err == (
        f"jaxsafety: org/none is neither a path here nor in {pair}: download it with `hf download org/none`\n"
    )


def write_gguf(file, params, encoder):
    tokens = gguf_files.byte_level(encoder) | {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True}
    values, held = gguf_files.metadata(CONFIG), gguf_files.tensors(CONFIG, params)
    return gguf_files.write(file, values, held, tokenizer=tokens, template=llama_world.TOKENS["chat_template"])


def test_import_writes_a_directory(home, main, params, encoder, tmp_path, capsys):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", params[0], encoder)
    assert main("import", "m.gguf", "--out", "made/here", "--store", "float32") == 0
    assert capsys.readouterr().out == "made/here\n"
    config, found = hf.load(tmp_path / "made" / "here", dtype="float32")
    assert config == CONFIG
    for path, leaf in flatten(params[0]).items():
        np.testing.assert_array_equal(flatten(found)[path], leaf)
    assert main("import", "m.gguf", "--out", "made/here") == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err
    assert main("import", "none.gguf", "--out", "x") == 2
    assert capsys.readouterr().err == "jaxsafety: none.gguf is not there: expected a GGUF file\n"


@pytest.mark.slow
def test_a_file_is_tuned_as_its_directory_would_be(home, main, params, encoder, pairs, tmp_path, checkpoints):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", params[0], encoder)
    words = ["--data", str(pairs), "--method", "sft", "--batch_size", "4", "--steps", "2"]
    for model, run in (("m.gguf", "of_file"), (checkpoints[0], "plain")):
        assert main("tune", model, *words, "--out", run) == 0
    made = [hf.load(tmp_path / run / "models" / "tuned" / "seed_0", dtype="float32") for run in ("of_file", "plain")]
    assert made[0][0] == made[1][0]
    for path, leaf in flatten(made[0][1]).items():
        np.testing.assert_array_equal(leaf, flatten(made[1][1])[path])
