"""Every attribute of a ``config.json``: read, without effect on logits, equal to its neutral value, or refused by name.

What is not in these tables is refused: an attribute that nobody knows may change the model.
"""

import json
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxsafety.config.names import closest

_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
# What a model type takes for an attribute that its config.json leaves out, as in transformers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None, "sliding_window": None},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    "olmo2": {
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
    },
    "phi3": {
        "max_position_embeddings": 4096,
        "num_key_value_heads": None,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
    },
    "gemma2": _GEMMA
    | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA | {"max_position_embeddings": 131072, "sliding_window_pattern": 6},
}
# What rotary positions turn by where a type says nothing else.
BASES = {"smollm3": 2e6, "gemma3_text": 1e6}
LOCAL_BASE = 1e4  # of Gemma 3's layers with a window
# Our name of a size beside theirs.
SIZES = {
    "vocab_size": "vocab_size",
    "max_tokens": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_READ = {
    *SIZES.values(),
    *("model_type", "architectures", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
}
# Read in some types alone.
_CAPS = {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
_READ_IN: dict[str, set[str]] = {
    "smollm3": {"no_rope_layers", "no_rope_layer_interval"},
    "gemma2": _CAPS,
    "gemma3_text": _CAPS | {"sliding_window_pattern", "rope_local_base_freq"},
}
_WITHOUT_EFFECT = {
    # records of where the file comes from
    *("_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version", "tokenizer_class"),
    *("finetuning_task", "is_llama_config", "unsloth_version", "unsloth_fixed"),
    # how another program runs the model
    "transformers.js_config",
    # the type that weights are stored in, which the files themselves tell
    *("dtype", "torch_dtype", "use_bfloat16"),
    # training
    *("initializer_range", "attention_dropout", "embd_pdrop", "resid_pdrop", "gradient_checkpointing"),
    *("problem_type", "id2label", "label2id", "num_labels", "task_specific_params"),
    # how transformers runs the model and what it returns
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_scores", "torchscript"),
    *("return_dict_in_generate", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *("_attn_implementation_internal", "_experts_implementation", "_output_attentions", "cache_implementation"),
    *("tf_legacy_loss", "is_decoder", "remove_invalid_values", "prefix", "max_sequence_length"),
    # generation
    *TOKEN_IDS,
    *("unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
    *("diversity_penalty", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "suppress_tokens"),
    *("begin_suppress_tokens", "exponential_decay_length_penalty"),
    # in how many parts products are computed, the sums of which are the same
    "pretraining_tp",
}
# Without effect in some types alone.
_WITHOUT_EFFECT_IN: dict[str, set[str]] = {
    # of positions that are scaled, which are refused
    "phi3": {"original_max_position_embeddings"},
    "gemma3_text": {"_sliding_window_pattern"},
}
# The values that change nothing, and why no other is read.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "the MLP here is SwiGLU"),
    "partial_rotary_factor": ((1.0,), "heads are rotated whole here"),
    "use_bidirectional_attention": ((False,), "a token sees those before it alone"),
    "rope_interleaved": ((False,), "heads are rotated by halves here"),
    "use_mrope": ((False,), "positions have one axis here"),
    "quantization_config": ((), "weights must be plain numbers: save a dequantised model"),
    "auto_map": ((), "code beside a checkpoint is never run"),
    "chunk_size_feed_forward": ((0,), "the MLP is not split here"),
    "pruned_heads": (({},), "all heads are computed here"),
    "is_encoder_decoder": ((False,), "this is a decoder alone"),
    "tie_encoder_decoder": ((False,), "this is a decoder alone"),
    "add_cross_attention": ((False,), "this is a decoder alone"),
    "cross_attention_hidden_size": ((), "this is a decoder alone"),
}
_GELU = {"hidden_act": (("gelu_pytorch_tanh",), "the MLP here is GEGLU with GELU by tanh")}
_GELU |= {"hidden_activation": _GELU["hidden_act"]}
_PHI3 = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
# In some types other values do, the code of Phi-3 being that of transformers.
_NEUTRAL_IN: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "gemma2": _GELU,
    "gemma3_text": _GELU,
    "phi3": {"auto_map": ((_PHI3,), "code beside a checkpoint is never run")},
}


def check(file: Path, raw: Mapping[str, Any], *, kind: str, ignored: Collection[str] = ()) -> None:
    """Checks that the configuration ``raw`` of ``file``, of a type, asks for nothing that the model here does not do.

    ``ignored`` are names that somebody says not to matter: unknown ones, and that of code beside the checkpoint.

    Raises:
        ValueError: attributes are unknown and not ignored; one is known and neither read nor neutral; or one that is
            known is to be ignored.
    """
    read = _READ | _READ_IN.get(kind, set())
    without, neutral = _WITHOUT_EFFECT | _WITHOUT_EFFECT_IN.get(kind, set()), _NEUTRAL | _NEUTRAL_IN.get(kind, {})
    known = {*read, *neutral} - {"auto_map"}
    if lost := sorted(known & set(ignored)):
        raise ValueError(f"ignore_config: got {lost[0]}, which says what the model computes: expected names of others")
    given = {name: value for name, value in raw.items() if value is not None and name not in ignored}
    if unknown := [name for name in given if name not in read | without | neutral.keys()]:
        raise ValueError(f"{file}: {_told(unknown, raw, known)}")
    for name in given.keys() & neutral.keys():
        values, reason = neutral[name]
        if (value := given[name]) not in values:
            expected = " or ".join(repr(neutral) for neutral in values) or "null"
            raise ValueError(f"{file}: {name} is {value!r}, expected {expected}: {reason}")


def _told(unknown: list[str], raw: Mapping[str, Any], known: Collection[str]) -> str:
    """What is said of unknown attributes: all of them, how their values begin, and what they may be meant for."""
    named = ", ".join(f"{name} ({reprlib.repr(raw[name])})" for name in unknown)
    hints = [close for name in unknown if (close := closest(name, known))]
    which = "attribute" if len(unknown) == 1 else "attributes"
    meant = f"; did you mean {' and '.join(map(repr, dict.fromkeys(hints)))}?" if hints else ""
    return (
        f"unknown {which} {named}, which may change the model: expected none, or ignore_config {','.join(unknown)} "
        f"where that does not matter{meant}"
    )


def read_object(file: Path, *, what: str) -> dict[str, Any]:
    """Returns the JSON object in a file, which must be ``what`` of transformers; a ValueError says so if it is none."""
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: expected {what} of transformers") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object: expected {what} of transformers")
    return found


def integer(file: Path, raw: Mapping[str, Any], name: str, *, least: int = 1) -> int:
    """Returns an attribute that must be an integer of at least ``least``, or raises a ValueError that says so."""
    value = raw.get(name)
    if type(value) is not int or value < least:
        got = f"is {value!r}" if name in raw else "is missing"
        raise ValueError(f"{file}: {name} {got}, expected an integer of at least {least}")
    return value


def number(file: Path, raw: Mapping[str, Any], name: str, *, default: float | None = None) -> float:
    """Returns an attribute that must be a positive number, as integer() does; without a default it must be there."""
    value = default if raw.get(name) is None else raw[name]
    # A boolean is an int to Python, and JSON as Python reads it knows infinity.
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        got = f"is {value!r}" if name in raw else "is missing"
        raise ValueError(f"{file}: {name} {got}, expected a positive number")
    return float(value)


def flag(file: Path, raw: Mapping[str, Any], name: str) -> bool:
    """Returns an attribute that must be true or false, false where it is absent or null; else raises a ValueError."""
    value = raw.get(name)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{file}: {name} is {value!r}, expected true or false")
    return bool(value)
