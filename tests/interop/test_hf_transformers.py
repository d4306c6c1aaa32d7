"""Both ways against transformers itself, where it is installed (extra ``hf-test``)."""

import json

import numpy as np
import pytest

from jaxsafety.interop import hf
from jaxsafety.models.llama import Rope
from jaxsafety.tree import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# transformers and torch warn of what is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Version 5 takes the words of version 4 and saves its own, so that both dialects come out of the same tests.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "head_dim": ("llama", {"head_dim": 6, "num_key_value_heads": 4}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "linear": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "dynamic": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral without windows": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
}
ROPES = {"linear": Rope(5e5, "linear", 2.0), "dynamic": Rope(5e5, "dynamic", 2.0, original_tokens=64)}
ROPES |= {"llama3": Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32)}


@pytest.fixture
def make(tmp_path):
    """Makes a random model of transformers and saves it; returns it and the directory."""

    def make(name, *, dtype="float32", **saving):
        torch.manual_seed(0)
        kind, changed = MODELS[name]
        config = transformers.AutoConfig.for_model(kind, **SIZES | changed)
        model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
        for parameter in model.parameters():  # norms and biases begin as ones and zeros
            torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "theirs", **saving)
        return model, tmp_path / "theirs"

    return make


def same_weights(one, other):
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_theirs_goes_through_ours_unchanged(make, tmp_path, name, with_source):
    model, theirs = make(name, max_shard_size="8KB")
    assert len(list(theirs.glob("*.safetensors"))) > 1
    config, params = hf.load(theirs, dtype="float32")
    assert config.rope == ROPES.get(name, Rope())
    source = theirs if with_source else None
    hf.save(tmp_path / "ours", params, config, dtype="float32", shard_bytes=9000, source=source)
    assert hf.read_config(tmp_path / "ours") == config
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert same_weights(model, back)
    tokens = torch.randint(0, 48, (2, 60))
    assert torch.equal(model(tokens).logits, back(tokens).logits)
    if with_source:
        assert back.config.model_type == model.config.model_type
        assert back.config.eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_goes_through_unchanged(make, tmp_path, dtype):
    model, theirs = make("llama", dtype=dtype)
    config, params = hf.load(theirs, dtype=dtype)
    hf.save(tmp_path / "ours", params, config, dtype=dtype)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert back.dtype == getattr(torch, dtype)
    assert same_weights(model, back)


def test_matrices_are_theirs_transposed(make):
    model, theirs = make("qwen2")
    checkpoint = hf.open_checkpoint(theirs)
    params = flatten(hf.load(theirs, dtype="float32")[1])
    attention = model.model.layers[1].self_attn
    for path, layer in (("attn/k", attention.k_proj), ("mlp/down", model.model.layers[1].mlp.down_proj)):
        expected = layer.weight.detach().numpy().T
        np.testing.assert_array_equal(checkpoint.matrix(1, path), expected)
        np.testing.assert_array_equal(params[f"blocks/{path}"][1], expected)
    np.testing.assert_array_equal(params["blocks/attn/v_bias"][1], attention.v_proj.bias.detach().numpy())
    np.testing.assert_array_equal(params["unembed"], model.lm_head.weight.detach().numpy().T)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_every_attribute_that_their_classes_have_is_known(make, kind):
    """All of them with their defaults, also those that a saved file leaves out."""
    _, theirs = make(kind)
    config = transformers.AutoConfig.from_pretrained(theirs)
    raw = json.loads(config.to_json_string(use_diff=False))
    (theirs / "config.json").write_text(json.dumps(raw | {"architectures": None}))
    assert hf.read_config(theirs) == hf.load(theirs, dtype="float32")[0]


def test_their_other_models_are_refused(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'gpt2', expected one of llama, mistral, qwen2"):
        hf.read_config(tmp_path)
