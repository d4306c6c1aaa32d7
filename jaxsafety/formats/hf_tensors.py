"""A checkpoint by the names and shapes of its tensors alone, for models whose forward pass nobody here knows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsafety.formats import hf_attributes as attributes
from jaxsafety.formats.hf_checkpoint import read_tensor
from jaxsafety.formats.hf_config import CONFIG_FILE
from jaxsafety.formats.hf_families import CLASSES
from jaxsafety.formats.hf_index import find_tensors
from jaxsafety.formats.safetensors_file import Tensor

# Tables that are looked up and not multiplied with, [tokens, outputs]; any other matrix is [outputs, inputs], as torch
# stores a linear map, but for those of the types whose maps are GPT-2's.
_TABLE = re.compile(r"(^|\.)(shared|wte|wpe|embed_in|(\w+_)?embed_tokens|(\w+_)?embeddings?(\.\w+)*)\.weight$")
_GPT2 = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_GPT2_MAP = re.compile(r"\.(c_attn|q_attn|c_fc|c_proj)\.weight$")


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a checkpoint by their own names.

    ``kind`` is the model type and ``vocab_size`` the number of tokens that its ``config.json`` names, None without one.
    """

    directory: Path
    tensors: Mapping[str, Tensor]
    kind: str | None
    vocab_size: int | None

    def matrix(self, name: str, *, rows: int) -> Float[np.ndarray, "m n"]:
        """Returns a matrix as ``[in, out]`` in float32, of which the first ``rows`` are read as it is stored.

        Raises:
            ValueError: it is not finite.
            OSError: it cannot be read.
        """
        lying = self.kind in _GPT2 and _GPT2_MAP.search(name)
        transposed = not (lying or _TABLE.search(name))
        return read_tensor(self.tensors[name], rows=rows, transposed=transposed)


def open_tensors(directory: Path) -> TensorFiles:
    """Opens the safetensors files of a checkpoint of any kind; of a ``config.json`` nothing is checked.

    Raises:
        FileNotFoundError: the directory, its weights or a file that its index names is missing.
        ValueError: weights in another format, a damaged file, or a ``config.json`` that is not JSON.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory: expected a Hugging Face checkpoint")
    raw = _configuration(directory)
    nested = raw.get("text_config")
    size = (nested if isinstance(nested, dict) else {}).get("vocab_size", raw.get("vocab_size"))
    kind = raw.get("model_type")
    return TensorFiles(
        directory, find_tensors(directory), kind if isinstance(kind, str) else None, size if type(size) is int else None
    )


def is_unknown(directory: Path) -> bool:
    """Whether a checkpoint is of a model type that nobody here knows, or of one that it does not name."""
    return (directory / CONFIG_FILE).is_file() and _configuration(directory).get("model_type") not in list(CLASSES)


def _configuration(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    return attributes.read_object(file, what="a configuration") if file.is_file() else {}
