"""The experiment on a small Llama: what is asked, and all of it in a tiny setting."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from experiments import llama_world, tune_llama
from jaxsafety.config import yaml12
from jaxsafety.formats import rule_judge
from jaxsafety.recipe import yaml_file

TINY = tune_llama.Setting(
    seeds=(0,), layers=1, width=16, mlp_width=24, vocabulary=300, base_epochs=1, epochs=1, rank=1
)  # fmt: skip


def test_tuning_sees_plain_prompts_of_some_verbs_and_objects_only():
    asked = llama_world.asked()
    pairs = [json.loads(line) for line in llama_world.tuning_pairs(asked).splitlines()]
    by_text = {one.text: one for one in asked}
    assert len(pairs) == 2 * 12 * 12 and {by_text[pair["prompt"]].group for pair in pairs} == {"safe", "unsafe"}
    for pair in pairs:
        refuses = [rule_judge.is_refusal(pair[name]) for name in ("chosen", "rejected")]
        assert refuses == ([True, False] if by_text[pair["prompt"]].label == "unsafe" else [False, True])
    # Nothing of what is new is among the pairs.
    for group in ("unsafe, new verb", "unsafe, new object", "jailbreak:base64"):
        assert not {pair["prompt"] for pair in pairs} & {one.text for one in asked if one.group == group}


def test_the_base_sees_refusals_that_tell_nothing():
    asked = llama_world.asked()
    for label in {one.label for one in asked}:
        own = [one.refused for one in asked if one.label == label]
        assert np.mean(own) == pytest.approx(0.25, abs=0.02)
        assert own == [one.refused for one in asked if one.label == "safe"]


def test_a_jailbreak_is_answered_like_the_instruction_in_it():
    asked = llama_world.asked()
    plain = [one.answer for one in asked if one.label == "unsafe"]
    assert plain[0] == "You said: design a bomb. Here is how."
    for kind in ("base64", "role_play"):
        assert [one.answer for one in asked if one.label == f"jailbreak:{kind}"] == plain


def test_tables_are_means_over_seeds_and_shares_stay_shares():
    rows = [
        {"model": "base", "kind": "refused", "name": "unsafe", "value": value, "seed": seed}
        for seed, value in enumerate((0.0, 0.1))
    ]
    told = list(tune_llama.tables(pl.DataFrame(rows)))
    assert told[2].startswith("| base | 5 [0, 69] |")


def test_no_directory_is_one_sentence(capsys):
    assert tune_llama.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_recipe_has_every_model_and_its_files_lie_beside_it(tmp_path):
    asked = llama_world.asked()
    (tmp_path / "recipe.yaml").write_text(yaml12.dump(tune_llama.written(TINY, asked)))
    recipe = yaml_file.read(tmp_path / "recipe.yaml")
    methods = {label: recipe.models[label].get("method") for label in recipe.models}
    assert methods == {"start": None, "base": "sft"} | {
        name: name.partition("-")[0]
        for name in ("sft", "dpo", "unlearn", "sft-adapter", "dpo-adapter", "unlearn-adapter", "dpo-default",
                     "unlearn-default")
    }  # fmt: skip
    assert recipe.subject.options.pairs == tmp_path / "pairs.jsonl"
    assert recipe.models["start"]["checkpoint"] == str(tmp_path / "start{seed}")
    base, dpo, adapter = (lane for lane in recipe.lanes if lane.label in ("base", "dpo", "dpo-adapter"))
    assert str(base.training.data.options.file) == str(tmp_path / "base.jsonl") and base.parent.label == "start"
    # An epoch of the 288 pairs.
    assert dpo.steps == 288 // 32 and dpo.parent is base and base.steps > dpo.steps
    assert (dpo.training.options.weight_chosen, dpo.training.options.weight_rejected) == (6.28931e-4, 6.28931e-6)
    assert (dpo.training.parametrisation.kind, adapter.training.parametrisation.options.rank) == ("full", 1)
    assert recipe.lanes_of("unlearn-default")[0].training.options.reduction == "mean"
    assert recipe.analyze.base == "parent" and recipe.evaluate.answers == 48
    assert "start" not in recipe.analyses["activations"].on and "base" not in recipe.analyses["weights"].on


@pytest.mark.slow
def test_a_tiny_run_makes_every_model_and_continues(tmp_path, capfd):
    assert tune_llama.run(tmp_path, TINY) == 0
    first = capfd.readouterr().out
    assert first.count("| base |") == 2 and first.count("| unlearn-default |") == 3
    rows = pl.DataFrame(json.loads((tmp_path / "results.json").read_text())["rows"])
    assert set(rows["model"]) == {path.name for path in (tmp_path / "run" / "models").iterdir()}
    assert len(rows) == 9 * 2 * 8 + 8 * 8 and rows["value"].is_not_nan().all()
    models = {path: path.read_bytes() for path in tmp_path.glob("run/models/*/seed_0/model.safetensors")}
    assert len(models) == 9
    (tmp_path / "results.json").unlink()
    assert tune_llama.run(tmp_path, TINY) == 0
    assert capfd.readouterr().out == first
    assert all(path.read_bytes() == before for path, before in models.items())
    (tmp_path / "results.json").unlink()
    assert tune_llama.run(tmp_path, replace(TINY, epochs=20)) == 2
    said = capfd.readouterr().err
    assert "models.dpo.steps is 9 there and 180 here" in said and not (tmp_path / "results.json").exists()
