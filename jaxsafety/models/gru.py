"""A gated recurrent unit: reads a sequence from its first element on, keeping a state of one width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.programs import compiled
from jaxsafety.types import Key, Params


def init(*, inputs: int, width: int, key: Key) -> Params:
    """Returns ``reads [inputs, 3 * width]``, ``keeps [width, 3 * width]`` and ``bias``: reset, update, candidate."""
    reads, keeps = jax.random.split(key)
    return {
        "reads": jax.random.normal(reads, (inputs, 3 * width)) * inputs**-0.5,
        "keeps": jax.random.normal(keeps, (width, 3 * width)) * width**-0.5,
        "bias": jnp.zeros(3 * width),
    }


@checked
@compiled()
def gru(params: Params, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
    """Returns the states after every element, from zeros: ``h' = (1 - z) * n + z * h``.

    With reset ``r`` and update ``z`` sigmoids of what is read and kept, the candidate is
    ``n = tanh(reads + r * keeps)``.

    References:
        Cho et al. 2014 (arXiv 1406.1078), eqs. 5 to 8. Fidelity: ``r`` multiplies the kept part after its matrix, as
        in PyTorch, whose second bias there is none of.
    """
    width = params["keeps"].shape[0]

    def step(h: Array, read: Array) -> tuple[Array, Array]:
        kept = h @ params["keeps"]
        r, z = jnp.split(jax.nn.sigmoid((read + kept)[:, : 2 * width]), 2, axis=1)
        n = jnp.tanh(read[:, 2 * width :] + r * kept[:, 2 * width :])
        h = (1 - z) * n + z * h
        return h, h

    read = x @ params["reads"] + params["bias"][None, None]
    _, states = jax.lax.scan(step, jnp.zeros((len(x), width), x.dtype), read.swapaxes(0, 1))
    return states.swapaxes(0, 1)
