"""``config.json`` in both dialects: what is read, what is neutral, and what is refused by name."""

import json
from dataclasses import replace

import pytest

from jaxsafety.formats import hf, hf_attributes, hf_config
from jaxsafety.models.llama import LlamaConfig, Rope

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 9}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPECTED = LlamaConfig(48, 64, 3, 4, 2, 16, 24, 4, norm_eps=1e-5, rope=Rope(base=5e5))


def write_config(directory, *what, **more):
    (directory / "config.json").write_text(hf_config.config_text(*what, **more))


@pytest.fixture
def read(tmp_path):
    """Reads a configuration given as a dict."""

    def read(raw, **changed):
        (tmp_path / "config.json").write_text(json.dumps(raw | changed))
        return hf.read_config(tmp_path)

    return read


def without(raw, *names):
    return {name: value for name, value in raw.items() if name not in names}


def test_a_llama_of_transformers_4(read):
    assert read(LLAMA) == EXPECTED


def test_a_llama_of_transformers_5(read):
    raw = without(LLAMA, "rope_theta", "torch_dtype") | {"dtype": "bfloat16", "head_dim": 4}
    assert read(raw, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}) == EXPECTED


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        ({"type": "linear", "factor": 2}, Rope(5e5, "linear", 2.0)),
        ({"rope_type": "linear", "factor": 2.0, "type": "linear"}, Rope(5e5, "linear", 2.0)),
        ({"type": "dynamic", "factor": 4.0}, Rope(5e5, "dynamic", 4.0, original_tokens=64)),
        ({"rope_type": "llama3", **LLAMA3}, Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32)),
        ({"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.0}, Rope(5e5, "yarn", 1.0, 1.0, 32.0, 64)),
        ({"rope_type": "default"}, Rope(5e5)),
        ({"rope_type": "default", "factor": 1.0, "partial_rotary_factor": 1.0, "beta_fast": None}, Rope(5e5)),
        ({}, Rope(5e5)),
        (None, Rope(5e5)),
    ],
)
def test_scaled_positions_in_both_dialects(read, scaling, rope):
    assert read(LLAMA, rope_scaling=scaling).rope == rope
    five = without(LLAMA, "rope_theta") | {"rope_parameters": {"rope_theta": 5e5, **(scaling or {})}}
    assert read(five).rope == rope
    assert read(LLAMA, rope_scaling=scaling, **{"rope_parameters": five["rope_parameters"]}).rope == rope


def test_yarn_may_say_the_longer_context_or_not(read):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for said, longest in ((32, 128), (64, 128), (128, 128), (256, 256)):
        assert read(LLAMA, rope_scaling=yarn, max_position_embeddings=said).max_tokens == longest
    assert read(LLAMA, rope_scaling=yarn).rope.amplitude == pytest.approx(1.1386294)


@pytest.mark.parametrize(("kind", "tokens"), [("linear", 160), ("dynamic", 160), ("llama3", 64)])
def test_scaling_lengthens_what_the_model_takes(read, kind, tokens):
    """llama3's ``max_position_embeddings`` is the longer context already."""
    scaling = {"rope_type": kind, **(LLAMA3 if kind == "llama3" else {}), "factor": 2.5}
    assert read(LLAMA, rope_scaling=scaling).max_tokens == tokens


