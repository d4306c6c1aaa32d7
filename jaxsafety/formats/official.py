"""The checkpoints that the paper's authors release: PyTorch state dicts of their GPT, as parameters of ours.

One table has their names beside our paths. They store matrices ``[out, in]``, we ``[in, out]``; their queries, keys
and values are one matrix, in that order; embeddings are ``[v, d]`` on both sides and tied to nothing.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxsafety.config.names import check_all
from jaxsafety.formats import official_file
from jaxsafety.models.gpt import GPTConfig
from jaxsafety.models.layers import sinusoidal_table
from jaxsafety.tree import flatten, is_stacked, unflatten
from jaxsafety.types import Params

# The width of their models to the number of heads, which no file holds.
HEADS = {48: 3, 128: 4, 192: 6, 400: 8, 512: 16, 768: 12}

_LAYER = "transformer.h.{layer}."
_MASK, _POSITIONS = f"{_LAYER}attn.bias", "transformer.wpe.pe"
# Their name: our paths, which share its first axis; its axes. No paths: what the forward pass computes or never reads.
TABLE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "transformer.wte.weight": (("embed",), ("v", "d")),
    _POSITIONS: ((), ("1", "t", "d")),
    f"{_LAYER}ln_1.weight": (("blocks/norm_attn/scale",), ("d",)),
    f"{_LAYER}ln_1.bias": (("blocks/norm_attn/bias",), ("d",)),
    _MASK: ((), ("1", "1", "t", "t")),
    f"{_LAYER}attn.c_attn.weight": (tuple(f"blocks/attn/{name}" for name in "qkv"), ("3d", "d")),
    f"{_LAYER}attn.c_attn.bias": (tuple(f"blocks/attn/{name}_bias" for name in "qkv"), ("3d",)),
    f"{_LAYER}attn.c_proj.weight": (("blocks/attn/o",), ("d", "d")),
    f"{_LAYER}attn.c_proj.bias": (("blocks/attn/o_bias",), ("d",)),
    f"{_LAYER}ln_2.weight": ((), ("d",)),
    f"{_LAYER}ln_2.bias": ((), ("d",)),
    f"{_LAYER}c_fc.weight": (("blocks/mlp/up",), ("f", "d")),
    f"{_LAYER}c_fc.bias": (("blocks/mlp/up_bias",), ("f",)),
    f"{_LAYER}c_proj.weight": (("blocks/mlp/down",), ("d", "f")),
    f"{_LAYER}c_proj.bias": (("blocks/mlp/down_bias",), ("d",)),
    "transformer.ln_f.weight": (("norm/scale",), ("d",)),
    "transformer.ln_f.bias": (("norm/bias",), ("d",)),
    "lm_head.weight": (("unembed",), ("v", "d")),
}
# Where the sizes are read: an axis of a tensor that every file has.
_SIZES = {
    "v": ("transformer.wte.weight", 0),
    "d": ("transformer.wte.weight", 1),
    "t": (_POSITIONS, 1),
    "f": (_LAYER.format(layer=0) + "c_fc.weight", 0),
}
_PREFIX = "module."  # of PyTorch's DataParallel
# Angles of up to a few hundred radians, taken in float32 in another order.
_SAME_POSITIONS = 1e-3


def load(file: Path, *, heads: int | None = None) -> tuple[Params, GPTConfig]:
    """Loads what ``torch.save`` wrote of one of the authors' models, after checking that it is their model exactly.

    ``heads`` and what is returned are those of :func:`convert`.

    Raises:
        ImportError: torch is not installed (extra ``official``).
        FileNotFoundError: there is no such file.
        ValueError: it is not a PyTorch file of tensors alone, or not their model.
    """
    return convert(official_file.read(file), heads=heads, where=str(file))


def convert(
    tensors: Mapping[str, np.ndarray], *, heads: int | None = None, where: str = "the state dict"
) -> tuple[Params, GPTConfig]:
    """Returns the authors' tensors as float32 parameters of our GPT, with its configuration.

    Args:
        tensors: name to array, with or without the prefix ``module.``.
        heads: their number, which is in no file; None is that of the authors' models of this width.
        where: what messages call the tensors.

    Raises:
        ValueError: a tensor that is missing, extra, there twice, misshapen or not finite; a mask that is not causal,
            positions that are not sinusoidal; or no known number of heads. Both sides are named.

    Fidelity:
        Faithful: with the released settings (no dropout) the logits are those of the authors' model, whose block, tanh
        GELU, layer-norm epsilon and unmasked pads ours has. What it stores beside its weights is checked and left out:
        the causal mask, the table of positions, and a second layer norm in each block that its forward pass never
        reads. Token ids are those of the world ``paper``.
    """
    tensors = _unprefixed(tensors, where)
    layers = len({found[1] for name in tensors if (found := re.match(r"transformer\.h\.(\d+)\.", name))})
    expected = {name.format(layer=i): name for name in TABLE for i in range(max(layers, 1) if "{" in name else 1)}
    check_all(where, tensors, expected, lacks=f"lacks {{}}, which the authors' GPT of {layers} layers has",
              holds="holds {}, which it does not have")  # fmt: skip
    sizes = _sizes(tensors, where)
    _check_values(tensors, expected, sizes, where)
    config = GPTConfig(
        vocab_size=sizes["v"],
        max_tokens=sizes["t"],
        layers=layers,
        heads=_heads(heads, sizes["d"], where),
        width=sizes["d"],
        mlp_width=sizes["f"],
    )
    return _params(tensors, expected), config


def _params(tensors: Mapping[str, np.ndarray], expected: Mapping[str, str]) -> Params:
    flat: dict[str, list[np.ndarray]] = {}
    for name, row in expected.items():
        paths = TABLE[row][0]
        for path, part in zip(paths, np.split(tensors[name], max(len(paths), 1)), strict=False):
            flat.setdefault(path, []).append(part if path == "embed" else part.T)
    stacked = {path: np.stack(parts) if is_stacked(path) else parts[0] for path, parts in flat.items()}
    return unflatten({path: jnp.asarray(leaf, jnp.float32) for path, leaf in stacked.items()})


def fill_vocabulary(params: Params, *, known: int, size: int, like: int) -> Params:
    """Returns the parameters with the tokens from ``known`` on, up to ``size``, made anew: for a model without them.

    The authors' pretrained model has 54 tokens and its tuned ones 59. No prompt or answer holds the last five. Where
    models are compared, all are to know the same ones, or what the five rows happen to hold would count as an update.
    The new ones get the output weights of the token ``like``; their embeddings are zeros, which nothing reads.

    Fidelity:
        The greedy answer is that of the model with ``known`` tokens, exactly: a new token's logit equals that of
        ``like``, which comes first. Probabilities differ by ``size - known`` times that of ``like``: next to nothing
        for the token that begins a sequence, which is never a target.
    """
    flat, new = flatten(params), size - known
    flat["embed"] = jnp.pad(flat["embed"][:known], ((0, new), (0, 0)))
    copies = jnp.repeat(flat["unembed"][:, like : like + 1], new, axis=1)
    flat["unembed"] = jnp.concatenate([flat["unembed"][:, :known], copies], axis=1)
    return unflatten(flat)


def _unprefixed(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    plain = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    if len(plain) < len(tensors):
        twice = next(name for name in tensors if _PREFIX + name in tensors)
        raise ValueError(f"{where} holds both {twice} and {_PREFIX}{twice}: expected one of them")
    return plain


def _sizes(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, int]:
    sizes = {"1": 1}
    for axis, (name, place) in _SIZES.items():
        rank = len(TABLE[name.replace(".0.", ".{layer}.")][1])
        if tensors[name].ndim != rank or 0 in tensors[name].shape:
            raise ValueError(
                f"{name} is {list(tensors[name].shape)} in {where}, expected {rank} axes, none of them empty"
            )
        sizes[axis] = tensors[name].shape[place]
    return sizes | {"3d": 3 * sizes["d"]}


def _check_values(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, str], sizes: Mapping[str, int], where: str
) -> None:
    read = ", ".join(f"{axis} {sizes[axis]} of {name}" for axis, (name, _) in _SIZES.items())
    for name, row in expected.items():
        shape = tuple(sizes[axis] for axis in TABLE[row][1])
        if tensors[name].shape != shape:
            raise ValueError(f"{name} is {list(tensors[name].shape)} in {where}, expected {list(shape)} by {read}")
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{name} holds values that are not finite in {where}: expected numbers only")
        if row == _MASK and not np.array_equal(tensors[name][0, 0], np.tri(sizes["t"])):
            raise ValueError(f"{name} in {where} is another mask than the causal one, ones at and below the diagonal")
    if sizes["d"] % 2:
        raise ValueError(f"transformer.wte.weight is {sizes['d']} wide in {where}, expected an even width")
    table = np.asarray(sinusoidal_table(sizes["t"], sizes["d"]))
    if not np.allclose(tensors[_POSITIONS][0], table, rtol=0, atol=_SAME_POSITIONS):
        raise ValueError(f"{_POSITIONS} in {where} holds other positions than the sinusoidal ones")


def _heads(heads: int | None, width: int, where: str) -> int:
    if heads is None and width not in HEADS:
        known = ", ".join(map(str, HEADS))
        raise ValueError(f"heads: {where} does not hold their number, and it is known for widths {known}, not {width}")
    return HEADS[width] if heads is None else heads
