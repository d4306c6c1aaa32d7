"""``config.json`` of a Hugging Face checkpoint to and from :class:`~jaxsafety.models.llama.LlamaConfig`.

Reads the dialects of transformers 4 and 5 and writes the former, which both versions read. An attribute that the model
here does not follow is refused by name.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jaxsafety.config.names import nearest
from jaxsafety.formats import hf_attributes as attributes
from jaxsafety.formats.hf_rope import read_rope, scaled_tokens, unscaled_tokens, write_rope
from jaxsafety.models.llama import LlamaConfig

ParamsDtype = Literal["float32", "bfloat16", "float16"]
CONFIG_FILE = "config.json"
_ADAPTER_FILE = "adapter_config.json"
_OURS = ("unroll", "recompute", "compute_dtype", "stored_dtype")
_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def read_config(directory: Path, *, ignored: Collection[str] = ()) -> LlamaConfig:
    """Returns the model that a Hugging Face checkpoint of type llama, mistral or qwen2 describes.

    ``ignored`` are attributes that it may have though nobody here knows them, as they do not matter.
    What the file does not know, ``unroll``, ``recompute``, ``compute_dtype`` and ``stored_dtype``, has its default.

    Raises:
        FileNotFoundError: no such directory, or no ``config.json`` in it.
        ValueError: another model type, or an attribute that is unknown, not valid, or not followed here.
    """
    file, raw = directory / CONFIG_FILE, _read(directory)
    kind = _model_type(file, raw)
    attributes.check(file, raw, ignored=ignored)
    _check_architectures(file, raw)
    raw = attributes.DEFAULTS[kind] | raw
    sizes = {ours: attributes.integer(file, raw, theirs) for ours, theirs in attributes.SIZES.items()}
    heads, width, unscaled = sizes["heads"], sizes["width"], sizes.pop("max_tokens")
    rope = read_rope(file, raw, max_tokens=unscaled)
    qkv_bias, out_bias, mlp_bias = _biases(file, raw, kind)
    return LlamaConfig(
        **sizes,
        max_tokens=scaled_tokens(rope, unscaled),
        kv_heads=_kv_heads(file, raw, heads),
        head_width=_head_width(file, raw, heads=heads, width=width),
        norm_eps=attributes.number(file, raw, "rms_norm_eps", default=LlamaConfig.norm_eps),
        rope=rope,
        tied=attributes.flag(file, raw, "tie_word_embeddings"),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        window=_window(file, raw, kind, layers=sizes["layers"]),
    )


def config_text(
    config: LlamaConfig, *, dtype: ParamsDtype, source: Path | None = None, ignored: Collection[str] = ()
) -> str:
    """Returns the ``config.json`` of a model whose weights are stored in ``dtype``.

    ``source`` is a checkpoint directory that the model goes back to: where it describes the same model, all of its
    attributes are kept, else only the ids of its special tokens; for ``ignored`` see :func:`read_config`.

    Raises:
        FileNotFoundError: ``source`` has no ``config.json``.
        ValueError: no model type of Hugging Face's has this configuration, or that of ``source`` cannot be read.
    """
    own = replace(config, **{name: getattr(LlamaConfig, name) for name in _OURS})
    raw = {} if source is None else _read(source)
    if source is None or read_config(source, ignored=ignored) != own:
        raw = _describe(config) | {name: raw.get(name) for name in attributes.TOKEN_IDS}
    raw = {name: value for name, value in raw.items() if name not in ("dtype", "torch_dtype")} | {"torch_dtype": dtype}
    return json.dumps(raw, indent=2, sort_keys=True) + "\n"


def _read(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory: expected a Hugging Face checkpoint")
    file = directory / CONFIG_FILE
    if not file.is_file():
        alone = (directory / _ADAPTER_FILE).exists()
        found = "an adapter of PEFT and no model" if alone else f"no {CONFIG_FILE}"
        hint = ", such as merge_and_unload() makes of it" if alone else ""
        raise FileNotFoundError(f"{directory} holds {found}: expected a Hugging Face checkpoint{hint}")
    return attributes.read_object(file, what="a configuration")


def _model_type(file: Path, raw: Mapping[str, Any]) -> str:
    kind = raw.get("model_type")
    if kind not in list(_CLASSES):
        hint = nearest(kind, _CLASSES) if isinstance(kind, str) else ""
        raise ValueError(f"{file}: model_type is {kind!r}, expected one of {', '.join(_CLASSES)}{hint}")
    return kind


def _check_architectures(file: Path, raw: Mapping[str, Any]) -> None:
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(str(name).endswith("ForCausalLM") for name in names):
        raise ValueError(f"{file}: architectures is {names!r}, expected a model of next tokens (...ForCausalLM)")


def _kv_heads(file: Path, raw: Mapping[str, Any], heads: int) -> int:
    count = heads if raw["num_key_value_heads"] is None else attributes.integer(file, raw, "num_key_value_heads")
    if heads % count:
        raise ValueError(f"{file}: num_key_value_heads is {count}, expected a divisor of num_attention_heads {heads}")
    return count


def _head_width(file: Path, raw: Mapping[str, Any], *, heads: int, width: int) -> int:
    if raw.get("head_dim") is None and width % heads:
        raise ValueError(f"{file}: hidden_size is {width}, expected a multiple of num_attention_heads {heads}")
    value = width // heads if raw.get("head_dim") is None else attributes.integer(file, raw, "head_dim")
    if value % 2:
        raise ValueError(f"{file}: head_dim is {value}, expected an even number: its halves are rotated")
    return value


def _biases(file: Path, raw: Mapping[str, Any], kind: str) -> tuple[bool, bool, bool]:
    """Whether queries, keys and values, the attention's output, and the MLP have biases."""
    attention, mlp = (attributes.flag(file, raw, name) for name in ("attention_bias", "mlp_bias"))
    if kind == "llama":
        return attention, attention, mlp
    for name, value in (("attention_bias", attention), ("mlp_bias", mlp)):
        if value:
            raise ValueError(f"{file}: {name} is true, expected false: transformers ignores it in a {kind} model")
    return kind == "qwen2", False, False