def test_defaults_are_those_of_transformers(read):
    bare = without(LLAMA, "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "architectures")
    assert read(bare) == replace(EXPECTED, kv_heads=4, norm_eps=1e-6, rope=Rope())
    assert read(bare, num_key_value_heads=None) == read(bare)
    lengths = {"llama": 2048, "mistral": 131072, "qwen2": 32768}
    for kind, length in lengths.items():
        assert read(without(LLAMA, "max_position_embeddings"), model_type=kind).max_tokens == length
    eight = {"num_attention_heads": 8, "model_type": "mistral"}
    assert (read(bare | eight).kv_heads, read(bare | eight).window) == (8, 4096)
    assert read(bare | eight, sliding_window=None).window is None
    assert read(bare | {"num_attention_heads": 32, "hidden_size": 64, "model_type": "qwen2"}).kv_heads == 32


def test_biases_and_ties(read):
    assert read(LLAMA, attention_bias=True) == replace(EXPECTED, qkv_bias=True, out_bias=True)
    assert read(LLAMA, mlp_bias=True, tie_word_embeddings=True) == replace(EXPECTED, mlp_bias=True, tied=True)
    assert read(QWEN2) == replace(EXPECTED, qkv_bias=True)
    assert read(LLAMA, head_dim=10).head_width == 10


SLIDING, FULL = "sliding_attention", "full_attention"


def test_windows(read):
    assert read(MISTRAL).window == read(MISTRAL, layer_types=[SLIDING] * 3).window == 9
    windows = {"use_sliding_window": True}
    assert read(QWEN2, max_window_layers=0).window is None
    assert read(QWEN2, **windows, max_window_layers=0).window == 9
    assert read(QWEN2, **windows, max_window_layers=3).window is None
    assert read(QWEN2, **windows).window is None  # 28 layers come before the first window
    assert read(QWEN2, **windows, layer_types=[SLIDING] * 3).window == 9
    later = replace(EXPECTED, qkv_bias=True, window=9, windowed=(False, True, True))
    assert read(QWEN2, **windows, max_window_layers=1) == read(QWEN2, **windows, layer_types=[FULL, SLIDING, SLIDING])
    assert read(QWEN2, **windows, max_window_layers=1) == later
    assert read(QWEN2, layer_types=[FULL] * 3).window is None


def test_attributes_without_effect_on_logits(read):
    raw = dict.fromkeys(hf_attributes._WITHOUT_EFFECT - set(LLAMA), "anything")
    neutral = {"hidden_act": "swish", "partial_rotary_factor": 1.0, "rope_interleaved": False}
    neutral |= {
        "quantization_config": None,
        "auto_map": None,
        "use_mrope": False,
        "chunk_size_feed_forward": 0,
        "pruned_heads": {},
    }
    neutral |= {"is_encoder_decoder": False, "tie_encoder_decoder": False, "add_cross_attention": False}
    assert read(LLAMA | raw | neutral, never_heard_of=None) == EXPECTED


UNKNOWN = {"made_up": 0.5, "rope_thetas": 1.0, "js": {"text": "long" * 99}}


def test_all_that_is_unknown_is_named_at_once(read):
    told = r"unknown attributes made_up \(0.5\), rope_thetas \(1.0\), js \(\{'text': '[^)]{,40}\}\), which may change"
    with pytest.raises(ValueError, match=told + ".* ignore_config made_up,rope_thetas,js .* did you mean 'rope_theta'"):
        read(LLAMA | UNKNOWN)


def test_what_is_said_not_to_matter_is_passed_over_and_kept(tmp_path, read):
    with pytest.raises(ValueError, match="unknown attribute"):
        read(LLAMA | UNKNOWN)
    assert hf.read_config(tmp_path, ignored=tuple(UNKNOWN)) == EXPECTED
    with pytest.raises(ValueError, match="unknown attribute js"):
        hf.read_config(tmp_path, ignored=("made_up", "rope_thetas", "another"))
    text = hf_config.config_text(EXPECTED, dtype="float32", source=tmp_path, ignored=tuple(UNKNOWN))
    assert json.loads(text).items() >= UNKNOWN.items()


@pytest.mark.parametrize("name", ["rope_scaling", "hidden_act", "head_dim", "quantization_config"])
def test_what_the_model_goes_by_cannot_be_ignored(tmp_path, read, name):
    read(LLAMA)
    with pytest.raises(ValueError, match=f"ignore_config: got {name}, which says what the model computes"):
        hf.read_config(tmp_path, ignored=("made_up", name))


def test_code_beside_a_checkpoint_can_be_ignored(tmp_path, read):
    with pytest.raises(ValueError, match=r"auto_map is .* code beside a checkpoint is never run"):
        read(LLAMA, auto_map={"AutoConfig": "own.Config"})
    assert hf.read_config(tmp_path, ignored=("auto_map",)) == EXPECTED


QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}
PHI3 = LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
GEMMA = {"head_dim": 4, "query_pre_attn_scalar": 9, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 9}
GEMMA = without(LLAMA, "hidden_act", "architectures") | GEMMA
GEMMA2, GEMMA3 = (GEMMA | {"model_type": kind} for kind in ("gemma2", "gemma3_text"))


