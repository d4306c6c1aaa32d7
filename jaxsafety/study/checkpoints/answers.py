"""What a model answers to the prompts: written greedily, kept as JSON, and judged by whether it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsafety import tree
from jaxsafety.engine import memory, programs
from jaxsafety.formats import hf
from jaxsafety.formats.hf_names import leaf_shapes
from jaxsafety.models import generation, llama
from jaxsafety.models.layers import ComputeDtype
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.rundir import atomic, progress, signals
from jaxsafety.study.checkpoints.batches import Batch
from jaxsafety.types import Params

Ids = list[list[int]]


def write(
    checkpoint: hf.Checkpoint,
    batches: Sequence[Batch],
    file: Path,
    *,
    max_new: int,
    stop: tuple[int, ...],
    compute_dtype: ComputeDtype,
    label: str,
) -> Ids:
    """Returns a model's greedy answers to prompts, and keeps those that it has in ``file``, batch by batch.

    The whole model is loaded, in the type that it computes in, if not all of the answers are there. Batches are padded
    right; an answer has at most ``max_new`` tokens and ends with the first of ``stop``. ``file`` is JSON; the answers
    there are not written again. ``label`` is for the progress.

    Raises:
        ValueError: the model does not fit into memory, is too short for prompt and answer, or ``file`` is damaged.
        OSError: a file cannot be read or written.
        Stopped: a signal has asked to stop; the batches before are kept.
    """
    count = sum(len(batch.rows) for batch in batches)
    answers = _read(file, count)
    todo = [batch for batch in batches if any(answers[row] is None for row in batch.rows)]
    if todo:
        check_window(checkpoint, batches, max_new=max_new)
        config = replace(checkpoint.config, compute_dtype=compute_dtype)
        todo = [_fitted(batch, config.max_tokens - max_new + 1) for batch in todo]
        shapes = dict.fromkeys(batch.tokens.shape for batch in todo)
        run = _writer(checkpoint, config, shapes, max_new=max_new, stop=stop)
        file.parent.mkdir(parents=True, exist_ok=True)
        with progress.track(len(batches), label=label, start=len(batches) - len(todo), unit="part") as update:
            for done, batch in enumerate(todo, start=len(batches) - len(todo) + 1):
                for row, ids in zip(batch.rows, run(batch), strict=True):
                    ids = ids.tolist()
                    end = next((place for place, number in enumerate(ids, 1) if number in stop), len(ids))
                    answers[row] = ids[:end]
                atomic.atomic_write(file, json.dumps(answers) + "\n")
                update(done, {})
                signals.check(f"after {done} of {len(batches)} batches of answers")
    return [answer or [] for answer in answers]


def _fitted(batch: Batch, most: int) -> Batch:
    """A batch of at most ``most`` places, of which those cut off are padding."""
    return replace(batch, tokens=batch.tokens[:, :most], mask=batch.mask[:, :most])


def _writer(
    checkpoint: hf.Checkpoint, config: LlamaConfig, shapes: Iterable[tuple[int, int]], *, max_new: int,
    stop: tuple[int, ...],
) -> Callable[[Batch], np.ndarray]:  # fmt: skip
    check_room(checkpoint, config.compute_dtype)
    # Before the model is loaded: what each needs includes its place.
    programs_ = {shape: _program(config, shape, max_new, stop) for shape in shapes}
    _, params = hf.load(checkpoint.directory, dtype=config.compute_dtype, ignored=checkpoint.ignored)
    return lambda batch: np.asarray(programs_[batch.tokens.shape](params, batch.tokens, batch.mask))


@cache
def _program(
    config: LlamaConfig, shape: tuple[int, int], max_new: int, stop: tuple[int, ...]
) -> Callable[[Params, np.ndarray, np.ndarray], Any]:
    """What answers prompts of a shape, compiled once for all models of a configuration."""
    model = llama.model(config)
    flat = {path: jax.ShapeDtypeStruct(own, config.compute_dtype) for path, own in leaf_shapes(config).items()}
    tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))

    def answer(params: Params, tokens: Array, mask: Array) -> Array:
        return generation.generate((params, model), tokens, mask=mask, count=max_new, stop=stop)

    what = f"writing {max_new} tokens after {shape[0]} prompts of {shape[1]}"
    with jax.default_matmul_precision("highest"):
        return programs.fitted(answer, tree.unflatten(flat), tokens, mask, what=what)


def check_window(checkpoint: hf.Checkpoint, batches: Iterable[Batch], *, max_new: int) -> None:
    """Refuses, in a ValueError, answers that have no place in a model's window behind the longest prompt."""
    longest = max(int(batch.prompt_lengths.max()) for batch in batches) + max_new - 1
    if longest > checkpoint.config.max_tokens:
        raise ValueError(
            f"prompts and answers have up to {longest} tokens, and {checkpoint.directory} takes "
            f"{checkpoint.config.max_tokens}: expected fewer new tokens or shorter prompts"
        )


def check_room(checkpoint: hf.Checkpoint, dtype: hf.ParamsDtype) -> None:
    """Refuses, in a ValueError and before it is loaded, a model that does not fit into memory."""
    paths = {path for path, _ in checkpoint.tensors}
    need = sum(int(np.prod(checkpoint.shape(path))) for path in paths) * jnp.dtype(dtype).itemsize
    if need > (room := memory.available()):
        raise ValueError(
            f"{checkpoint.directory} needs {need / 2**30:.3g} GiB in {dtype}, and the device has {room / 2**30:.3g} "
            "GiB free: expected a smaller model or type, or no answers, for which layers do one at a time"
        )


def _read(file: Path, count: int) -> list[list[int] | None]:
    if not file.exists():
        return [None] * count
    try:
        found = json.loads(file.read_bytes())
        if len(found) == count:
            return found
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{file} does not hold the answers to these {count} prompts: remove it and start again")