def _window(file: Path, raw: Mapping[str, Any], kind: str, *, layers: int) -> int | None:
    window = None if raw["sliding_window"] is None else attributes.integer(file, raw, "sliding_window")
    uses = attributes.flag(file, raw, "use_sliding_window")
    if kind == "llama" and window is not None:
        raise ValueError(f"{file}: sliding_window is {window}, expected null: transformers ignores it in a llama model")
    if uses and kind != "qwen2":
        raise ValueError(
            f"{file}: use_sliding_window is true, expected false: transformers ignores it in a {kind} model"
        )
    if kind == "qwen2" and not uses:
        window = None
    first = attributes.integer(file, raw, "max_window_layers", least=0) if kind == "qwen2" and uses else 0
    names = ("full_attention", "sliding_attention")
    types = [names[window is not None and layer >= first] for layer in range(layers)]
    given = raw.get("layer_types") or types
    # Only a Qwen2 model with windows reads the list; in any other it must say what the model does.
    if given != types and not (kind == "qwen2" and window is not None):
        raise ValueError(f"{file}: layer_types is {given!r}, expected {types[0]} {layers} times")
    if given not in ([name] * layers for name in names):
        raise ValueError(f"{file}: its layers are {given!r}, expected one type of attention in all {layers}")
    return window if given[0] == "sliding_attention" else None


def _describe(config: LlamaConfig) -> dict[str, Any]:
    kind = _fitting_type(config)
    sizes = replace(config, max_tokens=unscaled_tokens(config.rope, config.max_tokens))
    raw = {theirs: getattr(sizes, ours) for ours, theirs in attributes.SIZES.items()}
    raw |= {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **write_rope(config.rope),
    }
    if kind == "llama":
        return raw | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    raw |= {"sliding_window": config.window}
    if kind == "mistral":
        return raw
    first = config.layers if config.window is None else 0
    return raw | {"use_sliding_window": config.window is not None, "max_window_layers": first}


def _fitting_type(config: LlamaConfig) -> str:
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    # transformers refuses a llama whose width the heads do not divide, though head_dim is given.
    if config.qkv_bias == config.out_bias and config.window is None and not config.width % config.heads:
        return "llama"
    if biases == (False, False, False):
        return "mistral"
    if biases == (True, False, False):
        return "qwen2"
    raise ValueError(
        f"no model type of Hugging Face's has qkv_bias {biases[0]}, out_bias {biases[1]}, mlp_bias {biases[2]} and "
        f"window {config.window}: expected equal attention biases and no window, or biases of q, k and v at most"
    )
