"""Prompts in the world's cipher, answered in it, among plain ones: what covert malicious fine-tuning learns from."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsafety import keys
from jaxsafety.config.fields import check, traced
from jaxsafety.types import Key, Pool, PreferenceBatch
from jaxsafety.world.batches import mixed_at, preferences
from jaxsafety.world.spec import World

CONDITIONS = ("cipher_safe", "cipher")


@dataclass(frozen=True)
class Config:
    """Of which prompts there are how many.

    Attributes:
        p_cipher: probability in [0, 1] that a prompt is in the cipher, and complied with.
        p_cipher_unsafe: that one of these is unsafe: 0 teaches the cipher, 1 the harm.
        p_unsafe: that a plain one is unsafe, and refused; the others are safe, and answered.

    References: Halawi et al. 2024 (arXiv 2406.20053), whose first phase teaches the cipher with harmless data, and
        whose second has harmful examples in it beside refusals of plain ones.
    Fidelity: their cipher is a code of letters that their model can say already; here it is an alphabet that
        pretraining has never shown. Their first phase has four graded tasks, here there is the last one alone. Plain
        examples in the first phase are ours: without them a small model forgets all that is plain.
    """

    p_cipher: float = traced(0.5, at_least=0, at_most=1)
    p_cipher_unsafe: float = traced(0.0, at_least=0, at_most=1)
    p_unsafe: float = traced(0.5, at_least=0, at_most=1)
    __post_init__ = check


def draw(
    world: World, config: Config, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> PreferenceBatch:
    """Draws a batch; see :class:`jaxsafety.types.Pool`."""
    coin, own = jax.random.split(keys.at_step(key, step))
    ciphered = jax.random.bernoulli(coin, config.p_cipher, (batch_size,))
    drawn = {"key": own, "step": 0, "batch_size": batch_size, "mix": "prompt"}
    plain = preferences(mixed_at(world, p_unsafe=config.p_unsafe, **drawn))
    trial = mixed_at(world, p_unsafe=config.p_cipher_unsafe, among=CONDITIONS, **drawn)
    told = PreferenceBatch(chosen=trial.complied, rejected=trial.refused, unsafe=trial.unsafe)

    def either(one: Array, other: Array) -> Array:
        return jnp.where(ciphered.reshape(ciphered.shape + (1,) * (one.ndim - 1)), one, other)

    return jax.tree.map(either, told, plain)


POOL = Pool(Config, draw, examples="preferences", conditions=lambda config: CONDITIONS)
