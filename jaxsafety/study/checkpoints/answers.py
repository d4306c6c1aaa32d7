"""What a model answers to the prompts: written greedily, kept as JSON, and judged by whether it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
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
from jaxsafety.study.checkpoints.batches import Batch, Shape
from jaxsafety.types import Params

Ids = list[list[int]]
Run = Callable[[Batch], np.ndarray]


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

    def ready(todo: Sequence[Batch]) -> Run:
        check_window(checkpoint, batches, max_new=max_new)
        config = replace(checkpoint.config, compute_dtype=compute_dtype)
        return _writer(checkpoint, config, todo, max_new=max_new, stop=stop)

    return kept(batches, file, ready, stop=stop, label=label)


def kept(
    batches: Sequence[Batch], file: Path, ready: Callable[[Sequence[Batch]], Run], *, stop: tuple[int, ...], label: str
) -> Ids:
    """Returns the answers to batches, written batch by batch where ``file`` has none; see :func:`write`.

    ``ready`` is told the batches that are left, if there are some, and returns what answers one.

    Raises:
        ValueError: ``file`` is damaged.
        Stopped: a signal has asked to stop; the batches before are kept.
    """
    answers = _read(file, sum(len(batch.rows) for batch in batches))
    todo = [batch for batch in batches if any(answers[row] is None for row in batch.rows)]
    if todo:
        run = ready(todo)
        file.parent.mkdir(parents=True, exist_ok=True)
        with progress.track(len(batches), label=label, start=len(batches) - len(todo), unit="part") as update:
            for done, batch in enumerate(todo, start=len(batches) - len(todo) + 1):
                for row, ids in zip(batch.rows, run(batch), strict=True):
                    ids = ids.tolist()
                    end = next((place for place, number in enumerate(ids, 1) if number in stop), len(ids))
                    answers[row] = ids[:end]
                atomic.atomic_write(file, json.dumps(answers) + "\n")
                update(done, {})
                signals.check(f"after {done} of {len(batches)} batches of {label}")
    return [answer or [] for answer in answers]


def fitted(batch: Batch, config: LlamaConfig, *, max_new: int) -> Batch:
    """Returns a batch whose padding leaves room in a model's window for ``max_new`` tokens, of which one isn't read."""
    most = config.max_tokens - max_new + 1
    return replace(batch, tokens=batch.tokens[:, :most], mask=batch.mask[:, :most])


def _writer(
    checkpoint: hf.Checkpoint, config: LlamaConfig, todo: Iterable[Batch], *, max_new: int, stop: tuple[int, ...]
) -> Run:
    check_room(checkpoint, config.compute_dtype)
    fit = partial(fitted, config=config, max_new=max_new)
    # Before the model is loaded: what each needs includes its place.
    programs_ = {
        shape: program(config, shape, max_new, stop) for shape in dict.fromkeys(fit(one).tokens.shape for one in todo)
    }
    _, params = hf.load(checkpoint.directory, dtype=config.compute_dtype, ignored=checkpoint.ignored)

    def run(batch: Batch) -> np.ndarray:
        batch = fit(batch)
        return np.asarray(programs_[batch.tokens.shape](params, batch.tokens, batch.mask))

    return run


@cache
def program(
    config: LlamaConfig, shape: Shape, max_new: int, stop: tuple[int, ...]
) -> Callable[[Params, np.ndarray, np.ndarray], Any]:
    """Returns what answers prompts of a shape, compiled once for all models of a configuration."""
    run, given = written(config, shape, max_new, stop)
    what = f"writing {max_new} tokens after {shape[0]} prompts of {shape[1]}"
    with jax.default_matmul_precision("highest"):
        return programs.fitted(run, *given, what=what)


def written(
    config: LlamaConfig, shape: Shape, max_new: int, stop: tuple[int, ...]
) -> tuple[Callable[[Params, Array, Array], Array], tuple[Any, ...]]:
    """Returns the function of :func:`program`, and the shapes of what it takes."""
    model = llama.model(config)
    tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))

    def answer(params: Params, tokens: Array, mask: Array) -> Array:
        return generation.generate((params, model), tokens, mask=mask, count=max_new, stop=stop)

    return answer, (shapes(config), tokens, mask)


def shapes(config: LlamaConfig) -> Params:
    """Returns the shapes of a model's parameters in the type that it computes in."""
    flat = leaf_shapes(config)
    return tree.unflatten({path: jax.ShapeDtypeStruct(own, config.compute_dtype) for path, own in flat.items()})


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
