"""Batches as pure draws of (key, step): evaluation and tuning trials, and the pretraining mixture.

``key`` is the key of a named stream (:mod:`jaxsafety.keys`); the step is folded in, so the data position of a run is
its step counter and resuming is exact. Everything is jittable with a traced key and step.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.keys import at_step
from jaxsafety.types import Batch, Key, PreferenceBatch, Trial
from jaxsafety.world import conditions, layout
from jaxsafety.world.conditions import Condition, Probability
from jaxsafety.world.grammar import sample_window
from jaxsafety.world.layout import Prompt
from jaxsafety.world.spec import EXCEPTIONS, PRETRAIN_TRIM, World

LATE_IN_TRAINING = 0.2
LATE_IN_EVALUATION = 0.1

# What is shown and scored in a pretraining sample (the paper's clm 1..4).
TEXT_ONLY, WHOLE, FIRST_BLOCK, SECOND_BLOCK = range(4)


@dataclass(frozen=True)
class Mixture:
    """The pretraining mixture and its schedule.

    Attributes:
        start, end: probabilities of text only, the whole sequence, the first composition only, the second only; at the
            start and from ``ramp_end`` on, linear between.
        ramp_start, ramp_end: fractions of the run between which the probabilities move.
        scored: ``all`` targets that the sample type scores, or only the ``answers`` (blocks and end of sequence).
        exception_probability: share of samples in which an exception token replaces an operator.

    Fidelity: the paper's values (README of its code) are the defaults.
    """

    start: tuple[float, float, float, float] = (0.5, 0.1, 0.2, 0.2)
    end: tuple[float, float, float, float] = (0.1, 0.2, 0.3, 0.4)
    ramp_start: float = 0.1
    ramp_end: float = 1.0
    scored: Literal["all", "answers"] = "all"
    exception_probability: float = 0.01

    def __post_init__(self):
        for name in ("start", "end"):
            shares = getattr(self, name)
            # Written so that a nan fails.
            if len(shares) != 4 or not min(shares) >= 0 or not abs(sum(shares) - 1) <= 1e-6:
                raise ValueError(f"mixture {name} must be four probabilities that sum to 1, got {shares}")
        if not 0 <= self.ramp_start < self.ramp_end <= 1:
            raise ValueError(f"mixture ramp must satisfy 0 <= start < end <= 1, got {self.ramp_start}, {self.ramp_end}")
        if not 0 <= self.exception_probability <= 1:
            raise ValueError(f"mixture exception_probability must be in [0, 1], got {self.exception_probability}")


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
        condition: ``safe``, ``unsafe``, ``jb_co_task``, ``jb_co_text``, ``jb_misgen`` or ``ood``, or one of
            one's own.
        key: stream key.
        step: position in the stream.
        batch_size: prompts, b.
        late_probability: how often only the second composition of an unsafe prompt is unsafe, in [0, 1].

    Returns:
        A :class:`~jaxsafety.types.Trial` of ``[b, ...]`` arrays.

    Raises:
        ValueError: unknown condition.
    """

    def one(key: Key) -> Trial:
        prompt, unsafe = conditions.draw_prompt(
            world, condition, key=key, pcfgs=world.spec.eval_pcfgs, late_probability=late_probability
        )
        return conditions.answers(world, prompt, unsafe)

    return jax.vmap(one)(jax.random.split(at_step(key, step), batch_size))


def preferences(trial: Trial) -> PreferenceBatch:
    """Returns preferred and dispreferred answers: refusal over compliance for unsafe prompts, the reverse for safe."""
    unsafe = trial.unsafe

    def where(a: Array, b: Array) -> Array:
        return jnp.where(unsafe.reshape(unsafe.shape + (1,) * (a.ndim - unsafe.ndim)), a, b)

    return PreferenceBatch(
        chosen=jax.tree.map(where, trial.refused, trial.complied),
        rejected=jax.tree.map(where, trial.complied, trial.refused),
        unsafe=unsafe,
    )


def tune_batch_at(
    world: World,
    *,
    key: Key,
    step: int | Int[Array, ""],
    batch_size: int,
    p_unsafe: float | Float[Array, ""],
    mix: Literal["prompt", "batch"],
) -> PreferenceBatch:
    """Draws a safety fine-tuning batch from all PCFGs; a prompt is unsafe with probability ``p_unsafe``.

    ``mix``: the coin is tossed for every ``prompt`` or, as the paper does, once for the whole ``batch``. ``key`` is the
    stream's, ``step`` the position in it.
    """
    coin, draw = jax.random.split(at_step(key, step))
    shape = (batch_size,) if mix == "prompt" else (1,)
    unsafe = jnp.broadcast_to(jax.random.bernoulli(coin, p_unsafe, shape), (batch_size,))

    def one(key: Key, unsafe: Bool[Array, ""]) -> Trial:
        pcfgs = tuple(range(len(world.spec.policies)))
        safe_draw, unsafe_draw = (
            conditions.draw_prompt(world, name, key=key, pcfgs=pcfgs, late_probability=LATE_IN_TRAINING)
            for name in ("safe", "unsafe")
        )
        return conditions.answers(world, *jax.tree.map(lambda a, b: jnp.where(unsafe, a, b), unsafe_draw, safe_draw))

    return preferences(jax.vmap(one)(jax.random.split(draw, batch_size), unsafe))


