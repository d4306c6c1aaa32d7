"""The training step's peer: the paper's decoder and its step in plain PyTorch, as a textbook would write them.

Modules, autograd and ``torch.optim``, nothing fused by hand. It shares the parameters with the library (PyTorch stores
matrices ``[out, in]``) and no code. Importing this needs torch, the extra ``peers``.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from jaxsafety.models.gpt import GPTConfig
from jaxsafety.training.optim import OptimConfig
from jaxsafety.types import Params

# ``plain`` forms the scores and their softmax, as the paper's model does; ``fused`` is PyTorch's own operator.
Attention = Literal["plain", "fused"]
PlainStep = Callable[[Tensor, Tensor, Tensor], Tensor]

_UNSCORED = -100


class Block(nn.Module):
    """``u = LN(x); v = u + Attn(u); out = v + MLP(v)``: skip branches start from the normalised input."""

    def __init__(self, config: GPTConfig, *, attention: Attention):
        super().__init__()
        width, hidden = config.width, config.mlp_width or 4 * config.width
        self.heads, self.attention = config.heads, attention
        self.norm = nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        v = u + self.o(self._mix(u))
        return v + self.down(functional.gelu(self.up(v), approximate="tanh"))

    def _mix(self, u: Tensor) -> Tensor:
        batch, tokens, width = u.shape
        split = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (x.reshape(split).transpose(1, 2) for x in self.qkv(u).chunk(3, dim=-1))
        if self.attention == "fused":
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(split[-1])
            future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v
        return mixed.transpose(1, 2).reshape(u.shape)


class GPT(nn.Module):
    """The paper's decoder: embeddings plus fixed sinusoids, blocks, a last norm, an unembedding without bias."""

    def __init__(self, config: GPTConfig, *, attention: Attention):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, attention=attention) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.unembed = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("positions", _sinusoids(config.max_tokens, config.width), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


def from_params(params: Params, *, config: GPTConfig, attention: Attention = "plain") -> GPT:
    """Builds the peer with the library's parameters.

    Args:
        params: from ``gpt.init``.
        config: of the paper's block with sinusoidal positions.
        attention: how attention is computed; it changes no result.

    Raises:
        ValueError: another block or other positions.
    """
    if (config.block, config.positions) != ("paper", "sinusoidal"):
        raise ValueError(
            "the peer has the paper's block and sinusoidal positions, "
            f"got block {config.block!r} and positions {config.positions!r}"
        )
    model = GPT(config, attention=attention)
    model.load_state_dict(_state(jax.tree.map(np.asarray, params), layers=config.layers))
    return model


def _state(params: Params, *, layers: int) -> dict[str, Tensor]:
    blocks, attn, mlp = params["blocks"], params["blocks"]["attn"], params["blocks"]["mlp"]
    state = {"embed.weight": _tensor(params["embed"]), "unembed.weight": _tensor(params["unembed"].T)}
    state |= {"norm.weight": _tensor(params["norm"]["scale"]), "norm.bias": _tensor(params["norm"]["bias"])}
    for i in range(layers):
        matrices = {
            "qkv": [np.concatenate([attn[f"{n}{suffix}"][i] for n in "qkv"], -1) for suffix in ("", "_bias")],
            "o": (attn["o"][i], attn["o_bias"][i]),
            "up": (mlp["up"][i], mlp["up_bias"][i]),
            "down": (mlp["down"][i], mlp["down_bias"][i]),
        }  # fmt: skip
        for name, (kernel, bias) in matrices.items():
            state |= {f"blocks.{i}.{name}.weight": _tensor(kernel.T), f"blocks.{i}.{name}.bias": _tensor(bias)}
        scale, bias = (blocks["norm_attn"][name][i] for name in ("scale", "bias"))
        state |= {f"blocks.{i}.norm.weight": _tensor(scale), f"blocks.{i}.norm.bias": _tensor(bias)}
    return state


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))


def _sinusoids(tokens: int, width: int) -> Tensor:
    channel = torch.arange(width)
    angles = torch.arange(tokens)[:, None] / 10_000 ** ((channel - channel % 2) / width)
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos())


def loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of the scored targets, in nats per token."""
    scored = targets.masked_fill(~mask, _UNSCORED)
    return functional.cross_entropy(logits.float().flatten(0, 1), scored.flatten(), ignore_index=_UNSCORED)


def make_step(
    model: GPT, config: OptimConfig, *, peak_lr: float, total_steps: int, autocast: bool = False
) -> PlainStep:
    """Returns one training step ``(tokens, targets, mask) -> loss``, which changes the model.

    Args:
        model: the peer.
        config: of AdamW; its matrices alone are decayed, as in the library.
        peak_lr: peak learning rate.
        total_steps: length of the run, which the schedule is a fraction of.
        autocast: whether the forward pass multiplies in bfloat16.
    """
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    chosen = {id(weight) for weight in decayed}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(config.b1, config.b2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _share_of_peak(config, i / total_steps))

    def step(tokens: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tokens)
        value = loss(logits, targets, mask)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
        return value.detach()

    return step


def _share_of_peak(config: OptimConfig, progress: float) -> float:
    if progress < config.warmup:
        return progress / config.warmup
    beyond = min((progress - config.warmup) / (config.decay_end - config.warmup), 1.0)
    return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * beyond)) / 2
