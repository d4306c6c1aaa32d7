"""Tiny random models of transformers, one for everything that a configuration can ask for.

As a program it writes what ``test_golden.py`` compares with where neither transformers nor torch is installed:

    python -m tests.formats.theirs tests/formats/golden
"""

import sys
from pathlib import Path

import numpy as np

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Version 5 takes the words of version 4 and saves its own, so that both dialects come out of the same tests.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "head_dim": ("llama", {"head_dim": 6, "num_key_value_heads": 4}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "linear": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "dynamic": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral without windows": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
}
# One of every other type, and variants of them.
FAMILIES = {
    "qwen3": ("qwen3", {"head_dim": 6}),
    "yarn": ("qwen3", {"head_dim": 8, "num_attention_heads": 2, "rope_scaling": YARN, "rope_theta": 1e3}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "pad_token_id": 0}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "phi3": ("phi3", {"pad_token_id": 0, "sliding_window": 5}),
    "gemma2": ("gemma2", {"head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"head_dim": 6, "sliding_window": 5, "sliding_window_pattern": 3, "rope_theta": 5e5,
                               "rope_local_base_freq": 100.0, "query_pre_attn_scalar": 9,
                               "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
}  # fmt: skip
VARIANTS = {
    "qwen2 some windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3 biases": ("qwen3", {"head_dim": 4, "attention_bias": True, "use_sliding_window": True, "sliding_window": 5,
                               "max_window_layers": 2}),
    "smollm3 windows": ("smollm3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 5,
                                    "pad_token_id": 0, "tie_word_embeddings": False}),
}  # fmt: skip


def save(name, directory, *, dtype="float32", **saving):
    """Makes a random model, saves it and returns it."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind, changed = (MODELS | FAMILIES | VARIANTS)[name]
    config = transformers.AutoConfig.for_model(kind, **SIZES | changed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    for parameter in model.parameters():  # norms and biases begin as ones and zeros
        torch.nn.init.normal_(parameter)
    model.save_pretrained(directory, **saving)
    return model


def outputs(model, tokens):
    """Logits of prompts without padding, and sixteen tokens that continue them greedily."""
    import torch

    tokens = torch.tensor(tokens)
    with torch.no_grad():
        logits = model(tokens).logits
    # Without a mask it would take the token that it pads with for padding.
    written = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return logits.numpy(), written[:, tokens.shape[1] :].numpy()


def main(folder):
    """Writes every model with its prompts, logits and continuations."""
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 20))
    for name in MODELS | FAMILIES:
        directory = folder / name.replace(" ", "_")
        logits, written = outputs(save(name, directory), tokens)
        (directory / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(directory / "expected.npz", tokens=tokens, logits=logits, written=written)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
