"""GGUF files to checkpoint directories: weights, configurations, and what is refused."""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsafety.formats import gguf, gguf_config, gguf_file, hf, hf_generation
from jaxsafety.models.rope import Rope
from tests.formats import gguf_files

package = pytest.importorskip("gguf")
# Of a step between two quantised numbers: half, and 127 steps whose size is rounded to float16.
HALF = 0.5 + 127 * 2**-11


@pytest.fixture
def made(tmp_path, config, make_params):
    """Writes a file of a random model, with some fields of it replaced; returns the file, its model and parameters."""

    def make(*, arch="llama", values=None, extra=None, without=(), name="model.gguf", **more):
        fields = {key: more.pop(key) for key in list(more) if hasattr(config, key)}
        own = replace(config, **fields)
        params = make_params(own)
        told = gguf_files.metadata(own) | (values or {})
        told = {key: value for key, value in told.items() if value is not None}
        held = gguf_files.tensors(own, params, arch) | (extra or {})
        held = {key: value for key, value in held.items() if key not in without}
        return gguf_files.write(tmp_path / name, told, held, arch=arch, **more), own, params

    return make


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("llama", {}),
        ("llama", {"tied": True, "kv_heads": 4}),
        ("llama", {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_width": 4}),
        ("qwen2", {"qkv_bias": True, "tied": True, "head_width": 4}),
        ("qwen3", {"query_norm": "head"}),
        ("llama", {"rope": Rope(base=1e6, scaling="linear", factor=2.0), "max_tokens": 128}),
    ],
)
def test_a_model_comes_out_as_it_went_in(made, tmp_path, arch, fields):
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "context_length": 64}
    file, own, params = made(arch=arch, values=scaling if "rope" in fields else None, **fields)
    gguf.write(file, tmp_path / "out")
    config, found = hf.load(tmp_path / "out", dtype="float32")
    assert config == own
    jax.tree.map(np.testing.assert_array_equal, found, params)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["model_type"] == arch
    assert told["rms_norm_eps"] == own.norm_eps  # not its neighbour in float32


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_weights_are_within_a_step_of_what_they_were(made, tmp_path, kind):
    steps = {"Q8_0": 1 / 127, "Q4_1": 2 / 15, "F16": 2**-10, "BF16": 2**-7}  # of a block's largest value
    file, _, params = made(width=32, mlp_width=64, head_width=8, kind=package.GGMLQuantizationType[kind])
    gguf.write(file, tmp_path / "out")
    _, found = hf.load(tmp_path / "out", dtype="float32")
    for name in ("up", "down"):
        before, after = (np.swapaxes(np.asarray(one["blocks"]["mlp"][name]), 1, 2) for one in (params, found))
        largest = np.abs(before).reshape(*before.shape[:2], -1, 32).max(-1, keepdims=True)
        error = np.abs(before - after).reshape(*before.shape[:2], -1, 32)
        assert error.max() > 0
        assert np.all(error <= HALF * steps[kind] * largest)
    np.testing.assert_array_equal(found["norm"]["scale"], params["norm"]["scale"])


def test_weights_are_stored_as_asked(made, tmp_path):
    file, _, params = made()
    gguf.write(file, tmp_path / "out", dtype="bfloat16")
    checkpoint = hf.open_checkpoint(tmp_path / "out")
    assert {tensor.code for tensor in checkpoint.tensors.values()} == {"BF16"}
    expected = np.asarray(params["unembed"].astype("bfloat16"), np.float32)
    np.testing.assert_array_equal(checkpoint.leaf("unembed", dtype="float32"), expected)


def llama3_divisors(base, width, factor):
    """By the definition: slow channels are divided, fast ones left, those between in part."""
    found = []
    for channel in range(0, width, 2):
        turns = 8192 * base ** (-channel / width) / (2 * np.pi)
        kept = min(max((turns - 1) / (4 - 1), 0), 1)
        found.append(1 / (kept + (1 - kept) / factor))
    return np.array(found, np.float32)


