"""GGUF files beside transformers' own reading of them, where it is installed (extra ``hf-test``)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.formats import gguf, hf, hf_tokenizer
from jaxsafety.models import llama
from tests.formats import gguf_files

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
package = pytest.importorskip("gguf")

from tests.formats.test_gguf_tokenizer import SENTENCEPIECE, TEXTS  # noqa: E402  (it asks for the package, too)

# transformers and torch warn of what is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

# Of the largest logit: two float32 programs that sum in different orders.
PARITY = 2e-5
ROLES = {"bos_token_id": 0, "eos_token_id": 1, "unknown_token_id": 0, "add_bos_token": True}


@pytest.fixture
def both(tmp_path, config, make_params):
    """Writes a file of a model of which transformers asks that the heads divide the width, and imports it."""

    def make(arch, tokenizer, kind=None, **fields):
        own = replace(config, **{"width": 64, "mlp_width": 96, "head_width": 16} | fields)
        file = tmp_path / "model.gguf"
        values = gguf_files.metadata(own) | {"vocab_size": own.vocab_size}
        # At their full size softmax would be all of one token, and differ by any rounding.
        held = gguf_files.tensors(own, jax.tree.map(lambda leaf: 0.3 * leaf, make_params(own)), arch)
        kind = None if kind is None else package.GGMLQuantizationType[kind]
        named = {"general.name": "x"}
        gguf_files.write(file, values, held, arch=arch, tokenizer=tokenizer, kind=kind, **named)
        gguf.write(file, tmp_path / "out")
        return file, tmp_path / "out"

    return make


@pytest.mark.parametrize(
    ("arch", "kind", "fields"),
    [
        ("llama", None, {}),
        ("llama", "Q4_1", {"tied": True, "norm_eps": 1e-6}),
        ("llama", "Q8_0", {"kv_heads": 4}),
        ("qwen2", "Q5_0", {"qkv_bias": True}),
        ("qwen3", "Q8_0", {"query_norm": "head", "head_width": 128}),  # the width that they take, whatever a file says
    ],
)
def test_logits_are_theirs(both, encoder, arch, kind, fields):
    tokenizer = gguf_files.byte_level(encoder) | ROLES
    file, out = both(arch, tokenizer, kind, vocab_size=400, **fields)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    back = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = np.random.default_rng(0).integers(0, 400, (2, 20))
    config, params = hf.load(out, dtype="float32")
    with torch.no_grad():
        expected, again = (one.eval()(torch.tensor(tokens)).logits.numpy() for one in (theirs, back))
    np.testing.assert_array_equal(again, expected)
    found = np.asarray(jax.jit(partial(llama.apply, config=config))(params, jnp.asarray(tokens)).logits)
    np.testing.assert_allclose(found, expected, rtol=0, atol=PARITY * np.abs(expected).max())


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe", "qwen2", "tekken", "smollm"])
def test_ids_of_byte_pairs_are_theirs(both, encoder, pre):
    file, out = both("llama", gguf_files.byte_level(encoder, pre) | ROLES, vocab_size=400)
    own = hf_tokenizer.open_tokenizer(out)
    for named in ({"pretrained_model_name_or_path": out}, {"pretrained_model_name_or_path": out.parent,
                                                           "gguf_file": file.name}):  # fmt: skip
        theirs = transformers.AutoTokenizer.from_pretrained(**named)
        for text in TEXTS:
            assert own.encoder.encode(text).ids == theirs(text)["input_ids"], (named, text)
        assert theirs.eos_token == "</s>"


def test_ids_of_sentencepiece_are_theirs(both):
    file, out = both("llama", SENTENCEPIECE)
    own = hf_tokenizer.open_tokenizer(out)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    back = transformers.AutoTokenizer.from_pretrained(out)
    for text in ("hello", "helo lol", "hello hello", "é\n"):
        assert own.encoder.encode(text).ids == theirs(text)["input_ids"] == back(text)["input_ids"]
        assert back.decode(back(text)["input_ids"], skip_special_tokens=True) == text
    assert own.encoder.encode("hello</s>hello").ids == back("hello</s>hello")["input_ids"]