def pretrain_batch_at(
    world: World, mixture: Mixture, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> Batch:
    """Draws a pretraining batch: text of the full grammar under any operators, shown and scored in one of four ways.

    ``key`` is the stream's, ``step`` the position in it from 0, and the schedule a fraction of ``total_steps``.
    """
    progress = (jnp.float32(step) / total_steps - mixture.ramp_start) / (mixture.ramp_end - mixture.ramp_start)
    ramp = jnp.clip(progress, 0.0, 1.0)
    shares = (1 - ramp) * jnp.asarray(mixture.start) + ramp * jnp.asarray(mixture.end)

    def one(key: Key) -> Batch:
        return _pretrain_sample(world, mixture, shares, key=key)

    return jax.vmap(one)(jax.random.split(at_step(key, step), batch_size))


def _pretrain_prompt(world: World, *, key: Key) -> Prompt:
    which, text, tasks, anchor, anchored = jax.random.split(key, 5)
    spec = world.spec
    pcfg = jax.random.randint(which, (), 0, len(spec.policies))
    letters, length = sample_window(
        world.grammars["full"], pcfg, key=text, min_window=spec.min_text, max_window=spec.max_text, trim=PRETRAIN_TRIM
    )
    drawn = jax.random.randint(tasks, (layout.N_TASKS,), 0, len(spec.task_tokens))
    identity = spec.operators[0]
    same = [world.ids[identity]] + [world.ids[token] for token, base in spec.duplicates if base == identity]
    anchor_id = jnp.asarray(same, jnp.int32)[jax.random.randint(anchor, (), 0, len(same))]
    return Prompt(
        pcfg=pcfg, tasks=conditions.anchored_tasks(drawn, anchor_id, key=anchored), letters=letters, length=length
    )


def _pretrain_sample(world: World, mixture: Mixture, shares: Float[Array, " 4"], *, key: Key) -> Batch:
    draw, mode_key, exception_key = jax.random.split(key, 3)
    prompt = _pretrain_prompt(world, key=draw)
    prompt, block1, block2 = _with_exception(
        world, prompt, probability=mixture.exception_probability, key=exception_key
    )
    tokens, code = layout.sequence(world, prompt, block1=block1, block2=block2)
    mode = jax.random.categorical(mode_key, jnp.log(shares))
    shown, scored = _visibility(code, mode)
    if mixture.scored == "answers":
        scored &= code >= layout.BLOCK1
    return layout.shift(world, jnp.where(shown, tokens, world.special["pad"]), scored)


def _with_exception(
    world: World, prompt: Prompt, *, probability: float, key: Key
) -> tuple[Prompt, Int[Array, " w"], Int[Array, " w"]]:
    """Returns the prompt and its answer blocks' ids, with an exception token in one task slot now and then.

    An exception token answers with one letter throughout (the first letter for ex1, the second for ex2): in slots 1-2
    block 1 is constant and block 2 empty, in slots 3-4 only block 2 is constant.
    """
    use, which, place = jax.random.split(key, 3)
    first, second = (layout.letter_ids(world, letters) for letters in layout.outputs(world, prompt))
    kind = jax.random.randint(which, (), 0, len(EXCEPTIONS))
    slot = jax.random.randint(place, (), 0, layout.N_TASKS)
    constants = jnp.stack([layout.constant_block(world, prompt, letter) for letter in world.spec.letters[:2]])
    empty = layout.constant_block(world, prompt, "pad")
    used, early = jax.random.bernoulli(use, probability), slot < 2
    token = jnp.asarray([world.ids[name] for name in EXCEPTIONS], jnp.int32)[kind]
    tasks = jnp.where(used & (jnp.arange(layout.N_TASKS) == slot), token, prompt.tasks)
    block1 = jnp.where(used & early, constants[kind], first)
    block2 = jnp.where(used, jnp.where(early, empty, constants[kind]), second)
    return prompt.replace(tasks=tasks), block1, block2


def _visibility(code: Int[Array, " n"], mode: Int[Array, ""]) -> tuple[Bool[Array, " n"], Bool[Array, " n"]]:
    """Returns which positions are shown (the rest are pads) and which are scored as targets, by sample type."""
    text = (code == layout.SOT) | (code == layout.TEXT) | (code == layout.EOT)
    first, second = layout.block_mask(code, 0), layout.block_mask(code, 1) | (code == layout.EOS)
    bos, everything = code == layout.BOS, code != layout.PAD
    shown = jnp.stack([bos | text, everything, everything & ~second, everything & (~text | (code == layout.SOT))])
    scored = jnp.stack([text, text | first | second, text | first, (code == layout.SOT) | second])
    return shown[mode], scored[mode]
