"""The names of a Llama's tensors: our stacked paths beside Hugging Face's, a name for each layer, in one table.

Hugging Face stores matrices ``[out, in]``, we ``[in, out]``; embeddings are ``[v, d]`` on both sides.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jaxsafety.models.llama import LlamaConfig
from jaxsafety.tree import is_stacked

_LAYER = "model.layers.{layer}."
# Our path, their name, the axes of ours below any layer axis: one is a vector, two a transposed matrix.
_MATRICES = (
    ("attn/q", "self_attn.q_proj", ("d", "q")),
    ("attn/k", "self_attn.k_proj", ("d", "k")),
    ("attn/v", "self_attn.v_proj", ("d", "k")),
    ("attn/o", "self_attn.o_proj", ("q", "d")),
    ("mlp/gate", "mlp.gate_proj", ("d", "f")),
    ("mlp/up", "mlp.up_proj", ("d", "f")),
    ("mlp/down", "mlp.down_proj", ("f", "d")),
)
TABLE = {
    "embed": ("model.embed_tokens.weight", ("v", "d")),
    "blocks/norm_attn/scale": (f"{_LAYER}input_layernorm.weight", ("d",)),
    "blocks/norm_mlp/scale": (f"{_LAYER}post_attention_layernorm.weight", ("d",)),
    "blocks/norm_attn_out/scale": (f"{_LAYER}post_attention_layernorm.weight", ("d",)),
    "blocks/norm_mlp_out/scale": (f"{_LAYER}post_feedforward_layernorm.weight", ("d",)),
    "blocks/norm_q/scale": (f"{_LAYER}self_attn.q_norm.weight", ("norm_q",)),
    "blocks/norm_k/scale": (f"{_LAYER}self_attn.k_norm.weight", ("norm_k",)),
    **{f"blocks/{path}": (f"{_LAYER}{name}.weight", axes) for path, name, axes in _MATRICES},
    **{f"blocks/{path}_bias": (f"{_LAYER}{name}.bias", axes[1:]) for path, name, axes in _MATRICES},
    "norm/scale": ("model.norm.weight", ("d",)),
    "unembed": ("lm_head.weight", ("d", "v")),
}
# Where branches are normed on both sides, the norm behind attention has the name that the next one has elsewhere.
_BEFORE_MLP = f"{_LAYER}pre_feedforward_layernorm.weight"
# Matrices that some types' files hold one below the other.
_FUSED = dict.fromkeys(("blocks/attn/q", "blocks/attn/k", "blocks/attn/v"), f"{_LAYER}self_attn.qkv_proj.weight")
_FUSED |= dict.fromkeys(("blocks/mlp/gate", "blocks/mlp/up"), f"{_LAYER}mlp.gate_up_proj.weight")
FUSED = tuple(path.rpartition("/")[2] for path in _FUSED)
HEAD = TABLE["unembed"][0]
# Tables of angles that old versions of transformers stored; every version computes them anew.
BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Slot:
    """What Hugging Face's files hold for one layer of one of our leaves.

    ``layer`` is the index on the leading axis of our ``path``, None for a leaf without one; ``name`` and ``shape`` are
    theirs, ``[out, in]`` for matrices. Slots of one name follow one another, and so do their rows in one tensor.
    """

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]


def leaf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Returns the paths of a model's parameters and their stacked shapes."""
    sizes = {"v": config.vocab_size, "d": config.width, "f": config.mlp_width}
    sizes |= {"q": config.heads * config.head_width, "k": config.kv_heads * config.head_width} | config.norm_widths
    return {
        path: (config.layers,) * is_stacked(path) + tuple(sizes[axis] for axis in axes)
        for path, (_, axes) in TABLE.items()
        if _is_present(path, config)
    }


def slots(config: LlamaConfig, *, fused: bool = False) -> list[Slot]:
    """Returns every tensor of a model: leaves outside the layers first, then layer by layer.

    ``fused`` is whether queries, keys and values lie in one tensor, and gate and up in another.
    """
    shapes = leaf_shapes(config)
    order = [(path, None) for path in shapes if not is_stacked(path)]
    order += [(path, layer) for layer in range(config.layers) for path in shapes if is_stacked(path)]
    return [_slot(path, layer, shapes[path], _name(path, config, fused=fused)) for path, layer in order]


def shapes(slots: Iterable[Slot]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that slots lie in, by their names, in order."""
    found: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        above = found.get(slot.name, (0,))[0]
        found[slot.name] = (above + slot.shape[0], *slot.shape[1:])
    return found


def is_transposed(path: str) -> bool:
    """Whether a leaf's matrices are stored as their transposes."""
    return len(TABLE[path][1]) == 2 and path != "embed"


def _is_present(path: str, config: LlamaConfig) -> bool:
    if path == "unembed":
        return not config.tied
    if path.startswith("blocks/norm_"):
        return path.split("/")[1] in config.norm_widths
    if not path.endswith("_bias"):
        return True
    if "/mlp/" in path:
        return config.mlp_bias
    return config.out_bias if path.endswith("o_bias") else config.qkv_bias


def _name(path: str, config: LlamaConfig, *, fused: bool) -> str:
    if path == "blocks/norm_mlp/scale" and config.norms == "both":
        return _BEFORE_MLP
    return _FUSED[path] if fused and path in _FUSED else TABLE[path][0]


def _slot(path: str, layer: int | None, shape: tuple[int, ...], name: str) -> Slot:
    own = shape[1:] if is_stacked(path) else shape
    return Slot(path, layer, name.format(layer=layer), own[::-1] if is_transposed(path) else own)
