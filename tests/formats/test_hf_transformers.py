"""Both ways against transformers itself, where it is installed (extra ``hf-test``)."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.formats import hf
from jaxsafety.models import llama
from jaxsafety.models.generation import generate
from jaxsafety.models.llama import Rope
from jaxsafety.tree import flatten
from tests.formats import theirs
from tests.formats.theirs import FAMILIES, MODELS, VARIANTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# transformers and torch warn of what is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

ALL = MODELS | FAMILIES | VARIANTS
ROPES = {"linear": Rope(5e5, "linear", 2.0), "dynamic": Rope(5e5, "dynamic", 2.0, original_tokens=64)}
ROPES |= {"smollm3": Rope(2e6), "smollm3 windows": Rope(2e6), "gemma3": Rope(5e5, "linear", 2.0)}
ROPES |= {"yarn": Rope(1e3, "yarn", 4.0, 1.0, 32.0, 16, 0.1 * np.log(4.0) + 1)}
ROPES |= {"llama3": Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32)}
# Of the largest logit: two float32 programs that sum in different orders.
PARITY = 2e-5


@pytest.fixture
def make(tmp_path):
    """Makes a random model of transformers and saves it; returns it and the directory."""

    def make(name, *, dtype="float32", **saving):
        return theirs.save(name, tmp_path / "theirs", dtype=dtype, **saving), tmp_path / "theirs"

    return make


def side(tokens, mask, name):
    """The prompts between padding on one side, and the mask."""
    width = {"none": (0, 0), "left": (3, 0), "right": (0, 3)}[name]
    pad = partial(np.pad, pad_width=((0, 0), width))
    return pad(tokens), pad(mask)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_logits_are_theirs(make, name, padding):
    model, folder = make(name)
    config, params = hf.load(folder, dtype="float32")
    plain = np.random.default_rng(0).integers(0, 48, (2, 20))
    tokens, mask = side(plain, np.ones_like(plain), padding)
    with torch.no_grad():
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        expected = model(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        ).logits.numpy()
    run = jax.jit(partial(llama.apply, config=config))
    found = np.asarray(run(params, jnp.asarray(tokens), mask=jnp.asarray(mask, bool)).logits)
    real = mask.astype(bool)
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=PARITY * np.abs(expected[real]).max())


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ALL)
def test_greedy_continuations_are_theirs_token_for_token(make, name, padding):
    model, folder = make(name)
    config, params = hf.load(folder, dtype="float32")
    plain = np.random.default_rng(1).integers(0, 48, (2, 8))
    tokens, mask = side(plain, np.ones_like(plain), padding)
    expected = model.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=16, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[:, tokens.shape[1] :]  # fmt: skip
    run = jax.jit(lambda params, *given: generate((params, llama.model(config)), given[0], mask=given[1], count=16))
    found = run(params, jnp.asarray(tokens), jnp.asarray(mask, bool))
    np.testing.assert_array_equal(found, expected.numpy())


def same_weights(one, other):
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_model_of_theirs_goes_through_ours_unchanged(make, tmp_path, name, with_source):
    model, folder = make(name, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    config, params = hf.load(folder, dtype="float32")
    assert config.rope == ROPES.get(name, Rope())
    source = folder if with_source else None
    hf.save(tmp_path / "ours", params, config, dtype="float32", shard_bytes=9000, source=source)
    assert hf.read_config(tmp_path / "ours") == config
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.randint(0, 48, (2, 60))
    if name == "phi3" and not with_source:  # nothing but its files tells it from a Mistral, whose matrices lie apart
        np.testing.assert_allclose(*(one(tokens).logits.detach() for one in (model, back)), rtol=0, atol=1e-4)
        return
    assert same_weights(model, back)
    assert torch.equal(model(tokens).logits, back(tokens).logits)
    if with_source:
        assert back.config.model_type == model.config.model_type
        assert back.config.eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_goes_through_unchanged(make, tmp_path, dtype):
    model, folder = make("llama", dtype=dtype)
    config, params = hf.load(folder, dtype=dtype)
    hf.save(tmp_path / "ours", params, config, dtype=dtype)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert back.dtype == getattr(torch, dtype)
    assert same_weights(model, back)


def test_matrices_are_theirs_transposed(make):
    model, folder = make("qwen2")
    checkpoint = hf.open_checkpoint(folder)
    params = flatten(hf.load(folder, dtype="float32")[1])
    attention = model.model.layers[1].self_attn
    for path, layer in (("attn/k", attention.k_proj), ("mlp/down", model.model.layers[1].mlp.down_proj)):
        expected = layer.weight.detach().numpy().T
        np.testing.assert_array_equal(checkpoint.matrix(1, path), expected)
        np.testing.assert_array_equal(params[f"blocks/{path}"][1], expected)
    np.testing.assert_array_equal(params["blocks/attn/v_bias"][1], attention.v_proj.bias.detach().numpy())
    np.testing.assert_array_equal(params["unembed"], model.lm_head.weight.detach().numpy().T)


@pytest.mark.parametrize("kind", list(dict.fromkeys(kind for kind, _ in ALL.values())))
def test_every_attribute_that_their_classes_have_is_known(make, kind):
    """All of them with their defaults, also those that a saved file leaves out."""
    _, folder = make(next(name for name, (own, _) in ALL.items() if own == kind))
    config = transformers.AutoConfig.from_pretrained(folder)
    raw = json.loads(config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": None}))
    assert hf.read_config(folder) == hf.load(folder, dtype="float32")[0]


def test_their_other_models_are_refused(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'gpt2', expected one of llama, mistral, qwen2, "):
        hf.read_config(tmp_path)
