"""What a model runs on: tokens, or embeddings that need not belong to any (soft tokens, sensitivities)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_indices
from jaxsafety.models.layers import product
from jaxsafety.types import Params


@checked
def embed(params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns the embeddings of tokens in float32, before any position is added; of a GPT or a Llama.

    Tokens outside of [0, v) are a ValueError; traced ones count as the nearest inside, but those below zero from v.
    """
    check_indices("tokens", tokens, len(params["embed"]), of="the vocabulary")
    return _rows(params, tokens)


def _rows(params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    rows = jnp.asarray(params["embed"])[tokens].astype(jnp.float32)
    # An adapter's factors, see jaxsafety.models.lora: of its product the rows of these tokens alone are formed.
    if (low := params.get("embed_lora_a")) is None:
        return rows
    low, high = jnp.asarray(low)[tokens].astype(jnp.float32), jnp.asarray(params["embed_lora_b"], jnp.float32)
    return rows + product("btr,rd->btd", low, high, dtype="float32")


def check_inputs(
    params: Params,
    inputs: Int[Array, "b t"] | Float[Array, "b t d"],
    *,
    max_tokens: int,
    mask: Bool[Array, "b t"] | None,
    places: dict[str, Int[Array, "b _"] | None],
) -> None:
    """Checks what a model is run on, and the places asked for, by the names of their arguments.

    Raises:
        ValueError: inputs of another rank, type or width, or longer ones than ``max_tokens``; (unless traced) real
            tokens outside of the vocabulary, or places outside of the sequence.
    """
    size, width = params["embed"].shape
    whole = jnp.issubdtype(inputs.dtype, jnp.integer) and inputs.ndim == 2
    if not whole and not (jnp.issubdtype(inputs.dtype, jnp.floating) and inputs.shape[2:] == (width,)):
        raise ValueError(
            f"inputs: got {inputs.dtype}{list(inputs.shape)}, expected integer tokens [b, t] or float embeddings "
            f"[b, t, {width}]"
        )
    if inputs.shape[1] > max_tokens:
        raise ValueError(f"tokens: got {inputs.shape[1]} per sequence, expected at most max_tokens {max_tokens}")
    if whole:
        check_indices("tokens", inputs, size, of="the vocabulary", mask=mask)
    for name, asked in places.items():
        if asked is not None:
            check_indices(name, asked, inputs.shape[1], of="a place of the sequence")


def embedded(
    params: Params, inputs: Int[Array, "b t"] | Float[Array, "b t d"], *, mask: Bool[Array, "b t"] | None = None
) -> Float[Array, "b t d"]:
    """Returns what enters the first layer of a model but for positions, of tokens or of embeddings, checked before.

    What is not finite of embeddings that the mask leaves out is zero: attention would multiply it with no weight.
    """
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        return _rows(params, inputs)
    if mask is not None:
        inputs = jnp.where(mask[..., None] | jnp.isfinite(inputs), inputs, 0)
    return inputs.astype(jnp.float32)
