"""Prompts as pure draws of (key, step): of one condition, or safe and unsafe ones mixed as training wants them.

``key`` is the key of a named stream (:mod:`jaxsafety.keys`); the step is folded in, so the data position of a run is
its step counter and resuming is exact. Everything is jittable with a traced key and step.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import known, whole_number
from jaxsafety.entry.programs import compiled
from jaxsafety.keys import at_step
from jaxsafety.types import Key, PreferenceBatch, Trial
from jaxsafety.world import conditions, layout
from jaxsafety.world.conditions import Condition
from jaxsafety.world.spec import World
from jaxsafety.world.words import Probability

LATE_IN_TRAINING = 0.2
LATE_IN_EVALUATION = 0.1


@checked
def batch_at(
    world: World,
    condition: str | Condition,
    *,
    key: Key,
    step: int | Int[Array, ""],
    batch_size: int,
    late_probability: Probability = LATE_IN_EVALUATION,
) -> Trial:
    """Draws fresh evaluation prompts ``[b, ...]`` of a condition with their complied and refused answers.

    Args:
        world: the world.
        condition: ``safe``, ``unsafe``, ``jb_co_task``, ``jb_co_text``, ``jb_misgen`` or ``ood``, one of
            :data:`jaxsafety.world.conditions.FURTHER` where the world has its tokens, or one of one's own.
        key: stream key.
        step: position in the stream.
        batch_size: prompts, b.
        late_probability: how often only the second composition of an unsafe prompt is unsafe, in [0, 1].

    Returns:
        A :class:`~jaxsafety.types.Trial` of ``[b, ...]`` arrays.

    Raises:
        ValueError: unknown condition, no prompts, or a probability that is none (a traced one is not looked at).
    """
    _check_probability("late_probability", late_probability)
    whole_number("batch_size", batch_size, 1)
    return _trials(key, step, late_probability, world=world, condition=condition, batch_size=batch_size)


@compiled("world", "condition", "batch_size")
def _trials(key, step, late_probability, *, world, condition, batch_size):
    def one(key: Key) -> Trial:
        prompt, unsafe = conditions.draw_prompt(
            world, condition, key=key, pcfgs=world.spec.eval_pcfgs, late_probability=late_probability
        )
        return conditions.answers(world, prompt, unsafe, stem=layout.stem(world))

    return jax.vmap(one)(jax.random.split(at_step(key, step), batch_size))


def preferences(trial: Trial) -> PreferenceBatch:
    """Returns preferred and dispreferred answers: refusal over compliance for unsafe prompts, the reverse for safe."""
    unsafe, stem = trial.unsafe, min(trial.complied.stem, trial.refused.stem)
    complied, refused = (side.replace(stem=stem) for side in (trial.complied, trial.refused))

    def where(a: Array, b: Array) -> Array:
        return jnp.where(unsafe.reshape(unsafe.shape + (1,) * (a.ndim - unsafe.ndim)), a, b)

    return PreferenceBatch(
        chosen=jax.tree.map(where, refused, complied),
        rejected=jax.tree.map(where, complied, refused),
        unsafe=unsafe,
        aligned=True,
    )


@checked
def mixed_at(
    world: World,
    *,
    key: Key,
    step: int | Int[Array, ""],
    batch_size: int,
    p_unsafe: float | Float[Array, ""],
    mix: Literal["prompt", "batch"],
    among: tuple[str, str] = ("safe", "unsafe"),
) -> Trial:
    """Draws training prompts ``[b, ...]`` from all PCFGs; one is unsafe with probability ``p_unsafe``.

    ``mix``: the coin is tossed for every ``prompt`` or, as the paper does, once for the whole ``batch``. ``key`` is the
    stream's, ``step`` the position in it. ``among`` are the conditions of safe and unsafe prompts, or two others that
    share their texts.

    Raises:
        ValueError: another ``mix``, no prompts, a probability that is none (a traced one is not looked at), or
            conditions that the world cannot draw together.
    """
    _check_probability("p_unsafe", p_unsafe)
    whole_number("batch_size", batch_size, 1)
    return _mixed(key, step, p_unsafe, world=world, batch_size=batch_size, mix=mix, among=among)


@compiled("world", "batch_size", "mix", "among")
def _mixed(key, step, p_unsafe, *, world, batch_size, mix, among):
    coin, draw = jax.random.split(at_step(key, step))
    shape = (batch_size,) if mix == "prompt" else (1,)
    unsafe = jnp.broadcast_to(jax.random.bernoulli(coin, p_unsafe, shape), (batch_size,))

    def one(key: Key, unsafe: Bool[Array, ""]) -> Trial:
        both = [conditions.named(name) for name in among]
        pcfgs = tuple(range(len(world.spec.policies)))
        safe_draw, unsafe_draw = conditions.draw_alike(
            world, both, key=key, pcfgs=pcfgs, late_probability=LATE_IN_TRAINING
        )
        drawn = jax.tree.map(lambda a, b: jnp.where(unsafe, a, b), unsafe_draw, safe_draw)
        return conditions.answers(world, *drawn, stem=layout.stem(world))

    return jax.vmap(one)(jax.random.split(draw, batch_size), unsafe)


def _check_probability(name: str, value: Probability) -> None:
    share = known(value)
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
