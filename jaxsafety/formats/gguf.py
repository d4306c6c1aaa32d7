"""A GGUF file to a Hugging Face checkpoint directory, one tensor at a time: weights, tokenizer, chat template.

llama.cpp rotates neighbouring channels of architecture llama and has its queries' and keys' rows in that order; here
and in transformers halves of a head are rotated, so the order is undone.
"""

import json
import re
import tempfile
from pathlib import Path

import numpy as np

from jaxsafety.config.names import check_all
from jaxsafety.formats import gguf_config, gguf_tokenizer, hf_names, hf_write
from jaxsafety.formats.gguf_file import GGUF, open_gguf
from jaxsafety.formats.hf_config import CONFIG_FILE, ParamsDtype, config_text
from jaxsafety.formats.hf_generation import GENERATION_FILE
from jaxsafety.models.llama import LlamaConfig

_BLOCK = "blk.{layer}."
_MATRICES = {
    "attn/q": "attn_q",
    "attn/k": "attn_k",
    "attn/v": "attn_v",
    "attn/o": "attn_output",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
}
_NAMES = {
    "embed": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "unembed": "output.weight",
    "blocks/norm_attn/scale": f"{_BLOCK}attn_norm.weight",
    "blocks/norm_mlp/scale": f"{_BLOCK}ffn_norm.weight",
    "blocks/norm_q/scale": f"{_BLOCK}attn_q_norm.weight",
    "blocks/norm_k/scale": f"{_BLOCK}attn_k_norm.weight",
    **{f"blocks/{path}": f"{_BLOCK}{name}.weight" for path, name in _MATRICES.items()},
    **{f"blocks/{path}_bias": f"{_BLOCK}{name}.bias" for path, name in _MATRICES.items()},
}
# What is rotated, and the number of its heads.
_HEADS = {"blocks/attn/q": "heads", "blocks/attn/k": "kv_heads"}
# Angles, which the configuration tells.
_BUFFERS = re.compile(rf"{re.escape(gguf_config.FACTORS)}|blk\.\d+\.attn_rot_embd(\.weight)?")


def write(file: Path, directory: Path, *, dtype: ParamsDtype = "float32") -> None:
    """Writes the model in a GGUF file, of an architecture of ``gguf_config``, as a checkpoint that transformers loads.

    Memory is that of its largest tensor. ``directory`` must not exist or be empty; ``dtype`` is what weights are stored
    in, of which float32 alone holds all that a file of any quantisation says.

    Raises:
        ImportError: the extra ``gguf`` is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, or damaged; a model, tokenizer or quantisation that is not known here; a tensor
            that is missing, extra, misshapen or not finite.
        OSError: the directory cannot be written; nothing is left there.
    """
    own = open_gguf(file)
    config = gguf_config.read_config(own)
    _check_tensors(own, config)
    ids = gguf_tokenizer.token_ids(own)
    described = json.loads(config_text(config, dtype=dtype)) | ids
    texts = {CONFIG_FILE: json.dumps(described), GENERATION_FILE: json.dumps(ids, indent=2) + "\n"}
    texts |= gguf_tokenizer.files(own, max_tokens=config.max_tokens)

    def read(path: str, layer: int | None) -> np.ndarray:
        values = own.tensor(_NAMES[path].format(layer=layer))
        heads = _HEADS.get(path.removesuffix("_bias"))
        if heads is not None and own.values["general.architecture"] == "llama":
            values = _halves(values, heads=getattr(config, heads))
        return values.T if hf_names.is_transposed(path) else values

    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        hf_write.write_checkpoint(directory, read, config=config, dtype=dtype, source=Path(folder))


def _halves(rows: np.ndarray, *, heads: int) -> np.ndarray:
    """The rows of every head with the even ones first, as their channels are paired with the odd ones."""
    paired = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _check_tensors(own: GGUF, config: LlamaConfig) -> None:
    expected = {_NAMES[slot.path].format(layer=slot.layer): slot.shape for slot in hf_names.slots(config)}
    found = [name for name in own.tensors if not _BUFFERS.fullmatch(name)]
    check_all(f"the tensors of {own.file}", found, expected, lacks="lack {}, which its metadata ask for",
              holds="hold {}, which they do not ask for")  # fmt: skip
    for name, shape in expected.items():
        if own.shape(name) != shape:
            raise ValueError(f"{own.file}: {name} is {list(own.shape(name))}, expected {list(shape)} by its metadata")
    tokens = len(own.values.get("tokenizer.ggml.tokens", []))
    if tokens > config.vocab_size:
        raise ValueError(f"{own.file} has {tokens} tokens and embeddings of {config.vocab_size}: expected as many")
