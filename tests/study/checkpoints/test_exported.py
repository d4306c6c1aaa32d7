"""What a tuning writes: the model with its adapter merged, the adapter as PEFT reads it, or both."""

import json

import numpy as np
import pytest

from jaxsafety.formats import hf, peft_merge
from jaxsafety.rundir import status
from jaxsafety.study.checkpoints import export, inputs, places
from jaxsafety.study.checkpoints.places import Places
from jaxsafety.tree import flatten

# The same product of float32 in another order.
ROUNDING = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture
def tune(checkpoints, pairs, main, monkeypatch, tmp_path):
    """The stage that trains, in few steps; returns the exit code."""
    monkeypatch.setattr(places, "local", lambda: Places(None))
    about = {"checkpoint": str(checkpoints[0]), "pairs": str(pairs), "max_tokens": 64}
    how = {"from": "pretrained", "method": "sft", "steps": 2, "batch_size": 4, "parametrisation": {"rank": 2}}
    how["parametrisation"]["targets"] = ["q", "gate", "embed", "unembed"]

    def go(export):
        content = {"subject": about | {"export": export}, "seeds": [0], "models": {"tuned": how}}
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        return main("tune", tmp_path / "recipe.yaml", "--out", tmp_path / "run")

    return go


def test_both_are_one_model(tune, checkpoints, tmp_path, monkeypatch):
    run, (base, _) = tmp_path / "run", checkpoints
    adapter, model = (run / folder / "tuned" / "seed_0" for folder in ("adapters", "models"))
    with monkeypatch.context() as patch:  # killed between the two
        patch.setattr(export, "write", stopped)
        assert tune("both") != 0
    before = (adapter / "adapter_model.safetensors").read_bytes()
    assert not model.exists()
    assert tune("both") == 0
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    told = json.loads((adapter / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["base_model_name_or_path"]) == (2, 32, str(base))
    assert (adapter / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    targets = ("q", "gate", "embed", "unembed")
    assert told["target_modules"] == ["embed_tokens", "gate_proj", "lm_head", "q_proj"]
    peft_merge.write(base, adapter, tmp_path / "merged")
    found, wanted = (flatten(hf.load(place, dtype="float32")[1]) for place in (tmp_path / "merged", model))
    own = flatten(hf.load(base, dtype="float32")[1])
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, **ROUNDING)
        moved = path.rpartition("/")[2] in targets
        assert np.any(leaf != own[path]) == moved


def test_matrices_that_lie_in_one_tensor_have_no_adapter_of_peft(tune, monkeypatch, tmp_path, capsys):
    """As those of a Phi-3; it is told before anything is trained."""
    monkeypatch.setattr(inputs.hf_config, "is_fused", lambda directory: True)
    assert tune("both") == 2
    assert "targets: got gate, q, which" in (told := capsys.readouterr().err) and "subject.export merged" in told
    assert not (tmp_path / "run").exists()


def stopped(*_, **__):
    raise OSError("no more")


def test_an_adapter_alone_is_a_finished_tuning(tune, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert tune("adapter") == 0
    assert not (run / "models").exists() and not (run / "checkpoints").exists()
    assert done(run) == 2
    monkeypatch.setattr(export, "write_adapter", stopped)
    assert tune("adapter") == 0


def done(run):
    """Steps that are done of the model."""
    return status.read(run)[0].steps["tuned"][0]


def test_a_tied_model_has_no_adapter_of_its_embeddings(main, another, pairs, tmp_path, capsys):
    words = ("--data", pairs, "--method", "sft", "--lora_targets", "q,embed", "--out", tmp_path / "run")
    assert main("tune", another(tied=True), *words) == 2
    assert "targets: got 'embed', and the model's unembedding is its embedding: expected" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_and_prints_both(main, checkpoints, pairs, tmp_path, capsys, undrawn):
    words = ("--method", "sft", "--steps", "2", "--batch_size", "4", "--lora_rank", "2", "--export", "both")
    assert main("tune", checkpoints[0], "--data", pairs, "--out", tmp_path / "run", *words) == 0
    places = [tmp_path / "run" / folder / "tuned" / "seed_0" for folder in ("adapters", "models")]
    assert capsys.readouterr().out.splitlines()[-2:] == [str(place) for place in places]
    assert (places[0] / "adapter_config.json").is_file() and (places[1] / "config.json").is_file()
    assert status.read(tmp_path / "run")[0].state == "done"


@pytest.mark.parametrize("kind", ["adapter", "both"])
def test_all_parameters_are_no_adapter(main, checkpoints, pairs, tmp_path, capsys, kind):
    words = ("--data", pairs, "--method", "sft", "--full", "--export", kind)
    assert main("tune", checkpoints[0], *words, "--out", tmp_path / "run") == 2
    assert "subject.export: models.tuned has no adapter, expected merged" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "reader"),
    [
        ({"models": {"more": {"from": "tuned", "method": "sft", "steps": 1}}}, "models.more"),
        ({"models": {"far": {"from": "tuned", "edit": "scaled", "alpha": 2.0}}}, "models.far"),
        ({"analyses": {"weights": {}}}, "analyses.weights"),
    ],
)
def test_an_adapter_alone_is_no_model_for_others(main, checkpoints, pairs, tmp_path, capsys, more, reader):
    about = {"checkpoint": str(checkpoints[0]), "pairs": str(pairs), "export": "adapter"}
    content = {"subject": about, "seeds": [0], **more}
    content["models"] = {"tuned": {"from": "pretrained", "method": "sft", "steps": 1}} | more.get("models", {})
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    assert main("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert f"subject.export: got 'adapter', and {reader} reads models themselves: expected both" in said
    assert not (tmp_path / "run").exists()
