"""Adapters as PEFT writes them, of random factors."""

import json

import numpy as np

from jaxsafety.formats import hf_names, safetensors_file

PREFIX = "base_model.model."
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 6,
    "bias": "none",
    "target_modules": list(MODULES),
    "inference_mode": True,
    "lora_dropout": 0.1,
    "init_lora_weights": True,
    "loftq_config": {},
    "peft_version": "0.17.1",
}


def tensors(config, *, modules=MODULES, rank=4, seed=0):
    """Random factors of some modules, in every layer or outside of these, by PEFT's names."""
    rng, found = np.random.default_rng(seed), {}
    for slot in hf_names.slots(config):
        module = slot.name.removesuffix(".weight")
        if len(slot.shape) < 2 or module.rpartition(".")[2] not in modules:
            continue
        own, key = rank(module) if callable(rank) else rank, f"{PREFIX}{module}"
        if module.endswith("embed_tokens"):
            shapes = {"lora_embedding_A": (own, slot.shape[0]), "lora_embedding_B": (slot.shape[1], own)}
        else:
            shapes = {"lora_A.weight": (own, slot.shape[1]), "lora_B.weight": (slot.shape[0], own)}
        found |= {f"{key}.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return found


def write(directory, held, **fields):
    """Writes an adapter's directory; fields of None are left out."""
    directory.mkdir(exist_ok=True)
    told = {name: value for name, value in (CONFIG | fields).items() if value is not None}
    (directory / "adapter_config.json").write_text(json.dumps(told))
    shapes = {name: one.shape for name, one in held.items()}
    file = directory / "adapter_model.safetensors"
    safetensors_file.write(file, shapes, held.values(), dtype=np.dtype(np.float32))
    return directory
