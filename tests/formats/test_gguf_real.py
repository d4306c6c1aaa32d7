"""SmolLM2-135M-Instruct, a real language model that `make test-real` fetches as GGUF (Q4_1), beside transformers.

What transformers reads, writes and computes from the file itself is in ``golden/smollm2.json``; as a program this
writes it, where transformers, torch and gguf are installed:

    python -m tests.formats.test_gguf_real
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.formats import gguf, hf, hf_generation, hf_tokenizer, prompts
from jaxsafety.formats.prompts import Message
from jaxsafety.models import llama
from jaxsafety.models.generation import generate
from jaxsafety.models.llama import LlamaConfig, Rope

FILE = Path(__file__).parents[2] / ".cache" / "real" / "SmolLM2-135M-Instruct.Q4_1.gguf"
GOLDEN = Path(__file__).parent / "golden" / "smollm2.json"
CONFIG = LlamaConfig(
    49152, 8192, layers=30, heads=9, kv_heads=3, width=576, mlp_width=1536, head_width=64, norm_eps=1e-5,
    rope=Rope(base=1e5), tied=True,
)  # fmt: skip
# Of the largest logit. Two float32 programs differ by a hundredth of it; what bfloat16 would do is far above.
PARITY = 1e-4
ANSWER = 24  # tokens
ASKED = (
    "What is 17 + 25?", "Who wrote 'Hamlet'?", "Write a haiku about snow in the city, please!",
    "How far is 1,234 km in miles?", 'Translate "good morning" into French.', "Give me three names for a grey cat 🐱.",
    "Explain photosynthesis to a child.", "Übersetze: Ich habe Hunger.", "List the first 12 primes.",
    "\tdef f(x):\n        return x + 1000  # why?",
)  # fmt: skip

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FILE.exists(), reason="no real model: `make test-real` fetches it"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The file, imported."""
    pytest.importorskip("gguf")
    place = tmp_path_factory.mktemp("real") / "smollm2"
    gguf.write(FILE, place)
    return place


@pytest.fixture(scope="module")
def model(directory):
    """Its configuration and parameters."""
    return hf.load(directory, dtype="float32")


@pytest.fixture(scope="module")
def golden():
    """What transformers says of ten prompts."""
    return json.loads(GOLDEN.read_text())


def padded(rows):
    """Ids behind padding, and the mask."""
    width = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for place, row in enumerate(rows):
        tokens[place, width - len(row) :], mask[place, width - len(row) :] = row, True
    return tokens, mask


def answers(model, asked):
    """Ids that continue prompts greedily, up to the end of the answer."""
    config, params = model
    run = jax.jit(lambda *given: generate((given[0], llama.model(config)), given[1], mask=given[2], count=ANSWER))
    written = np.asarray(run(params, *map(jnp.asarray, padded(asked)))).tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in written]


def logits(model, asked):
    """Those behind every prompt."""
    config, params = model
    tokens, mask = padded(asked)
    run = jax.jit(partial(llama.apply, config=config))
    return np.asarray(run(params, jnp.asarray(tokens), mask=jnp.asarray(mask)).logits[:, -1])


def test_the_model_is_known(directory, model):
    assert model[0] == CONFIG
    assert hf_generation.read_generation(directory).stop == (2,)


def test_prompts_have_the_ids_that_transformers_gives_them(directory, golden):
    reader = hf_tokenizer.open_tokenizer(directory)
    assert [reader.prompt((Message("user", text),)) for text in ASKED] == golden["prompts"]


def test_logits_and_answers_are_those_of_transformers(model, golden):
    found = logits(model, golden["prompts"])
    for own, (best, values) in zip(found, golden["logits"], strict=True):
        assert np.argsort(-own)[: len(best)].tolist() == best
        np.testing.assert_allclose(own[best], values, rtol=0, atol=PARITY * np.abs(found).max())
    assert answers(model, golden["prompts"]) == golden["answers"]


def fifty():
    """Ten prompts of these, and forty safe ones of the package's."""
    own = [prompt.messages[0].content for prompt in prompts.own() if prompt.label == "safe"]
    return [*ASKED, *own[::6]]


@pytest.mark.filterwarnings("default")
def test_everything_is_as_transformers_has_it(directory, model):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    named = {"pretrained_model_name_or_path": FILE.parent, "gguf_file": FILE.name}
    theirs = transformers.AutoTokenizer.from_pretrained(**named)
    back = transformers.AutoTokenizer.from_pretrained(directory)
    reader, asked = hf_tokenizer.open_tokenizer(directory), []
    assert len(fifty()) == 50
    for text in fifty():
        said = [{"role": "user", "content": text}]
        options = {"tokenize": False, "add_generation_prompt": True}
        whole = theirs.apply_chat_template(said, **options)
        assert back.apply_chat_template(said, **options) == whole
        asked.append(reader.prompt((Message("user", text),)))
        assert asked[-1] == theirs(whole)["input_ids"] == back(whole)["input_ids"]
    there = transformers.AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32).eval()
    again = transformers.AutoModelForCausalLM.from_pretrained(directory).eval().state_dict()
    for name, tensor in there.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    found, parts = [], [asked[first : first + 10] for first in range(0, 50, 10)]
    for part in parts:
        tokens, mask = (torch.tensor(one) for one in padded(part))
        with torch.no_grad():
            expected = there(tokens, attention_mask=mask.long()).logits[:, -1].numpy()
        own = logits(model, part)
        found.append(np.abs(own - expected).max() / np.abs(expected).max())
        written = there.generate(
            tokens, attention_mask=mask.long(), max_new_tokens=ANSWER, do_sample=False, pad_token_id=2
        )[:, tokens.shape[1] :].tolist()
        assert answers(model, part) == [row[: row.index(2) + 1] if 2 in row else row for row in written]
    print(f"largest difference of logits over their scale: {max(found):.1e}")
    assert max(found) < PARITY


def main():
    """Writes what transformers says."""
    import torch
    import transformers

    named = {"pretrained_model_name_or_path": FILE.parent, "gguf_file": FILE.name}
    reader = transformers.AutoTokenizer.from_pretrained(**named)
    there = transformers.AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32).eval()
    told = {"prompts": [], "logits": [], "answers": []}
    for text in ASKED:
        said = [{"role": "user", "content": text}]
        ids = reader(reader.apply_chat_template(said, tokenize=False, add_generation_prompt=True))["input_ids"]
        told["prompts"].append(ids)
        with torch.no_grad():
            values, best = there(torch.tensor([ids])).logits[0, -1].topk(5)
        told["logits"].append([best.tolist(), values.tolist()])
        written = there.generate(torch.tensor([ids]), max_new_tokens=ANSWER, do_sample=False, pad_token_id=2)
        told["answers"].append(written[0, len(ids) :].tolist())
    GOLDEN.write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
