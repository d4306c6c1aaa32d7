"""The authors' GPT written a second time, in PyTorch from the facts about it, with the names of their state dicts.

As a program it writes what ``test_official.py`` compares with where torch is not installed:

    python -m tests.formats.official_reference tests/formats/golden/official.npz
"""

import math
import sys
from pathlib import Path

import numpy as np

# Width 48 is one of theirs, with three heads.
SIZES = {"v": 59, "t": 40, "layers": 2, "d": 48, "f": 192}


def state_dict(*, v, t, layers, d, f, seed=0, prefix="module.", std=0.2):
    """Random tensors by their names as NumPy arrays; the second norms of the blocks are drawn too, and never read."""
    rng = np.random.default_rng(seed)

    def draw(*shape, about=0.0):
        # In half precision, which float32 holds exactly: the committed file is half as large.
        return (about + std * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)

    found = {"transformer.wte.weight": draw(v, d), "transformer.wpe.pe": positions(t, d)[None]}
    for layer in range(layers):
        block = f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            found |= {f"{block}{norm}.weight": draw(d, about=1.0), f"{block}{norm}.bias": draw(d)}
        found[f"{block}attn.bias"] = np.tri(t, dtype=np.float32)[None, None]
        for name, shape in (("attn.c_attn", (3 * d, d)), ("attn.c_proj", (d, d)), ("c_fc", (f, d)), ("c_proj", (d, f))):
            found |= {f"{block}{name}.weight": draw(*shape), f"{block}{name}.bias": draw(shape[0])}
    found |= {"transformer.ln_f.weight": draw(d, about=1.0), "transformer.ln_f.bias": draw(d)}
    return {prefix + name: value for name, value in (found | {"lm_head.weight": draw(v, d)}).items()}


def positions(t, d):
    """Sines in even channels and cosines in odd ones, wavelengths from 2 pi to nearly 20 000 pi."""
    angles = np.arange(t)[:, None] / 10_000 ** (np.arange(0, d, 2) / d)[None, :]
    table = np.empty((t, d), np.float32)
    table[:, 0::2], table[:, 1::2] = np.sin(angles), np.cos(angles)
    return table


def logits(tensors, tokens, *, heads):
    """Their model's answer, ``[b, t, v]``: every block goes on from its normalised input and norms no second time."""
    import torch
    from torch.nn.functional import gelu, layer_norm, linear

    state = {name.removeprefix("module."): torch.tensor(value) for name, value in tensors.items()}
    tokens = torch.tensor(tokens)
    b, t = tokens.shape

    def dense(x, name):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def attend(x, name):
        d = x.shape[-1]
        q, k, v = (
            part.view(b, t, heads, d // heads).transpose(1, 2) for part in dense(x, f"{name}.c_attn").split(d, dim=2)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(d // heads)
        scores = scores.masked_fill(state[f"{name}.bias"][:, :, :t, :t] == 0, float("-inf"))
        mixed = scores.softmax(dim=-1) @ v
        return dense(mixed.transpose(1, 2).reshape(b, t, d), f"{name}.c_proj")

    x = state["transformer.wte.weight"][tokens] + state["transformer.wpe.pe"][:, :t]
    for layer in range(sum(name.endswith(".attn.bias") for name in state)):
        block = f"transformer.h.{layer}"
        x = norm(x, f"{block}.ln_1")
        x = x + attend(x, f"{block}.attn")
        x = x + dense(gelu(dense(x, f"{block}.c_fc"), approximate="tanh"), f"{block}.c_proj")
    return linear(norm(x, "transformer.ln_f"), state["lm_head.weight"]).numpy()


def save(file, tensors, *, dtype="float32", **options):
    """Writes tensors as they do."""
    import torch

    torch.save({name: torch.tensor(value, dtype=getattr(torch, dtype)) for name, value in tensors.items()}, file,
               **options)  # fmt: skip


def main(file):
    """Writes tensors, weights in half precision, with tokens and logits."""
    tensors = state_dict(**SIZES)
    tokens = np.random.default_rng(1).integers(0, SIZES["v"], (2, SIZES["t"]))
    small = {name: value if name.endswith(".pe") else value.astype(np.float16) for name, value in tensors.items()}
    np.savez_compressed(file, tokens=tokens, logits=logits(tensors, tokens, heads=3), **small)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
