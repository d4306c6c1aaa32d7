"""What a model runs on: tokens, or embeddings that need not belong to any (soft tokens, sensitivities)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety.types import Params


def embed(params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns the embeddings of tokens in [0, v) in float32, before any position is added; of a GPT or a Llama."""
    return params["embed"][tokens].astype(jnp.float32)


def embedded(
    params: Params, inputs: Int[Array, "b t"] | Float[Array, "b t d"], *, max_tokens: int
) -> Float[Array, "b t d"]:
    """Returns what enters the first layer of a model but for positions, of tokens or of embeddings.

    Inputs of another rank, type or width, or longer ones than ``max_tokens``, are a ValueError.
    """
    width = params["embed"].shape[1]
    whole = jnp.issubdtype(inputs.dtype, jnp.integer) and inputs.ndim == 2
    if not whole and not (jnp.issubdtype(inputs.dtype, jnp.floating) and inputs.shape[2:] == (width,)):
        raise ValueError(
            f"inputs: got {inputs.dtype}{list(inputs.shape)}, expected integer tokens [b, t] or float embeddings "
            f"[b, t, {width}]"
        )
    if inputs.shape[1] > max_tokens:
        raise ValueError(f"tokens: got {inputs.shape[1]} per sequence, expected at most max_tokens {max_tokens}")
    return embed(params, inputs) if whole else inputs.astype(jnp.float32)
