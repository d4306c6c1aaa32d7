"""``adapter_config.json`` of PEFT: what its low-rank factors count, and that nothing it asks for is left out.

Which matrices an adapter changes its tensors tell; fields that chose them, or that began a training, are records.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsafety.config.names import nearest
from jaxsafety.formats.hf_attributes import read_object
from jaxsafety.formats.hf_index import INDEX_FILE, WEIGHTS_FILE

ADAPTER_FILE = "adapter_config.json"
_READ = {
    *("peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "modules_to_save", "ensure_weight_tying", "init_lora_weights"),
}
_RECORDS = {
    # what was to be trained, which the tensors tell; PEFT does not transpose a linear layer, whatever it says
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out"),
    # how factors began, training, and where it ran
    *("lora_dropout", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "inference_mode"),
    *("megatron_core", "qalora_group_size", "runtime_config", "low_cpu_mem_usage", "auto_mapping", "peft_version"),
    *("lora_plus_lr_ratio", "loraplus_lr_ratio", "unsloth_version", "unsloth_fixed"),
}
# What each would make of a model, which is not done here.
_REFUSED = {
    "use_dora": "DoRA scales every column of the sum",
    "lora_bias": "factors have biases",
    "layer_replication": "layers are repeated",
    "trainable_token_indices": "embeddings of some tokens are replaced",
    "target_parameters": "parameters are adapted that are no modules",
    "alora_invocation_tokens": "the adapter acts behind some tokens alone",
    "use_qalora": "inputs are pooled",
    "use_bdlora": "factors are of blocks",
    "arrow_config": "adapters are chosen token by token",
    "kasa_config": "the base is truncated",
    "velora_config": "it is another adapter",
    "monteclora_config": "factors are drawn",
    "megatron_config": "layers are Megatron's",
    "enable_lora": "parts of a matrix are adapted",
}
# Of factors that began otherwise a part lies in the weights that the base had then.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Settings:
    """What an adapter says of itself.

    Attributes:
        file: where it says so.
        rank, alpha: of factors whose modules no pattern names.
        rank_pattern, alpha_pattern: those of others, by regular expressions of how modules' names end.
        stabilised: whether products count ``alpha / sqrt(rank)`` times (rsLoRA), and not ``alpha / rank``.
        copies: ends of the names of modules that have weights of their own, whatever they were tied to.
        tying: whether the head is adapted as the embeddings that it is tied to are.
        base: the model that it was trained on, as its trainer named it.
        revision: of it, on the Hub.
    """

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    stabilised: bool
    copies: tuple[str, ...]
    tying: bool
    base: str | None
    revision: str | None

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's factors; ``module`` is its name, such as ``model.layers.0.mlp.up_proj``."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale(self, module: str) -> float:
        """Returns how often the product of a module's factors counts."""
        rank, alpha = self.rank_of(module), _matching(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.stabilised else alpha / rank

    def is_copy(self, module: str) -> bool:
        """Whether a module has weights of its own."""
        return any(module == name or module.endswith(f".{name}") for name in self.copies)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no model beside it."""
    models = ((directory / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE))
    return (directory / ADAPTER_FILE).is_file() and not any(models)


def read_settings(directory: Path) -> Settings:
    """Returns what the adapter in a directory says of itself.

    Raises:
        FileNotFoundError: there is no such directory, or no adapter in it.
        ValueError: no LoRA of a model of next tokens, or a field that is not valid, not known, or not followed here.
    """
    file = directory / ADAPTER_FILE
    if not file.is_file():
        found = f"holds no {ADAPTER_FILE}" if directory.is_dir() else "is not a directory"
        raise FileNotFoundError(f"{directory} {found}: expected an adapter of PEFT")
    raw = read_object(file, what="PEFT's configuration of an adapter for a model")
    _check(file, raw)
    return Settings(
        file, _rank(file, "r", raw.get("r")), _alpha(file, "lora_alpha", raw.get("lora_alpha")),
        {key: _rank(file, f"rank_pattern of {key}", one) for key, one in _pattern(file, raw, "rank_pattern")},
        {key: _alpha(file, f"alpha_pattern of {key}", one) for key, one in _pattern(file, raw, "alpha_pattern")},
        _flag(file, raw, "use_rslora"), _names(file, raw, "modules_to_save"), _flag(file, raw, "ensure_weight_tying"),
        _text(file, raw, "base_model_name_or_path"), _text(file, raw, "revision"),
    )  # fmt: skip


def _check(file: Path, raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise ValueError(
            f"{file}: peft_type is {raw.get('peft_type')!r}, expected LORA, the adapters that are read here"
        )
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"{file}: task_type is {raw['task_type']!r}, expected CAUSAL_LM, a model of next tokens")
    begun = raw.get("init_lora_weights", True)
    if begun not in _BEGINNINGS:
        raise ValueError(
            f"{file}: init_lora_weights is {begun!r}, of which a part may lie in the weights that the base had then: "
            "expected true; PEFT's save_pretrained has path_initial_model_for_weight_conversion for it"
        )
    for name, value in raw.items():
        if not value or name in _READ or name in _RECORDS or name == "task_type":
            continue
        if name not in _REFUSED:
            hint = nearest(name, [*_READ, *_REFUSED])
            raise ValueError(f"{file}: unknown field {name} ({value!r}), which may change the model{hint}")
        raise ValueError(f"{file}: {name} is {value!r}, expected none: {_REFUSED[name]}, which is not done here")


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first that names a module as PEFT understands it: by its whole name or from a dot on."""
    found = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _pattern(file: Path, raw: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    given = raw.get(name) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{file}: {name} is {given!r}, expected numbers by the names of modules")
    for key in given:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{file}: {name} has {key!r}, which is no regular expression ({error})") from error
    return list(given.items())


def _rank(file: Path, what: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{file}: {what} is {value!r}, expected an integer of at least 1")
    return value


def _alpha(file: Path, what: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{file}: {what} is {value!r}, expected a number")
    return float(value)


def _flag(file: Path, raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name) or False
    if value is not True and value is not False:
        raise ValueError(f"{file}: {name} is {value!r}, expected true or false")
    return value


def _names(file: Path, raw: Mapping[str, Any], name: str) -> tuple[str, ...]:
    given = raw.get(name) or []
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ValueError(f"{file}: {name} is {given!r}, expected a list of names of modules")
    return tuple(given)


def _text(file: Path, raw: Mapping[str, Any], name: str) -> str | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{file}: {name} is {value!r}, expected text")
    return value or None
