"""What was tuned as a Hugging Face checkpoint, its adapter merged tensor by tensor, or as an adapter of PEFT's."""

from pathlib import Path

import jax
import numpy as np

from jaxsafety import tree
from jaxsafety.formats import hf, peft_write
from jaxsafety.formats.peft_config import ADAPTER_FILE
from jaxsafety.models import lora
from jaxsafety.study.checkpoints.job import Job
from jaxsafety.types import Params


def write(checkpoint: hf.Checkpoint, trained: Params, directory: Path, job: Job, *, dtype: hf.ParamsDtype) -> None:
    """Writes the tuned model beside the tokenizer that it learned with; nothing is there until all of it is.

    ``trained`` is the adapter, or all parameters; ``directory`` must not exist or be empty.

    Raises:
        ValueError: a value is not finite.
        OSError: a file cannot be read or written.
    """
    full = job.is_full
    stacked = tree.flatten(trained) if full else {}
    adapter = {} if full else jax.device_get(trained)

    def read(path: str, layer: int | None) -> np.ndarray:
        if full:
            return np.asarray(stacked[path] if layer is None else stacked[path][layer])
        lead = () if layer is None else (slice(layer, layer + 1),)
        weights = checkpoint.leaf(path, index=lead, dtype="float32")
        return lora.merged(weights if layer is None else weights[0], path, layer, adapter, scale=job.scale)

    hf.write_checkpoint(
        directory, read, config=checkpoint.config, dtype=dtype, source=checkpoint.directory,
        tokenizer=job.about.tokenizer, ignored=checkpoint.ignored,
    )  # fmt: skip


def write_adapter(
    checkpoint: hf.Checkpoint, trained: Params, job: Job, *, directory: Path, base: str, revision: str | None
) -> None:
    """Writes the adapter as PEFT reads it, beside the tokenizer that it learned with, unless it is there.

    ``base`` and ``revision`` are what names ``checkpoint``.

    Raises:
        ValueError: a value is not finite, or a matrix has no adapter of PEFT's.
        OSError: it cannot be written.
    """
    if (directory / ADAPTER_FILE).is_file():
        return
    peft_write.write(
        directory, jax.device_get(trained), config=checkpoint.config, alpha=job.adapter.alpha, base=base,
        revision=revision, tokenizer=job.about.tokenizer or checkpoint.directory,
    )  # fmt: skip
