"""The programs of attacks on answers: what is found out about a model, and what then writes an answer of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsafety.engine import programs
from jaxsafety.formats.hf_tokenizer import Tokenizer
from jaxsafety.formats.rule_judge import OPENINGS
from jaxsafety.models import generation, llama
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.study.checkpoints.answers import shapes
from jaxsafety.study.checkpoints.batches import Encoded, Shape, padded_length
from jaxsafety.types import Asked, Decode, Key, Params, Point, Target, Written

# Name, shape and type of every array that was found.
Arrays = tuple[tuple[str, tuple[int, ...], str], ...]


class Writes(NamedTuple):
    """What a program of answers goes by: attacks, models and seeds that agree in it share one.

    Attributes:
        how: how the attack is made.
        options: its fields.
        config: of the model.
        max_new: the most tokens of an answer.
        stop: what ends one.
        based: whether the base is another model.
        point: name and type of every swept field.
        found: of what :func:`finder` returns.
    """

    how: Written
    options: Any
    config: LlamaConfig
    max_new: int
    stop: tuple[int, ...]
    based: bool
    point: tuple[tuple[str, str], ...]
    found: Arrays


def scalars(point: Point) -> dict[str, np.number]:
    """Returns a point's values as they are traced."""
    return {name: np.int32(one) if isinstance(one, int) else np.float32(one) for name, one in point.items()}


def told(arrays: Mapping[str, Any]) -> Arrays:
    """Returns the shapes and types of arrays by name."""
    return tuple((name, tuple(leaf.shape), str(leaf.dtype)) for name, leaf in sorted(arrays.items()))


@cache
def writer(of: Writes, shape: Shape) -> Callable[..., Any]:
    """Returns what answers prompts of a shape under an attack, compiled: ``(params, base, found, tokens, mask, point,
    rows, key) -> ids [b, max_new]``.

    ``base`` is None where it is the model itself, and ``rows`` are ``[b, 2]`` the place and the draw of each.

    Raises:
        ValueError: it does not fit into memory.
    """
    run, given = written(of, shape)
    what = f"writing {of.max_new} tokens under an attack after {shape[0]} prompts of {shape[1]}"
    with jax.default_matmul_precision("highest"):
        return programs.fitted(run, *given, what=what)


def written(of: Writes, shape: Shape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the function of :func:`writer`, and the shapes of what it takes."""
    model = llama.model(of.config)

    def answer(
        params: Params, base: Params | None, found: dict[str, Array], tokens: Array, mask: Array,
        point: dict[str, Array], rows: Int[Array, "b 2"], key: Key,
    ) -> Array:  # fmt: skip
        ends = of.stop[0] if of.stop else -1
        target = Target(model, params, params if base is None else base, None, ends, found=found)
        done = of.how.attack(target, of.options, point=point, key=key)
        if done.trial is not None:
            raise ValueError("an attack on written answers gives other prompts: expected `given` of its Written for it")
        decode = done.decode or Decode((), lambda logits: logits[0])
        own = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row[0]), row[1]))(rows)
        drawn = {"key": own, "temperature": decode.temperature} if decode.temperature > 0 else {}
        sources = [(params if done.params is None else done.params, model), *decode.others]
        return generation.generate(
            sources, tokens, mask=mask, count=of.max_new, combine=decode.combine, edit=done.edit, stop=of.stop, **drawn
        )

    params = shapes(of.config)
    found = {name: jax.ShapeDtypeStruct(own, dtype) for name, own, dtype in of.found}
    point = {name: jax.ShapeDtypeStruct((), dtype) for name, dtype in of.point}
    tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))
    rows = jax.ShapeDtypeStruct((shape[0], 2), jnp.int32)
    return answer, (params, params if of.based else None, found, tokens, mask, point, rows, jax.random.key(0))


@cache
def finder(how: Written, options: Any, config: LlamaConfig, like: Arrays) -> Callable[..., Any]:
    """Returns what finds out about a model from prompts of these shapes, compiled: ``(params, asked) -> arrays``.

    Raises:
        ValueError: it does not fit into memory.
    """
    run, given = looking(how, options, config, like)
    with jax.default_matmul_precision("highest"):
        return programs.fitted(run, *given, what="finding out about a model what an attack goes by")


def found_shapes(how: Written, options: Any, config: LlamaConfig, like: Arrays) -> Arrays:
    """Returns the shapes of what :func:`finder` finds."""
    run, given = looking(how, options, config, like)
    return told(jax.eval_shape(run, *given))


def looking(how: Written, options: Any, config: LlamaConfig, like: Arrays) -> tuple[Callable[..., Any], Any]:
    """Returns the function of :func:`finder`, and the shapes of what it takes."""
    asked = Asked(**{name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in like})
    model = llama.model(config)

    def find(params: Params, asked: Asked) -> dict[str, Array]:
        return how.find(model, params, asked, options)

    return find, (shapes(config), asked)


def chosen_half(encoded: Encoded, reader: Tokenizer, *, batch_tokens: int, max_tokens: int) -> Asked:
    """Returns the safe and unsafe prompts of one half, in batches of one shape: those of the other are answered."""
    rows = np.flatnonzero((encoded.of("safe") | encoded.of("unsafe")) & (encoded.folds == 1))
    length = min(max_tokens, padded_length(max(len(encoded.ids[row]) for row in rows)))
    count = -(-len(rows) // max(1, batch_tokens // length))
    size = -(-len(rows) // count)
    tokens, mask = np.zeros((count * size, length), np.int32), np.zeros((count * size, length), bool)
    mask[:, 0] = True  # of a row that is none: what is read of it is finite
    for place, row in enumerate(rows):
        tokens[place, : len(encoded.ids[row])] = encoded.ids[row]
        mask[place, : len(encoded.ids[row])] = True
    labels = np.zeros((2, count * size), bool)
    labels[:, : len(rows)] = [encoded.of(label)[rows] for label in ("safe", "unsafe")]
    parts = (leaf.reshape(count, size, *leaf.shape[1:]) for leaf in (tokens, mask, *labels))
    return Asked(*parts, _refusals(reader, encoded))


def _refusals(reader: Tokenizer, encoded: Encoded) -> Int[np.ndarray, " r"]:
    """The tokens that an answer begins with which is a refusal."""
    asked = encoded.prompts[0].messages
    return np.array(sorted({reader.exchange(asked, opening)[1][0] for opening in OPENINGS}), np.int32)
