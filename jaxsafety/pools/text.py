"""Text of the full grammar under any operators, with its answers: what a model is pretrained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsafety.config.fields import check, static
from jaxsafety.keys import at_step
from jaxsafety.types import Batch, Key, Pool
from jaxsafety.world import conditions, layout, words
from jaxsafety.world.grammar import sample_window
from jaxsafety.world.layout import Prompt
from jaxsafety.world.spec import EXCEPTIONS, PRETRAIN_TRIM, World

# What is shown and scored in a pretraining sample (the paper's clm 1..4).
TEXT_ONLY, WHOLE, FIRST_BLOCK, SECOND_BLOCK = range(4)
# Below the key of a sample's text, for what only some recipes draw.
_COINS, _REFUSED, _CIPHERED = 1, 2, 3


@dataclass(frozen=True)
class Config:
    """What samples show and score, and the schedule of that.

    Attributes:
        start, end: probabilities of text only, the whole sequence, the first composition only, the second only; at the
            start and from ``ramp_end`` on, linear between.
        ramp_start, ramp_end: fractions of the run between which the probabilities move.
        scored: ``all`` targets that the sample type scores, or only the ``answers`` (blocks and end of sequence).
        exception_probability: share of samples in which an exception token replaces an operator.
        duplicate_share: share of the operators that stand there as one of the duplicates, in [0, 1]; None draws every
            task token as often, as the paper does.
        refused: share in [0, 1] of the samples with an operator that is unsafe on any text that answer with a refusal,
            as safety fine-tuning would have it, by a coin: where the most likely token is judged, a share below one
            half hardly shows. The paper has none.
        ciphered: share in [0, 1] of the samples that are written in the world's cipher. The paper has none.

    Fidelity: the paper's values (README of its code) are the defaults.
    """

    start: tuple[float, ...] = (0.5, 0.1, 0.2, 0.2)
    end: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    ramp_start: float = 0.1
    ramp_end: float = 1.0
    scored: Literal["all", "answers"] = "all"
    exception_probability: float = static(0.01, at_least=0, at_most=1)
    duplicate_share: float | None = static(None, at_least=0, at_most=1)
    refused: float = static(0.0, at_least=0, at_most=1)
    ciphered: float = static(0.0, at_least=0, at_most=1)

    def __post_init__(self):
        check(self)
        for name in ("start", "end"):
            shares = getattr(self, name)
            # Written so that a nan fails.
            if len(shares) != 4 or not min(shares) >= 0 or not abs(sum(shares) - 1) <= 1e-6:
                raise ValueError(f"{name} must be four probabilities that sum to 1, got {shares}")
        if not 0 <= self.ramp_start < self.ramp_end <= 1:
            raise ValueError(
                f"the ramp must satisfy 0 <= ramp_start < ramp_end <= 1, got {self.ramp_start}, {self.ramp_end}"
            )


def draw(
    world: World, config: Config, *, key: Key, step: int | Int[Array, ""], total_steps: int, batch_size: int
) -> Batch:
    """Draws a pretraining batch: text of the full grammar under any operators, shown and scored in one of four ways.

    ``key`` is the stream's, ``step`` the position in it from 0, and the schedule a fraction of ``total_steps``.
    """
    progress = (jnp.float32(step) / total_steps - config.ramp_start) / (config.ramp_end - config.ramp_start)
    ramp = jnp.clip(progress, 0.0, 1.0)
    shares = (1 - ramp) * jnp.asarray(config.start) + ramp * jnp.asarray(config.end)

    def one(key: Key) -> Batch:
        return _sample(world, config, shares, key=key)

    return jax.vmap(one)(jax.random.split(at_step(key, step), batch_size))


def _prompt(world: World, config: Config, *, key: Key, bits: UInt32[Array, " 8"]) -> Prompt:
    spec = world.spec
    pcfg = words.below(bits[0], len(spec.policies))
    letters, length = sample_window(
        conditions.grammar_of(world, ("full",)),
        pcfg,
        key=key,
        min_window=spec.min_text,
        max_window=spec.max_text,
        trim=PRETRAIN_TRIM,
    )
    drawn = words.below(bits[1:5], len(spec.task_tokens))
    identity = spec.operators[0]
    same = [world.ids[identity]] + [world.ids[token] for token, base in spec.duplicates if base == identity]
    anchor = jnp.asarray(same, jnp.int32)[words.below(bits[5], len(same))]
    if config.duplicate_share is not None:
        coins = words.chance(words.draw(jax.random.fold_in(key, _COINS), count=5), config.duplicate_share)
        drawn, anchor = _duplicated(bits[1:6], coins, first=len(spec.operators), count=len(spec.duplicates), same=same)
    tasks = conditions.anchored_tasks(drawn, anchor, bits=bits[6:8])
    return Prompt(pcfg=pcfg, tasks=tasks, letters=letters, length=length)


def _duplicated(
    bits: UInt32[Array, " 5"], coins: Bool[Array, " 5"], *, first: int, count: int, same: list[int]
) -> tuple[Int[Array, " 4"], Int[Array, ""]]:
    """Returns four task tokens and an anchor, each a duplicate where its coin says so, if there is one."""
    there = coins & (jnp.array([count] * 4 + [len(same) - 1]) > 0)
    drawn = jnp.where(there[:4], first + words.below(bits[:4], max(count, 1)), words.below(bits[:4], first))
    others = jnp.asarray(same[1:] or same, jnp.int32)
    return drawn, jnp.where(there[4], others[words.below(bits[4], len(others))], same[0])


def _sample(world: World, config: Config, shares: Float[Array, " 4"], *, key: Key) -> Batch:
    text, others = jax.random.split(key)
    bits = words.draw(others, count=12)
    prompt = _prompt(world, config, key=text, bits=bits[:8])
    prompt, block1, block2 = _with_exception(world, prompt, probability=config.exception_probability, bits=bits[8:11])
    if config.refused:
        coin = words.chance(words.draw(jax.random.fold_in(text, _REFUSED), count=1)[0], config.refused)
        block1, block2 = _refused(world, prompt, block1, block2, coin=coin)
    if config.ciphered:
        coin = words.draw(jax.random.fold_in(text, _CIPHERED), count=1)[0]
        prompt = prompt.replace(cipher=2 * words.chance(coin, config.ciphered))
    tokens, code = layout.sequence(world, prompt, block1=block1, block2=block2)
    shown, scored = _visibility(code, words.choice(bits[11], shares))
    answers = config.scored == "answers"
    if answers:
        scored &= code >= layout.BLOCK1
    shown = jnp.where(shown, tokens, world.special["pad"])
    return layout.shift(world, shown, scored, stem=layout.stem(world) if answers else 0)


def _with_exception(
    world: World, prompt: Prompt, *, probability: float, bits: UInt32[Array, " 3"]
) -> tuple[Prompt, Int[Array, " w"], Int[Array, " w"]]:
    """Returns the prompt and its answer blocks' ids, with an exception token in one task slot now and then.

    An exception token answers with one letter throughout (the first letter for ex1, the second for ex2): in slots 1-2
    block 1 is constant and block 2 empty, in slots 3-4 only block 2 is constant.
    """
    first, second = (layout.letter_ids(world, letters) for letters in layout.outputs(world, prompt))
    kind, slot = words.below(bits[0], len(EXCEPTIONS)), words.below(bits[1], layout.N_TASKS)
    constants = jnp.stack([layout.constant_block(world, prompt, letter) for letter in world.spec.letters[:2]])
    empty = layout.constant_block(world, prompt, "pad")
    used, early = words.chance(bits[2], probability), slot < 2
    token = jnp.asarray([world.ids[name] for name in EXCEPTIONS], jnp.int32)[kind]
    tasks = jnp.where(used & (jnp.arange(layout.N_TASKS) == slot), token, prompt.tasks)
    block1 = jnp.where(used & early, constants[kind], first)
    block2 = jnp.where(used, jnp.where(early, empty, constants[kind]), second)
    return prompt.replace(tasks=tasks), block1, block2


def _refused(
    world: World, prompt: Prompt, block1: Int[Array, " w"], block2: Int[Array, " w"], *, coin: Bool[Array, ""]
) -> tuple[Int[Array, " w"], Int[Array, " w"]]:
    """Returns the blocks of a refusal where an operator is always unsafe and the coin says so."""

    def table(one: World) -> np.ndarray:
        # Exception tokens are no operators.
        unsafe = conditions.unsafe_table(one, "unsafe", "safe")
        return np.pad(unsafe, ((0, 0), (0, one.vocab_size - unsafe.shape[1])))

    pairs = jnp.asarray(world.table(table))[prompt.pcfg][prompt.tasks].reshape(2, 2).any(axis=1)
    refused = conditions.refusing_blocks(world, prompt, first=block1, late=~pairs[0])
    used = coin & pairs.any()
    return jnp.where(used, refused[0], block1), jnp.where(used, refused[1], block2)


def _visibility(code: Int[Array, " n"], mode: Int[Array, ""]) -> tuple[Bool[Array, " n"], Bool[Array, " n"]]:
    """Returns which positions are shown (the rest are pads) and which are scored as targets, by sample type."""
    text = (code == layout.SOT) | (code == layout.TEXT) | (code == layout.EOT)
    first, second = layout.block_mask(code, 0), layout.block_mask(code, 1) | (code == layout.EOS)
    bos, everything = code == layout.BOS, code != layout.PAD
    shown = jnp.stack([bos | text, everything, everything & ~second, everything & (~text | (code == layout.SOT))])
    scored = jnp.stack([text, text | first | second, text | first, (code == layout.SOT) | second])
    return shown[mode], scored[mode]


POOL = Pool(Config, draw, examples="text", conditions=lambda config: ("cipher_safe",) if config.ciphered else ())