def test_layers_that_do_not_turn(read):
    assert read(without(SMOLLM3, "rope_theta")).rope.base == 2e6
    assert read(SMOLLM3).rotated == ()  # the fourth layer would be the first
    assert read(SMOLLM3, no_rope_layer_interval=2).rotated == (True, False, True)
    assert read(SMOLLM3, no_rope_layers=[0, 1, 1], no_rope_layer_interval=2).rotated == (False, True, True)
    found = read(SMOLLM3, no_rope_layers=[0, 1, 1], use_sliding_window=True, sliding_window=9)
    assert (found.window, found.windowed) == (9, (True, False, False))
    assert read(SMOLLM3, max_window_layers=28, pretraining_tp=2) == replace(EXPECTED)


def test_gemmas(read):
    found = read(GEMMA2, hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid")
    assert found == replace(
        EXPECTED, **GEMMAS, window=9, windowed=(True, False, True), attn_softcap=50.0, logit_softcap=30.0
    )
    assert read(without(GEMMA2, "tie_word_embeddings")).tied
    third = replace(EXPECTED, **GEMMAS, query_norm="head", window=9, local_rope=Rope())
    assert read(GEMMA3) == third
    assert read(GEMMA3, sliding_window_pattern=2) == replace(third, windowed=(True, False, True))
    assert read(GEMMA3, layer_types=[FULL, SLIDING, FULL]).windowed == (False, True, False)
    assert read(GEMMA3, layer_types=[FULL] * 3) == replace(third, window=None, local_rope=None)
    longer = read(GEMMA3, rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_local_base_freq=5e3)
    assert (longer.rope, longer.local_rope, longer.max_tokens) == (Rope(5e5, "linear", 8.0), Rope(5e3), 64)
    nested = {"full_attention": {"rope_theta": 7e5}, "sliding_attention": {"rope_type": "default", "rope_theta": 3e3}}
    five = read(without(GEMMA3, "rope_theta"), rope_parameters=nested)
    assert (five.rope, five.local_rope) == (Rope(7e5), Rope(3e3))
    assert read(without(GEMMA3, "rope_theta")).rope == Rope(1e6)


def test_types_alike_in_what_they_compute(read):
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert read(PHI3, auto_map=code, original_max_position_embeddings=64, sliding_window=9) == read(MISTRAL)
    assert read(QWEN3, head_dim=4, attention_bias=True) == replace(
        EXPECTED, qkv_bias=True, out_bias=True, query_norm="head"
    )
    assert read(QWEN3).head_width == 128


REFUSED = {
    "hidden_act is 'gelu', expected 'silu' or 'swish': the MLP here is SwiGLU": {"hidden_act": "gelu"},
    "partial_rotary_factor is 0.5, expected 1.0": {"partial_rotary_factor": 0.5},
    "rope_interleaved is True": {"rope_interleaved": True},
    "use_mrope is True, expected False": {"use_mrope": True},
    "quantization_config is .*, expected null: .* dequantised": {"quantization_config": {"bits": 4}},
    "auto_map is .*, expected null: code": {"auto_map": {"AutoModel": "x.Y"}},
    "chunk_size_feed_forward is 8": {"chunk_size_feed_forward": 8},
    "pruned_heads is": {"pruned_heads": {"1": [0]}},
    "is_encoder_decoder is True": {"is_encoder_decoder": True},
    "tie_encoder_decoder is True": {"tie_encoder_decoder": True},
    "add_cross_attention is True": {"add_cross_attention": True},
    "cross_attention_hidden_size is 8": {"cross_attention_hidden_size": 8},
    "unknown attribute rope_thetas .* did you mean 'rope_theta'": {"rope_thetas": 1.0},
    "unknown attribute logit_scale": {"logit_scale": 0.5},
    r"architectures is \['LlamaForSequenceClassification'\]": {"architectures": ["LlamaForSequenceClassification"]},
    "architectures is 'LlamaForCausalLM'": {"architectures": "LlamaForCausalLM"},
    "vocab_size is '48', expected an integer": {"vocab_size": "48"},
    "num_hidden_layers is 0, expected an integer of at least 1": {"num_hidden_layers": 0},
    "hidden_size is 16.0": {"hidden_size": 16.0},
    "intermediate_size is True": {"intermediate_size": True},
    "num_key_value_heads is 3, expected a divisor of num_attention_heads 4": {"num_key_value_heads": 3},
    "hidden_size is 18, expected a multiple of num_attention_heads 4": {"hidden_size": 18},
    "head_dim is 5, expected an even": {"head_dim": 5},
    "rms_norm_eps is 0, expected a positive number": {"rms_norm_eps": 0},
    "rms_norm_eps is inf": {"rms_norm_eps": float("inf")},
    "rope_theta is nan": {"rope_theta": float("nan")},
    "tie_word_embeddings is 'yes', expected true or false": {"tie_word_embeddings": "yes"},
    "sliding_window is 9, expected null: transformers ignores it in a llama": {"sliding_window": 9},
    "use_sliding_window is true, expected false: .* llama": {"use_sliding_window": True},
    r"layer_types is \['sliding_attention', .*, expected full_attention 3 times": {"layer_types": [SLIDING] * 3},
    r"layer_types is \['full_attention'\]": {"layer_types": [FULL]},
    "rope_type is 'own', expected one of default, linear": {"rope_scaling": {"type": "own", "factor": 2.0}},
    "truncate is False, expected true": {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
    "mscale is 0.7, which positions of type yarn": {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}},
    "beta_fast is 1.0, expected more": {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1}},
    "rope_scaling or rope_parameters is 'linear'": {"rope_scaling": "linear"},
    r"rope_type is \['linear'\]": {"rope_scaling": {"type": ["linear"]}},
    "rope_type is 'linear' and again 'dynamic'": {"rope_scaling": {"type": "linear", "rope_type": "dynamic"}},
    "rope_theta is 500000.0 and again 10000.0": {"rope_parameters": {"rope_theta": 1e4}},
    "factor is missing": {"rope_scaling": {"type": "linear"}},
    "factor is '2', expected a positive": {"rope_scaling": {"type": "linear", "factor": "2"}},
    "factor is 2.0, which positions of type default": {"rope_scaling": {"type": "default", "factor": 2.0}},
    "low_freq_factor is 1.0, which .* linear": {"rope_scaling": {"type": "linear", **LLAMA3}},
    "fast is 32, which .* type linear": {"rope_scaling": {"type": "linear", "factor": 2.0, "fast": 32}},
    "partial_rotary_factor is 0.25": {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}},
    "full_attention is .*, which": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "high_freq_factor is 1.0, expected more": {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}
    },
    "original_max_position_embeddings is missing": {
        "rope_scaling": {"rope_type": "llama3", **without(LLAMA3, "original_max_position_embeddings")}
    },
    "original_max_position_embeddings is 32, expected max_position_embeddings 64": {
        "rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_llama_does_not_follow_is_refused_by_name(read, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read(LLAMA, **REFUSED[message])


@pytest.mark.parametrize(
    ("message", "raw"),
    [
        ("attention_bias is true, expected false: .* mistral", MISTRAL | {"attention_bias": True}),
        ("mlp_bias is true, expected false: .* qwen2", QWEN2 | {"mlp_bias": True}),
        ("layer_types is .*, expected sliding_attention 3 times", MISTRAL | {"layer_types": [FULL] * 3}),
        ("layer_types is .*, expected full_attention 3 times", QWEN2 | {"layer_types": [SLIDING] * 3}),
        ("layer_types is .*, expected 3 of full_", QWEN2 | {"use_sliding_window": True, "layer_types": [SLIDING]}),
        ("layer_types is", QWEN2 | {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}),
        (
            "rope_type is 'longrope', expected default",
            PHI3 | {"rope_scaling": {"type": "longrope", "short_factor": [1]}},
        ),
        ("rope_type is 'yarn', expected default", PHI3 | {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
        ("attention_bias is true, expected false: .* phi3", PHI3 | {"attention_bias": True}),
        ("auto_map is .*: code", PHI3 | {"auto_map": {"AutoConfig": "other.Config"}}),
        ("no_rope_layers is .*, expected 3 of 0 and 1", SMOLLM3 | {"no_rope_layers": [1, 0]}),
        ("no_rope_layers is .*, expected a layer", SMOLLM3 | {"no_rope_layers": [0, 0, 0]}),
        ("unknown attribute no_rope_layers", LLAMA | {"no_rope_layers": [1, 0, 1]}),
        ("unknown attribute final_logit_softcapping", QWEN3 | {"final_logit_softcapping": 30.0}),
        ("hidden_activation is 'gelu', expected 'gelu_pyt", GEMMA2 | {"hidden_activation": "gelu"}),
        ("attn_logit_softcapping is 50.0, expected null: .* gemma3", GEMMA3 | {"attn_logit_softcapping": 50.0}),
        ("use_bidirectional_attention is True", GEMMA3 | {"use_bidirectional_attention": True}),
        ("sliding_window is 9, expected null: .* olmo2", LLAMA | {"model_type": "olmo2", "sliding_window": 9}),
        ("max_window_layers is -1", QWEN2 | {"use_sliding_window": True, "max_window_layers": -1}),
        ("model_type is 'lama', expected one of llama, mistral, .*; did you", LLAMA | {"model_type": "lama"}),
        ("model_type is None", without(LLAMA, "model_type")),
        ("model_type is ", LLAMA | {"model_type": ["llama"]}),
        ("vocab_size is missing", without(LLAMA, "vocab_size")),
    ],
)
def test_what_the_other_models_do_not_follow_is_refused_by_name(read, message, raw):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read(raw)


def test_directories_that_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent is not a directory: expected a Hugging Face checkpoint"):
        hf.read_config(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        hf.read_config(tmp_path)
    for content, message in ((b"{", "is not JSON"), (b"[]", "is not a JSON object"), (b"\xff\xfe\x00", "is not JSON")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            hf.read_config(tmp_path)


GEMMAS = {"norms": "both", "norm_offset": True, "activation": "gelu", "embed_scale": 4.0, "query_scalar": 9.0}
CONFIGS = [
    EXPECTED,
    replace(EXPECTED, head_width=10, tied=True, mlp_bias=True),
    replace(EXPECTED, qkv_bias=True, out_bias=True),
    replace(EXPECTED, qkv_bias=True),
    replace(EXPECTED, qkv_bias=True, window=5),
    replace(EXPECTED, window=5),
    replace(EXPECTED, width=18, head_width=6),
    replace(EXPECTED, rope=Rope(1e6, "linear", 2.0)),
    replace(EXPECTED, max_tokens=128, rope=Rope(1e6, "yarn", 4.0, 1.0, 32.0, 32, 1.1)),
    replace(EXPECTED, query_norm="head", window=5, windowed=(True, False, True)),
    replace(EXPECTED, rotated=(True, False, True)),
    replace(EXPECTED, query_norm="whole", norms="after"),
    replace(EXPECTED, **GEMMAS, window=5, windowed=(True, False, True), attn_softcap=2.0),
    replace(EXPECTED, **GEMMAS, query_norm="head", window=5, local_rope=Rope(77.0), rope=Rope(5e5, "linear", 2.0)),
    replace(EXPECTED, max_tokens=128, rope=Rope(1e6, "dynamic", 2.0, original_tokens=64)),
    replace(EXPECTED, rope=Rope(1e6, "llama3", 8.0, 1.0, 4.0, 32)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_written_is_read_back(tmp_path, config):
    write_config(tmp_path, replace(config, unroll=3, compute_dtype="bfloat16"), dtype="float16")
    assert hf.read_config(tmp_path) == config
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["torch_dtype"] == "float16"
    assert raw["bos_token_id"] is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out_bias": True}, "no model type of Hugging Face's has norm_eps 1e-05, out_bias True"),
        ({"mlp_bias": True, "query_norm": "head"}, "no model type .* mlp_bias True, query_norm head: expected"),
        ({"rope": Rope(1e4, "dynamic", 4.0, original_tokens=32)}, "max_tokens: got 64 with dynamic .* expected 128"),
        ({"rope": Rope(1e4, "linear", 3.0)}, "max_tokens: got 64 with linear .* expected 66: .* 3 times .*, 22"),
    ],
)
def test_models_that_no_type_describes_are_not_written(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        write_config(tmp_path, replace(EXPECTED, **changed), dtype="float32")
    assert not list(tmp_path.iterdir())


def test_attributes_of_a_source_are_kept_where_it_is_the_same_model(tmp_path, read):
    read(MISTRAL, initializer_range=0.5, sliding_window=None)
    out = tmp_path / "out"
    out.mkdir()
    write_config(out, replace(EXPECTED, unroll=2), dtype="float32", source=tmp_path)
    kept = json.loads((out / "config.json").read_text())
    assert kept == MISTRAL | {"initializer_range": 0.5, "sliding_window": None, "torch_dtype": "float32"}
    write_config(out, replace(EXPECTED, tied=True), dtype="float32", source=tmp_path)
    own = json.loads((out / "config.json").read_text())
    assert (own["model_type"], own["bos_token_id"], own["eos_token_id"]) == ("llama", 1, [2, 3])
    assert "initializer_range" not in own
