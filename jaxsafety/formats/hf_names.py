"""The names of a Llama's tensors: our stacked paths beside Hugging Face's, a name for each layer, in one table.

Hugging Face stores matrices ``[out, in]``, we ``[in, out]``; embeddings are ``[v, d]`` on both sides.
"""

import re
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
    **{f"blocks/{path}": (f"{_LAYER}{name}.weight", axes) for path, name, axes in _MATRICES},
    **{f"blocks/{path}_bias": (f"{_LAYER}{name}.bias", axes[1:]) for path, name, axes in _MATRICES},
    "norm/scale": ("model.norm.weight", ("d",)),
    "unembed": ("lm_head.weight", ("d", "v")),
}
HEAD = TABLE["unembed"][0]
# Tables of angles that old versions of transformers stored; every version computes them anew.
BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Slot:
    """What Hugging Face's files hold for one layer of one of our leaves.

    ``layer`` is the index on the leading axis of our ``path``, None for a leaf without one; ``name`` and ``shape`` are
    theirs, ``[out, in]`` for matrices.
    """

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]


def leaf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Returns the paths of a model's parameters and their stacked shapes."""
    sizes = {"v": config.vocab_size, "d": config.width, "f": config.mlp_width}
    sizes |= {"q": config.heads * config.head_width, "k": config.kv_heads * config.head_width}
    return {
        path: (config.layers,) * is_stacked(path) + tuple(sizes[axis] for axis in axes)
        for path, (_, axes) in TABLE.items()
        if _is_present(path, config)
    }


def slots(config: LlamaConfig) -> list[Slot]:
    """Returns every tensor of a model: leaves outside the layers first, then layer by layer."""
    shapes = leaf_shapes(config)
    order = [(path, None) for path in shapes if not is_stacked(path)]
    order += [(path, layer) for layer in range(config.layers) for path in shapes if is_stacked(path)]
    return [_slot(path, layer, shapes[path]) for path, layer in order]


def is_transposed(path: str) -> bool:
    """Whether a leaf's matrices are stored as their transposes."""
    return len(TABLE[path][1]) == 2 and path != "embed"


def _is_present(path: str, config: LlamaConfig) -> bool:
    if path == "unembed":
        return not config.tied
    if not path.endswith("_bias"):
        return True
    if "/mlp/" in path:
        return config.mlp_bias
    return config.out_bias if path.endswith("o_bias") else config.qkv_bias


def _slot(path: str, layer: int | None, shape: tuple[int, ...]) -> Slot:
    own = shape[1:] if is_stacked(path) else shape
    return Slot(path, layer, TABLE[path][0].format(layer=layer), own[::-1] if is_transposed(path) else own)