def test_divisors_of_frequencies_are_the_scaling_of_llama_3(made):
    divisors = llama3_divisors(5e5, 64, 8.0)
    assert 1 < np.unique(divisors).size < 32
    file, own, _ = made(head_width=64, rope=Rope(base=5e5), extra={"rope_freqs.weight": divisors})
    assert gguf_config.read_config(gguf_file.open_gguf(file)) == replace(
        own, rope=Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    )
    file, own, _ = made(head_width=64, extra={"rope_freqs.weight": np.ones(32, np.float32)}, name="ones.gguf")
    assert gguf_config.read_config(gguf_file.open_gguf(file)) == own
    file, *_ = made(head_width=64, extra={"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)}, name="o.gguf")
    with pytest.raises(
        ValueError, match=r"rope_freqs.weight scales positions otherwise than Llama 3.1 does, by 1 to 8"
    ):
        gguf_config.read_config(gguf_file.open_gguf(file))


def test_ends_of_answers_and_special_tokens_are_told(made, tmp_path, encoder):
    tokens = gguf_files.byte_level(encoder) | {"bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 3}
    file, *_ = made(vocab_size=400, tokenizer=tokens)
    gguf.write(file, tmp_path / "out")
    assert hf_generation.read_generation(tmp_path / "out").stop == (1, 3)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["bos_token_id"], told["eos_token_id"], told["pad_token_id"]) == (0, [1, 3], None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arch": "gemma2"}, "general.architecture is 'gemma2', expected one of llama, qwen2, qwen3"),
        ({"values": {"block_count": None}}, "block_count is missing, expected an integer of at least 1"),
        ({"values": {"attention.head_count_kv": [2, 2, 1]}}, r"head_count_kv is \[2, 2, 1\], expected an integer"),
        ({"values": {"attention.head_count_kv": 3}}, "head_count_kv is 3, expected a divisor of 4"),
        ({"values": {"expert_count": 8}}, "llama.expert_count is 8, expected 0"),
        ({"values": {"logit_scale": 0.5}}, "unknown llama.logit_scale .0.5., which may change the model"),
        ({"values": {"attention.key_lenght": 6}}, "did you mean 'attention.key_length'"),
        ({"values": {"rope.dimension_count": 4}}, "rope.dimension_count is 4, expected the width 6 of a head"),
        ({"values": {"rope.scaling.type": "spiral"}}, "rope_type is 'spiral', expected one of"),
        ({"without": ("blk.1.ffn_up.weight",)}, "lack blk.1.ffn_up.weight, which its metadata ask for"),
        ({"without": ("token_embd.weight",)}, "holds no token_embd.weight"),
        ({"extra": {"blk.0.attn_q_norm.weight": np.ones(6, np.float32)}}, "hold blk.0.attn_q_norm.weight"),
        ({"extra": {"output_norm.weight": np.ones(8, np.float32)}}, r"output_norm.weight is \[8\], expected \[16\]"),
        ({"extra": {"output_norm.weight": np.full(16, np.nan, np.float32)}}, "norm/scale is not finite"),
        ({"split.count": 3}, "is one of 3 parts: join them with `llama-gguf-split --merge`"),
        ({"tokenizer": {"model": "bert", "tokens": ["a"]}}, "tokenizer.ggml.model is 'bert', expected one of gpt2"),
        ({"tokenizer": {"model": "gpt2", "tokens": ["a"]}}, "without tokenizer.ggml.token_type"),
        ({"tokenizer": {"model": "gpt2", "tokens": ["a"] * 49, "token_type": [1] * 49}}, "49 tokens and embeddings of"),
        ({"tokenizer": {"model": "gpt2", "tokens": ["a"], "token_type": [1], "eos_token_id": 7}}, "eos_token_id is 7"),
        (
            {"tokenizer": {"model": "gpt2", "pre": "lama-bpe", "tokens": ["a"], "token_type": [1]}},
            "tokenizer.ggml.pre is 'lama-bpe', a way of splitting text .* did you mean 'llama-bpe'",
        ),
        (
            {"tokenizer": {"model": "gpt2", "tokens": ["a"], "token_type": [1], "merges": ["b c"]}},
            "its tokens and merges make no tokenizer",
        ),
        (
            {"tokenizer": {"model": "llama", "tokens": ["a", "b"], "token_type": [1, 1], "scores": [0.5]}},
            "1 scores of 2 tokens",
        ),
    ],
)  # fmt: skip
def test_what_is_not_followed_is_refused_by_name(made, tmp_path, changed, message):
    file, *_ = made(**changed)
    with pytest.raises(ValueError, match=message):
        gguf.write(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_damaged_file_is_told(made, tmp_path):
    file, *_ = made()
    whole = file.read_bytes()
    for size in (0, 4, 20, len(whole) // 20, len(whole) - 100):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"is not a GGUF file|is damaged, cut off"):
            gguf.write(file, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is not there: expected a GGUF file"):
        gguf.write(tmp_path / "none.gguf", tmp_path / "out")


def test_a_full_directory_is_left_alone(made, tmp_path):
    file, *_ = made()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        gguf.write(file, tmp_path / "out")


def test_files_are_known_by_how_they_begin(made, tmp_path):
    file, *_ = made()
    other = file.rename(tmp_path / "blob")
    (tmp_path / "text").write_text("text")
    (tmp_path / "folder.gguf").mkdir()
    known = {name: gguf_file.is_gguf(tmp_path / name) for name in ("blob", "text", "folder.gguf", "no.gguf", "no")}
    assert known == {"blob": True, "text": False, "folder.gguf": False, "no.gguf": True, "no": False}
    gguf.write(other, tmp_path / "out")


@pytest.mark.parametrize(("lost", "told"), [("gguf", "GGUF files need"), ("tokenizers", "tokenizer needs tokenizers")])
def test_what_is_not_installed_is_told(made, tmp_path, monkeypatch, encoder, lost, told):
    file, *_ = made(vocab_size=400, tokenizer=gguf_files.byte_level(encoder))
    monkeypatch.setitem(sys.modules, lost, None)
    with pytest.raises(ImportError, match=rf"{told}.*: pip install '.\[gguf\]' in a checkout"):
        gguf.write(file, tmp_path / "out")
