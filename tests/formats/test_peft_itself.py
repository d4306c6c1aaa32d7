"""Both ways against PEFT itself, where it is installed: logits of models whose adapters lie beside their weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.formats import hf, peft_merge, peft_write
from jaxsafety.models import llama
from jaxsafety.tree import unflatten
from tests.formats import peft_files, theirs
from tests.formats.peft_files import MODULES

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# PEFT, transformers and torch warn of what is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

# Of the largest logit: W x + s B (A x) against (W + s B A) x, in float32.
PARITY = 2e-5
TOKENS = np.random.default_rng(0).integers(0, theirs.SIZES["vocab_size"], (2, 20))
EMBEDDINGS = ["embed_tokens", "lm_head", "q_proj"]
CASES = {
    "all seven": ("llama", {"target_modules": list(MODULES)}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "regular expression": ("llama", {"target_modules": r".*layers\.[01]\..*(up|v)_proj"}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "patterns": ("llama", {"target_modules": list(MODULES), "rank_pattern": {"q_proj": 2, "layers.2.mlp.*": 3},
                           "alpha_pattern": {"^model.layers.0.mlp.up_proj": 9, "v_proj": 1}}),
    "patterns with rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2},
                                       "alpha_pattern": {"v_proj": 1}, "use_rslora": True}),
    "embeddings and head": ("llama", {"target_modules": EMBEDDINGS}),
    "tied: embeddings": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied: head": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied: both": ("tied", {"target_modules": EMBEDDINGS}),
    "tied: both as one": ("tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "saved, tied: embeddings": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved, tied: head": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved, tied: as one": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
                                     "ensure_weight_tying": True}),
    "biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "mistral": ("mistral", {"target_modules": list(MODULES)}),
    "gaussian, with dropout": ("llama", {"target_modules": ["down_proj"], "init_lora_weights": "gaussian",
                                         "lora_dropout": 0.5, "fan_in_fan_out": True}),
}  # fmt: skip


def ours(directory):
    """Logits of a directory by this package."""
    config, params = hf.load(directory, dtype="float32")
    return np.asarray(llama.apply(params, jnp.asarray(TOKENS), config=config).logits)


def of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def check(found, wanted):
    gap = np.abs(found - wanted).max() / np.abs(wanted).max()
    print(f"largest gap of logits: {gap:.1e} of the largest")
    assert gap < PARITY


@pytest.mark.parametrize("name", CASES)
def test_logits_of_their_adapters(tmp_path, name):
    kind, fields = CASES[name]
    base = theirs.save(kind, tmp_path / "base")
    plain = of(base)
    made = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **fields))
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path / "adapter")
    # As a user finds it: the base and the adapter from the disk.
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wanted = of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert np.abs(wanted - plain).max() > 1e-2 * np.abs(plain).max()
    peft_merge.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    check(ours(tmp_path / "merged"), wanted)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    check(of(merged), wanted)


@pytest.mark.parametrize("targets", [("attn/q",), ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up",
                                                  "mlp/down"), ("embed", "unembed", "mlp/up")])  # fmt: skip
def test_logits_of_our_adapters(tmp_path, targets):
    directory = tmp_path / "base"
    theirs.save("llama", directory)
    config, params = hf.load(directory, dtype="float32")
    rng, factors = np.random.default_rng(1), {}
    std = 0.3  # of larger ones, scores of hundreds would make much of a rounding
    for name in targets:
        where = name if "/" not in name else f"blocks/{name}"
        part = params
        for step in where.split("/"):
            part = part[step]
        *lead, m, n = part.shape
        factors[f"{where}_lora_a"] = rng.normal(size=(*lead, m, 3), scale=std).astype(np.float32)
        factors[f"{where}_lora_b"] = rng.normal(size=(*lead, 3, n), scale=std).astype(np.float32)
    peft_write.write(tmp_path / "adapter", unflatten(factors), config=config, alpha=4.5, base=str(directory))
    base = transformers.AutoModelForCausalLM.from_pretrained(directory)
    found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    peft_merge.write(directory, tmp_path / "adapter", tmp_path / "merged")
    wanted = of(found)
    check(ours(tmp_path / "merged"), wanted)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    check(of(auto), wanted)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"},
                                    {"init_lora_weights": "olora"}, {"trainable_token_indices": [1, 5]},
                                    {"layer_replication": [[0, 2], [1, 3]]}])  # fmt: skip
def test_what_is_not_followed_is_refused_as_they_write_it(tmp_path, fields):
    base = theirs.save("llama", tmp_path / "base")
    made = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **fields))
    made.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=next(iter(fields))):
        peft_merge.write(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_every_field_of_theirs_is_known(tmp_path, saved, config):
    directory, _ = saved()
    fields = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj"]).to_dict()
    held = peft_files.tensors(config, modules=("q_proj",))
    adapter = peft_files.write(tmp_path / "adapter", held, **fields | {"peft_type": "LORA", "target_modules": ["q"]})
    peft_merge.write(directory, adapter, tmp_path / "merged")
