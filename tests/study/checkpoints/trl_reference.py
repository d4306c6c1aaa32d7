"""DPO of TRL on a tiny model of transformers: the loss, and its gradient by every parameter.

As a program it writes what ``test_trl.py`` compares with where TRL is not installed:

    python -m tests.study.checkpoints.trl_reference tests/study/checkpoints/golden
"""

import sys
from pathlib import Path

import numpy as np

MODEL = Path(__file__).parents[2] / "formats" / "golden" / "llama"
BETA = 0.3
PAIRS, TOKENS = 3, 20


def batch():
    """Token ids ``[2 b, t]``, chosen before rejected, and which of them are scored."""
    drawn = np.random.default_rng(1)
    tokens = drawn.integers(0, 48, (2 * PAIRS, TOKENS))
    tokens[PAIRS:, :10] = tokens[:PAIRS, :10]
    places = np.arange(TOKENS)[None]
    answer = (places >= 10) & (places < drawn.integers(12, TOKENS + 1, (2 * PAIRS, 1)))
    return tokens, answer


def weights(stored):
    """Policy and reference from a checkpoint's tensors by name: small enough for well-behaved gradients."""
    drawn = np.random.default_rng(2)
    policy = {name: 0.3 * np.asarray(stored[name], np.float32) for name in sorted(stored)}
    noise = {name: 0.02 * drawn.standard_normal(own.shape).astype(np.float32) for name, own in policy.items()}
    return policy, {name: own + noise[name] for name, own in policy.items()}


def computed():
    """Loss and gradients by name."""
    import torch
    import transformers
    from safetensors.numpy import load_file

    from benchmarks.bench_dpo import trl_loss

    tokens, answer = (torch.tensor(part) for part in batch())
    models = []
    for state in weights(load_file(MODEL / "model.safetensors")):
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
        model.load_state_dict({name: torch.tensor(own) for name, own in state.items()})
        models.append(model)
    policy, reference = models
    with torch.no_grad():
        expected = reference(tokens).logits
    loss = trl_loss(policy(tokens).logits, expected, tokens, answer, beta=BETA)
    loss.backward()
    gradients = {name: own.grad.numpy() for name, own in policy.named_parameters()}
    return {"loss": loss.detach().numpy()} | gradients


def main(folder):
    """Writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "dpo.npz", **computed())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
