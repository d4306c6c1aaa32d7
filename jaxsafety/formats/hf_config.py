"""``config.json`` of a Hugging Face checkpoint to and from :class:`~jaxsafety.models.llama.LlamaConfig`.

Reads the dialects of transformers 4 and 5 and writes the former, which both versions read. An attribute that the model
here does not follow is refused by name.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Literal

from jaxsafety.config.names import nearest
from jaxsafety.formats import hf_attributes as attributes
from jaxsafety.formats import hf_families as families
from jaxsafety.formats.hf_rope import read_local_rope, read_rope, scaled_tokens, unscaled_tokens, write_rope
from jaxsafety.models.llama import LlamaConfig, Rope

# In the order of `subject.store`: typing keeps one of two optional types that differ in order alone.
ParamsDtype = Literal["float32", "float16", "bfloat16"]
CONFIG_FILE = "config.json"
_ADAPTER_FILE = "adapter_config.json"
_OURS = ("unroll", "recompute", "compute_dtype", "stored_dtype")


def read_config(directory: Path, *, ignored: Collection[str] = ()) -> LlamaConfig:
    """Returns the model that a Hugging Face checkpoint of one of the types here describes.

    ``ignored`` are attributes that it may have though nobody here knows them, as they do not matter.
    What the file does not know, ``unroll``, ``recompute``, ``compute_dtype`` and ``stored_dtype``, has its default.

    Raises:
        FileNotFoundError: no such directory, or no ``config.json`` in it.
        ValueError: another model type, or an attribute that is unknown, not valid, or not followed here.
    """
    return _model(directory / CONFIG_FILE, _read(directory), ignored=ignored)


def is_fused(directory: Path) -> bool:
    """Whether the files of a checkpoint hold queries, keys and values in one matrix, and gate and up in another."""
    return _model_type(directory / CONFIG_FILE, _read(directory)) in families.FUSED


def _model(file: Path, raw: Mapping[str, Any], *, ignored: Collection[str] = ()) -> LlamaConfig:
    kind = _model_type(file, raw)
    attributes.check(file, raw, kind=kind, ignored=ignored)
    _check_architectures(file, raw)
    raw = attributes.DEFAULTS[kind] | raw
    sizes = {ours: attributes.integer(file, raw, theirs) for ours, theirs in attributes.SIZES.items()}
    heads, width, unscaled = sizes["heads"], sizes["width"], sizes.pop("max_tokens")
    more = families.read(file, raw, kind, layers=sizes["layers"], width=width)
    local = read_local_rope(file, raw) if kind == "gemma3_text" and more["window"] else None
    rope = read_rope(file, raw, max_tokens=unscaled, base=attributes.BASES.get(kind, Rope.base))
    return LlamaConfig(
        **sizes,
        **more,
        max_tokens=scaled_tokens(rope, unscaled, kind=kind),
        kv_heads=_kv_heads(file, raw, heads),
        head_width=_head_width(file, raw, heads=heads, width=width),
        norm_eps=attributes.number(file, raw, "rms_norm_eps", default=LlamaConfig.norm_eps),
        rope=rope,
        local_rope=local,
        tied=attributes.flag(file, raw, "tie_word_embeddings"),
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
        raw = _describe(own) | {name: raw.get(name) for name in attributes.TOKEN_IDS}
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
    if kind not in list(families.CLASSES):
        hint = nearest(kind, families.CLASSES) if isinstance(kind, str) else ""
        raise ValueError(f"{file}: model_type is {kind!r}, expected one of {', '.join(families.CLASSES)}{hint}")
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


def _describe(config: LlamaConfig) -> dict[str, Any]:
    """The attributes of the first type that has such models."""
    for kind in families.CLASSES:
        if families.can_be(config, kind) and kind not in families.FUSED:
            raw = _as_type(config, kind)
            if raw is not None and _reads_as(raw) == config:
                return raw
    unscaled_tokens(config.rope, config.max_tokens, kind="llama")
    plain = {one.name: one.default for one in fields(LlamaConfig) if one.default is not MISSING}
    told = [f"{name} {getattr(config, name)}" for name, value in plain.items() if getattr(config, name) != value]
    raise ValueError(
        f"no model type of Hugging Face's has {', '.join(told)}: expected what one of {', '.join(families.CLASSES)} has"
    )


def _as_type(config: LlamaConfig, kind: str) -> dict[str, Any] | None:
    try:
        sizes = replace(config, max_tokens=unscaled_tokens(config.rope, config.max_tokens, kind=kind))
    except ValueError:  # a length that the type does not have
        return None
    return {
        **{theirs: getattr(sizes, ours) for ours, theirs in attributes.SIZES.items()},
        "model_type": kind,
        "architectures": [families.CLASSES[kind]],
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **families.describe(config, kind),
        **write_rope(config.rope),
    }


def _reads_as(raw: Mapping[str, Any]) -> LlamaConfig | None:
    try:
        return _model(Path(CONFIG_FILE), raw)
    except ValueError:  # what the type does not have
        return None
