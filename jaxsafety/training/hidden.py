"""What a model's residual stream is like on answers: what methods share that learn from representations.

A layer is named by the share of the depth that it ends, so that one name serves models of any depth.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsafety.entry.annotations import checked
from jaxsafety.types import RESIDUAL, Batch, Key, Model, Params


def layer_at(share: float, *, depth: int) -> int:
    """Returns the index of the layer that ends a share in (0, 1] of the depth, the nearest one: 7 for 1/4 of 32."""
    return max(0, int(share * depth + 0.5) - 1)


def layers_at(model: Model, params: Params, tokens: Int[Array, "b t"], *, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Returns the indices of the layers that end some shares of a model's depth, ascending, each of them once."""
    # Of what is trained, which may be an adapter's factors, neither depth nor width can be read.
    found = jax.eval_shape(lambda params, tokens: model.apply(params, tokens, sites=(RESIDUAL,)), params, tokens)
    depth = found.activations[RESIDUAL].shape[0]
    return tuple(sorted({layer_at(share, depth=depth) for share in shares}))


def states(model: Model, params: Params, *sides: Batch, shares: tuple[float, ...]) -> list[Float[Array, "b l t d"]]:
    """Returns what leaves the layers at some shares of the depth, on every side, from one pass over them together."""
    tokens = jnp.concatenate([side.tokens for side in sides])
    layers = layers_at(model, params, tokens, shares=shares)
    found = model.apply(params, tokens, sites=(RESIDUAL,), layers=layers).activations[RESIDUAL]
    return jnp.split(found.swapaxes(0, 1), len(sides))


@checked
def answered(mask: Bool[Array, "b t"]) -> Bool[Array, "b t"]:
    """Returns the places of the scored tokens themselves, each of which stands one place after where it is predicted.

    What two answers to a prompt share, its last token among it, is none of them.
    """
    return jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))


def direction_words(params: Params, *, key: Key, config: object) -> UInt32[Array, " words"]:
    """Returns what a lane draws its :func:`direction` from: a method's ``init_aux``, which knows no model's width."""
    return jax.random.key_data(key)


@checked
def direction(words: UInt32[Array, " words"], *, width: int) -> Float[Array, " {width}"]:
    """Returns a unit vector, uniform over all directions: the same for the same words, the data of a key."""
    drawn = jax.random.normal(jax.random.wrap_key_data(words), (width,), jnp.float32)
    return drawn / jnp.linalg.norm(drawn)
