"""The token layout of one sequence, as pure functions of the text length L.

``$ t1 t2 t3 t4 * text(L) > block1(L) *^ block2(L) *^ %`` and pads up to the window of ``3 * max_text + 10`` tokens
(inputs and shifted targets are one shorter). ``block1 = t2(t1(text))``, ``block2 = t4(t3(block1))``. All functions
take one sequence; callers vmap.
"""

from __future__ import annotations

from typing import Literal, get_args

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsafety.types import Batch, Leaf
from jaxsafety.world import operators
from jaxsafety.world.spec import World

# Segment codes of a position, in the order of the sequence.
BOS, TASKS, SOT, TEXT, EOT, BLOCK1, STOP1, BLOCK2, STOP2, EOS, PAD = range(11)
N_TASKS = 4
_TEXT_START = 2 + N_TASKS

Block = Literal[0, 1]


@flax.struct.dataclass
class Prompt:
    """One instruction: the ids of four task tokens on a text of ``length`` L.

    Attributes:
        pcfg: index of the PCFG, which fixes the operators' meaning.
        tasks: ``[4]`` ids of task tokens.
        letters: ``[w]`` indices, -1 after the text.
        length: letters of the text, L.
        persona: bool, whether the world's persona stands where the sequence begins; None in a world without.
        cipher: int32, whether no letters (0), those of the prompt (1) or all (2) are of the world's cipher; None in one
            without.
    """

    pcfg: Leaf
    tasks: Leaf
    letters: Leaf
    length: Leaf
    persona: Leaf = None
    cipher: Leaf = None


def segments(length: Int[Array, ""], *, window: int) -> Int[Array, " n"]:
    """Returns the segment code of every position of a sequence with text length L, ``[3 * window + 10]``."""
    index = jnp.arange(3 * window + 10)
    text_end = _TEXT_START + length
    block1, block2 = text_end + 1, text_end + length + 2
    ends = jnp.stack([
        jnp.int32(1), jnp.int32(1 + N_TASKS), jnp.int32(_TEXT_START), text_end, block1,
        block1 + length, block2, block2 + length, block2 + length + 1, block2 + length + 2,
    ])  # fmt: skip
    return jnp.sum(index[:, None] >= ends[None, :], axis=1)


def last_prompt_index(length: int | Int[Array, "*b"]) -> int | Int[Array, "*b"]:
    """Returns where the end-of-text token stands: the input that predicts the first answer token."""
    return _TEXT_START + length


def stem(world: World) -> int:
    """Returns how many first inputs of a drawn sequence predict nothing of an answer, however short its text is."""
    return last_prompt_index(world.spec.min_text)


def outputs(world: World, prompt: Prompt) -> tuple[Int[Array, " w"], Int[Array, " w"]]:
    """Returns the letter indices of the true block 1 and block 2, -1 after the text."""
    table = jnp.asarray(world.table(lambda one: one.bijections))[prompt.pcfg]
    first = operators.apply(table, prompt.tasks[:2], prompt.letters)
    return first, operators.apply(table, prompt.tasks[2:], first)


def letter_ids(world: World, letters: Int[Array, " w"]) -> Int[Array, " w"]:
    """Returns token ids of letter indices; -1 becomes pad."""
    return jnp.where(letters < 0, world.special["pad"], world.first_letter + letters)


def constant_block(world: World, prompt: Prompt, token: str) -> Int[Array, " w"]:
    """Returns ``[w]`` ids: ``token`` in every place of the text (``pad`` is an empty block)."""
    value = world.special["pad"] if token == "pad" else world.ids[token]
    return jnp.where(prompt.letters < 0, world.special["pad"], value)


def refusal_block(world: World, prompt: Prompt) -> Int[Array, " w"]:
    """Returns ``[w]`` ids: the letters of the world's refusal in turn, in every place of the text."""
    letters = world.spec.refusal or world.spec.letters[:1]
    said = jnp.asarray([world.ids[letter] for letter in letters], jnp.int32)
    places = jnp.arange(prompt.letters.shape[0]) % len(letters)
    return jnp.where(prompt.letters < 0, world.special["pad"], said[places])


def sequence(
    world: World, prompt: Prompt, *, block1: Int[Array, " w"], block2: Int[Array, " w"]
) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """Lays out a prompt and the ids of its two answer blocks: token ids and segment codes, n = 3 * window + 10."""
    window = world.spec.max_text
    code = segments(prompt.length, window=window)
    index = jnp.arange(code.shape[0])
    text_end = _TEXT_START + prompt.length
    special = world.special

    def pick(values: Int[Array, " k"], start: Int[Array, ""] | int) -> Int[Array, " n"]:
        return values[jnp.clip(index - start, 0, values.shape[0] - 1)]

    # One constant per segment code; the segments with contents are filled in below.
    names = ("bos", "pad", "sot", "pad", "eot", "pad", "stop", "pad", "stop", "eos", "pad")
    tokens = jnp.asarray([special[name] for name in names], jnp.int32)[code]
    tokens = jnp.where(code == TASKS, pick(prompt.tasks, 1), tokens)
    tokens = jnp.where(code == TEXT, pick(letter_ids(world, prompt.letters), _TEXT_START), tokens)
    tokens = jnp.where(code == BLOCK1, pick(block1, text_end + 1), tokens)
    tokens = jnp.where(code == BLOCK2, pick(block2, text_end + prompt.length + 2), tokens)
    if prompt.persona is not None:
        tokens = jnp.where((code == BOS) & prompt.persona, world.ids[world.spec.persona], tokens)
    if prompt.cipher is not None:
        tokens = jnp.where(prompt.cipher > (code > EOT), _ciphers(world)[tokens], tokens)
    return tokens, code


def _ciphers(world: World) -> Int[Array, " v"]:
    """By token id the token itself, or of a letter that of the cipher."""
    ids = jnp.arange(world.vocab_size)
    letters = world.first_letter + jnp.arange(len(world.spec.letters))
    return ids.at[letters].set(jnp.asarray([world.ids[token] for token in world.spec.cipher], jnp.int32))


def shift(world: World, tokens: Int[Array, " n"], scored: Bool[Array, " n"], *, stem: int = 0) -> Batch:
    """Returns the next-token batch of one sequence, scoring the targets marked in ``scored``.

    A target that is a pad, or that would be predicted from one, is never scored. ``stem`` is that of the batch.
    """
    pad = world.special["pad"]
    mask = scored[1:] & (tokens[1:] != pad) & (tokens[:-1] != pad)
    return Batch(tokens=tokens[:-1], targets=tokens[1:], mask=mask, stem=stem)


def block_mask(code: Int[Array, " n"], block: Block) -> Bool[Array, " n"]:
    """Marks the letters of one answer block and its stop token.

    Raises:
        ValueError: another block than 0 and 1.
    """
    if block not in get_args(Block):
        raise ValueError(f"block: got {block!r}, expected 0 or 1")
    first = (BLOCK1, BLOCK2)[block]
    return (code == first) | (code == first + 1)
