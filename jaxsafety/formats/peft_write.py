"""An adapter written as PEFT reads it: a directory of ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxsafety import tree
from jaxsafety.formats import hf_names, hf_write, safetensors_file
from jaxsafety.formats.peft import EMBED, FACTORS, PREFIX, TENSORS_FILE, module_of
from jaxsafety.formats.peft_config import ADAPTER_FILE
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import atomic, whole
from jaxsafety.types import Params


def write(
    directory: Path,
    adapter: Params,
    *,
    config: LlamaConfig,
    alpha: float,
    base: str,
    revision: str | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Writes an adapter, in float32, that PEFT loads on top of the model it was trained on.

    ``directory`` must not exist or be empty. ``adapter`` is that of :mod:`jaxsafety.models.lora`, of host arrays, of a
    model of ``config`` whose files hold each of its matrices in a tensor of its own (see
    ``hf_config.is_fused``); all its factors have one rank. ``base`` and ``revision`` are what names that model, and
    ``tokenizer`` is the directory of a tokenizer that goes with the adapter.

    Raises:
        ValueError: factors that are not finite, or ``directory`` holds something.
        OSError: it cannot be written; nothing is left there.
    """
    tensors = _tensors(tree.flatten(adapter), config)
    rank = next(iter(tensors.values())).shape[0]
    modules = sorted({key.removeprefix(PREFIX).partition(".lora_")[0].rpartition(".")[2] for key in tensors})
    told = _told(rank=rank, alpha=alpha, modules=modules) | {
        "base_model_name_or_path": base,
        "revision": revision,
    }
    shapes = {key: own.shape for key, own in tensors.items()}
    with whole.directory(directory) as scratch:
        hf_write.copy(hf_write.companions(None, tokenizer=tokenizer), scratch)
        safetensors_file.write(scratch / TENSORS_FILE, shapes, tensors.values(), dtype=np.dtype(np.float32))
        atomic.atomic_write(scratch / ADAPTER_FILE, json.dumps(told, indent=2, sort_keys=True) + "\n")


def _tensors(factors: dict[str, Any], config: LlamaConfig) -> dict[str, np.ndarray]:
    """By PEFT's names, each transposed: ours are ``[in, r]`` and ``[r, out]``."""
    found: dict[str, np.ndarray] = {}
    for slot in hf_names.slots(config):
        for end, name in zip("ab", FACTORS[slot.name == EMBED], strict=True):
            own = factors.get(f"{slot.path}_lora_{end}")
            if own is None:
                continue
            key = f"{PREFIX}{module_of(slot.name)}.{name}"
            found[key] = np.asarray(own if slot.layer is None else own[slot.layer], np.float32).T
            if not np.isfinite(found[key]).all():
                raise ValueError(f"the adapter of {slot.path} is not finite: expected numbers only")
    return found


def _told(*, rank: int, alpha: float, modules: list[str]) -> dict[str, Any]:
    # PEFT has an integer there, where it can.
    counted = int(alpha) if alpha == int(alpha) else alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": counted,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }
