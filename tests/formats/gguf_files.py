"""Small GGUF files, written by the ``gguf`` package from our parameters as llama.cpp's converter lays them out."""

import json

import numpy as np

from jaxsafety.formats import hf_names
from jaxsafety.tree import flatten

NAMES = {
    "embed": "token_embd",
    "norm/scale": "output_norm",
    "unembed": "output",
    "norm_attn/scale": "attn_norm",
    "norm_mlp/scale": "ffn_norm",
    "norm_q/scale": "attn_q_norm",
    "norm_k/scale": "attn_k_norm",
    "attn/q": "attn_q",
    "attn/k": "attn_k",
    "attn/v": "attn_v",
    "attn/o": "attn_output",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
}


def name_of(slot):
    """The name of a tensor, such as ``blk.0.attn_q.weight``."""
    path = slot.path.removeprefix("blocks/")
    kind = "bias" if path.endswith("_bias") else "weight"
    return ("" if slot.layer is None else f"blk.{slot.layer}.") + f"{NAMES[path.removesuffix('_bias')]}.{kind}"


def interleaved(rows, heads):
    """Rows as llama.cpp rotates them: channel i of the first half of a head, then that of the second."""
    width, found = len(rows) // heads, np.empty_like(rows)
    for head in range(heads):
        for pair in range(width // 2):
            for half in range(2):
                found[head * width + 2 * pair + half] = rows[head * width + half * (width // 2) + pair]
    return found


def metadata(config, arch="llama"):
    """What a converter says of a model, without the architecture in front of names."""
    return {
        "block_count": config.layers,
        "context_length": config.max_tokens,
        "embedding_length": config.width,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope.base,
        "rope.dimension_count": config.head_width,
    }


def tensors(config, params, arch="llama"):
    """The tensors of a model by name, ``[out, in]``."""
    flat, found = flatten(params), {}
    for slot in hf_names.slots(config):
        own = np.asarray(flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer], np.float32)
        own = own.T if hf_names.is_transposed(slot.path) else own
        for part, heads in (("attn/q", config.heads), ("attn/k", config.kv_heads)):
            if arch == "llama" and slot.path.removesuffix("_bias").endswith(part):
                own = interleaved(own, heads)
        found[name_of(slot)] = np.ascontiguousarray(own)
    return found


def byte_level(encoder, pre="gpt-2"):
    """The metadata of a ``tokenizers.Tokenizer`` of byte pairs; its added tokens are control tokens."""
    told = json.loads(encoder.to_str())
    vocabulary = told["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    control = {one["content"] for one in told["added_tokens"]}
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in control else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in told["model"]["merges"]],
    }


def write(file, values, tensors, *, arch="llama", tokenizer=None, template=None, kind=None, **more):
    """Writes a file; ``values`` are of the architecture, ``kind`` the quantisation of matrices whose rows allow it."""
    import gguf

    writer = gguf.GGUFWriter(file, arch)
    named = {f"{arch}.{name}": value for name, value in values.items()}
    named |= {f"tokenizer.ggml.{name}": value for name, value in (tokenizer or {}).items()} | more
    named |= {} if template is None else {"tokenizer.chat_template": template}
    for name, value in named.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        (writer.add_array if isinstance(value, list) else add[type(value)])(name, value)
    for name, own in tensors.items():
        if kind is not None and own.ndim == 2 and own.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(own, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
