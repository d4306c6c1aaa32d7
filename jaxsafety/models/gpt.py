"""GPT: the paper's decoder and its textbook variants, as pure functions of a nested dict of stacked weights.

Paths: ``embed``, ``blocks/{norm_attn, attn, norm_mlp, mlp}``, ``norm``, ``unembed``; leaves below ``blocks`` lead with
``l``, matrices are ``[in, out]``, heads are contiguous. Rows ``[b*t, d]`` run through a scan over layers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from functools import cache, partial
from operator import itemgetter
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.config.names import check_name
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.programs import compiled
from jaxsafety.models.fused import Attention
from jaxsafety.models.generation import windowed
from jaxsafety.models.gpt_block import additive_positions, attended, block, heads, rope_table, unembedded
from jaxsafety.models.gpt_branches import branches
from jaxsafety.models.inputs import check_inputs, embed, embedded
from jaxsafety.models.layers import ComputeDtype
from jaxsafety.models.sites import chosen_layers, of_layer, pick, scored
from jaxsafety.types import Hook, Key, Model, Output, Params, Unsupported

Block = Literal["paper", "pre_ln"]
Positions = Literal["sinusoidal", "learned", "rope"]
Preset = Literal["paper", "small", "tiny"]
Site = Literal[
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_in",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
]

_SIZES = ("vocab_size", "max_tokens", "layers", "heads", "width", "unroll")
_PRESETS = {
    "paper": {"layers": 6, "heads": 6, "width": 192},
    "small": {"layers": 3, "heads": 4, "width": 96},
    "tiny": {"layers": 3, "heads": 4, "width": 64},
}
_INIT_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """Shapes and choices that are static under ``jit``.

    Attributes:
        vocab_size: ``v``.
        max_tokens: the longest input ``t``.
        layers: ``l``.
        heads: ``n``, a divisor of ``width``.
        width: ``d``.
        mlp_width: ``f``; None is ``4 d``.
        block: ``"paper"`` normalises the residual stream itself, ``"pre_ln"`` is GPT-2's block.
        positions: ``"sinusoidal"`` and ``"learned"`` are added to the embeddings, ``"rope"`` rotates queries and keys.
        unroll: layers per iteration of the scan; unrolling all of them is fastest on CPU, 1 compiles fastest.
        compute_dtype: what the factors of products with weights and of attention are rounded to, forward and backward.
            Their sums, and all that is computed else (norms, GELU, softmax, logits, gradients of parameters), are
            float32 whatever it is. ``"bfloat16"`` has no forward-mode derivatives.
        stored_dtype: what activations are rounded to between operations, and what is kept of them for the backward
            pass. Norms' statistics, GELU, softmax, sums, logits, parameters and their gradients are float32 whatever it
            is; ``"bfloat16"`` asks for products in bfloat16 too. It takes about half of the memory, and of the traffic.
        attention: ``"fused"`` is on a GPU cuDNN's kernel, which stores no scores and gives bfloat16, elsewhere the
            plain one (:mod:`jaxsafety.models.fused`); it asks for products in bfloat16, and for heads whose width is a
            multiple of 8, at most 128.

    Raises:
        ValueError: a size below 1, an unknown name, a width that the heads or positions cannot split, or activations
            in bfloat16, or fused attention, whose products are not.
    """

    vocab_size: int
    max_tokens: int
    layers: int = 3
    heads: int = 4
    width: int = 64
    mlp_width: int | None = None
    block: Block = "paper"
    positions: Positions = "sinusoidal"
    unroll: int = 6
    compute_dtype: ComputeDtype = "float32"
    stored_dtype: ComputeDtype = "float32"
    attention: Attention = "plain"

    def __post_init__(self) -> None:
        for name in _SIZES if self.mlp_width is None else (*_SIZES, "mlp_width"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: got {size!r}, expected an integer of at least 1")
        check_name("block", self.block, get_args(Block))
        check_name("positions", self.positions, get_args(Positions))
        check_name("compute_dtype", self.compute_dtype, get_args(ComputeDtype))
        check_name("stored_dtype", self.stored_dtype, get_args(ComputeDtype))
        check_name("attention", self.attention, get_args(Attention))
        if self.compute_dtype != "bfloat16":
            for name, value in (("stored_dtype", "bfloat16"), ("attention", "fused")):
                if getattr(self, name) == value:
                    raise ValueError(f"{name}: got {value!r}, expected compute_dtype 'bfloat16' as well")
        if self.width % self.heads:
            raise ValueError(f"heads: got {self.heads}, expected a divisor of width {self.width}")
        if self.attention == "fused" and (wide := self.width // self.heads) not in range(8, 129, 8):
            raise ValueError(f"attention: got 'fused' with heads of width {wide}, expected a multiple of 8 up to 128")
        if self.positions == "rope" and (self.width // self.heads) % 2:
            raise ValueError(f"width: got {self.width} for {self.heads} heads, expected an even head width for rope")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"width: got {self.width}, expected an even width for sinusoidal positions")


def preset(name: Preset, *, vocab_size: int, max_tokens: int, **overrides: Any) -> GPTConfig:
    """Returns a named size: paper (6 layers, 6 heads, width 192), small (3, 4, 96) or tiny (3, 4, 64).

    ``overrides`` are other fields of :class:`GPTConfig`; an unknown preset or field, or a bad value, is a ValueError.
    """
    check_name("preset", name, _PRESETS)
    for field in overrides:
        check_name("field of GPTConfig", field, [f.name for f in fields(GPTConfig)])
    return GPTConfig(**{"vocab_size": vocab_size, "max_tokens": max_tokens, **_PRESETS[name], **overrides})


def init(config: GPTConfig, *, key: Key) -> Params:
    """Returns fresh float32 parameters: matrices N(0, 0.02^2), biases 0, norms the identity.

    The two projections back into the residual stream are N(0, 0.02^2 / 2l), so its variance does not grow with depth.
    With v = 59 the paper preset has 2 689 920 numbers.

    Fidelity:
        The paper's initialisation. Its released block also declares a second LayerNorm (2 d parameters a layer) that
        the forward pass never reads; it is not carried.
    """
    depth, d, v = config.layers, config.width, config.vocab_size
    f = config.mlp_width or 4 * d
    keys = iter(jax.random.split(key, 9))
    zeros = partial(jnp.zeros, dtype=jnp.float32)

    def normal(*shape: int, std: float = _INIT_STD) -> Array:
        return std * jax.random.normal(next(keys), shape, jnp.float32)

    def norm(*shape: int) -> Params:
        return {"scale": jnp.ones(shape, jnp.float32), "bias": zeros(shape)}

    residual_std = _INIT_STD / (2 * depth) ** 0.5
    attn = {name: normal(depth, d, d) for name in "qkv"} | {"o": normal(depth, d, d, std=residual_std)}
    attn |= {f"{name}_bias": zeros((depth, d)) for name in "qkvo"}
    mlp = {"up": normal(depth, d, f), "down": normal(depth, f, d, std=residual_std)}
    mlp |= {"up_bias": zeros((depth, f)), "down_bias": zeros((depth, d))}
    blocks = {"norm_attn": norm(depth, d), "attn": attn, "mlp": mlp}
    if config.block == "pre_ln":
        blocks["norm_mlp"] = norm(depth, d)
    params = {"embed": normal(v, d), "blocks": blocks, "norm": norm(d), "unembed": normal(d, v)}
    if config.positions == "learned":
        params["positions"] = normal(config.max_tokens, d)
    return params


@cache
def model(config: GPTConfig) -> Model:
    """Returns the model that methods, attacks and analyses ask; it writes by running the whole sequence again."""
    run = partial(apply, config=config)
    decoder = windowed(run, max_tokens=config.max_tokens)
    return Model(embed=embed, apply=run, decoder=decoder, branches=partial(branches, config=config))


@checked
def apply(
    params: Params,
    inputs: Int[Array, "b t"] | Float[Array, "b t d"],
    *,
    config: GPTConfig,
    mask: Bool[Array, "b t"] | None = None,
    at: Int[Array, "b p"] | None = None,
    sites: tuple[str, ...] = (),
    layers: tuple[int, ...] | None = None,
    positions: Int[Array, "b q"] | None = None,
    edit: Hook | None = None,
) -> Output:
    """Returns next-token logits and the activations asked for; the arguments are those of :class:`Model`.

    There is no ``mask``: padding is attended to like any token, so it may only stand after the real ones. ``sites`` are
    among :data:`Site`. Site ``s`` of layer ``i`` is TransformerLens's ``blocks.{i}.{s}``; ``mlp.hook_in``, which it has
    no name for, is what the MLP's first matrix is multiplied with. In the paper's block that is ``hook_resid_mid``
    itself (an edit of ``mlp.hook_in`` leaves the skip branch alone), and ``hook_attn_out`` is added to the normalised
    stream, not to ``hook_resid_pre``. ``mlp.hook_pre`` and ``mlp.hook_post`` are ``f`` wide.

    Raises:
        Unsupported: a mask.
        ValueError: see :class:`Model`.

    Fidelity:
        With ``block="paper"`` and sinusoidal positions, the paper's released model without dropout (which it sets to
        0): ``u = LN(x); v = u + Attn(u); out = v + MLP(v)``. Both skip branches start from the *normalised* stream and
        the MLP input is not normalised.
    """
    if mask is not None:
        raise Unsupported("mask: a GPT attends to padding like any token, expected None and padding after the tokens")
    chosen = chosen_layers(layers, depth=config.layers, sites=sites, known=get_args(Site))
    check_inputs(params, inputs, max_tokens=config.max_tokens, mask=None, places={"at": at, "positions": positions})
    return _applied(params, inputs, at, positions, edit, config=config, sites=tuple(sites), layers=chosen)


@compiled("config", "sites", "layers")
def _applied(params, inputs, at, positions, edit, *, config, sites, layers):
    x = embedded(params, inputs)
    batch, tokens, width = x.shape
    x = (x + additive_positions(params, tokens, config=config)).reshape(batch * tokens, width)
    x = x.astype(config.stored_dtype)
    x, seen = _layers(
        x, params["blocks"], config=config, tokens=tokens, sites=sites, layers=layers, positions=positions, edit=edit
    )
    logits = unembedded(params, scored(x, tokens=tokens, at=at), config=config)
    return Output(logits.reshape(batch, -1, logits.shape[-1]), seen)


def _layers(x, blocks, *, config, tokens, sites, layers, positions, edit):
    attend = partial(_attend, config=config, tokens=tokens, rope=rope_table(tokens, config=config))
    places = None if edit is None else jnp.arange(tokens)[None]

    def layer(x, scanned, sites):
        weights, index = scanned
        own = of_layer(edit, layer=index, positions=places)
        x, seen = block(x, weights, config=config, attend=attend, edit=own)
        return x, {site: pick(seen[site], tokens=tokens, positions=positions) for site in sites}

    # Runs of consecutive layers that are all captured or all not, so that a scan never stacks what nobody reads.
    captured = []
    for wanted, run in itertools.groupby(range(config.layers), key=lambda index: index in layers):
        run = list(run)
        weights = jax.tree.map(itemgetter(slice(run[0], run[-1] + 1)), blocks)
        body = partial(layer, sites=sites if wanted else ())
        indices = None if edit is None else jnp.asarray(run)
        x, seen = jax.lax.scan(body, x, (weights, indices), unroll=min(config.unroll, len(run)))
        captured += [seen] if wanted else []
    return x, {site: jnp.concatenate([seen[site] for seen in captured]) for site in sites}


def _attend(q, k, v, *, config, tokens, rope):
    q, k = (heads(x, tokens, config=config, rope=rope) for x in (q, k))
    return attended(q, k, heads(v, tokens, config=config), config=config)
