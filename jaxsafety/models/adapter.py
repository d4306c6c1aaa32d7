"""Somebody's own decoder as a :class:`jaxsafety.types.Model`: a plain function, or a flax or equinox module's.

Of its inside nothing is known: it gives logits, and text by being run again for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety.entry.checks import check_indices
from jaxsafety.models.generation import windowed
from jaxsafety.types import Model, Output, Unsupported


def adapted(
    logits: Callable[[Any, Any], Array],
    *,
    max_tokens: int,
    of_embeddings: Callable[[Any, Any], Array] | None = None,
    embed: Callable[[Any, Any], Array] | None = None,
) -> Model:
    """Returns a model that has logits, ``at`` and generation, and refuses masks, sites and edits.

    A flax module is ``adapted(module.apply, max_tokens=...)``, and ``params`` its variables; for equinox, whose module
    is its parameters, ``adapted(lambda module, tokens: jax.vmap(module)(tokens), max_tokens=...)``.

    Args:
        logits: ``(params, tokens[b, t]) -> [b, t, v]``, causal, of any float type.
        max_tokens: the longest ``t`` that it takes.
        of_embeddings: the same of embeddings ``[b, t, d]``, before any position is added; None if it has no such thing.
        embed: ``(params, tokens[b, t]) -> [b, t, d]``, goes with ``of_embeddings``.

    Raises:
        ValueError: one of ``embed`` and ``of_embeddings`` without the other.
    """
    if (embed is None) != (of_embeddings is None):
        raise ValueError("embed and of_embeddings: got one of them, expected both or neither")
    run = partial(_apply, {2: logits, 3: of_embeddings}, max_tokens)
    return Model(partial(_embed, embed), run, windowed(run, max_tokens=max_tokens))


def _embed(embed: Callable[[Any, Any], Array] | None, params: Any, tokens: Int[Array, "b t"]) -> Array:
    if embed is None:
        raise Unsupported("embed: this model has none, expected of_embeddings and embed where it was adapted")
    return embed(params, tokens).astype(jnp.float32)


def _apply(
    functions: dict[int, Callable[[Any, Any], Array] | None],
    max_tokens: int,
    params: Any,
    inputs: Int[Array, "b t"] | Float[Array, "b t d"],
    *,
    mask: Any = None,
    at: Int[Array, "b p"] | None = None,
    sites: tuple[str, ...] = (),
    layers: Any = None,
    positions: Any = None,
    edit: Any = None,
) -> Output:
    asked = {"mask": mask, "sites": sites or None, "edit": edit}
    for name in (name for name, value in asked.items() if value is not None):
        raise Unsupported(f"{name}: this model was adapted from its logits alone, expected none; write out its Model")
    if inputs.shape[1] > max_tokens:
        raise ValueError(f"tokens: got {inputs.shape[1]} per sequence, expected at most max_tokens {max_tokens}")
    run = functions[inputs.ndim]
    if run is None:
        raise Unsupported("inputs: this model takes no embeddings, expected tokens [b, t]")
    logits = run(params, inputs).astype(jnp.float32)
    if at is None:
        return Output(logits, {})
    check_indices("at", at, inputs.shape[1], of="a place of the sequence")
    at = jnp.where(at < 0, inputs.shape[1], at)  # an index below zero would count from the end
    return Output(jnp.take_along_axis(logits, at[..., None], axis=1), {})
