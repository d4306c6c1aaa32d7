"""Rotary positions of the Llama family: the channels' frequencies, scaled for longer contexts, at given positions.

Channel ``i`` of the first half of a head is paired with channel ``i`` of the second half. Frequencies are radians per
token; those that depend on the configuration alone are computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsafety.config.names import check_name

RopeScaling = Literal["none", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class Rope:
    """How positions become angles; static under ``jit``.

    Attributes:
        base: the slowest channel turns once in about ``2 pi base`` tokens.
        scaling: ``"none"``; ``"linear"`` divides every frequency by ``factor``; ``"dynamic"`` raises the base with the
            length of a sequence beyond ``original_tokens``; ``"llama3"`` and ``"yarn"`` divide the slow channels'
            frequencies only, and go over to them by the turns of a channel, or by its place.
        factor: by how much the context grows, at least 1; unused by ``"none"``.
        low_frequency: llama3 and yarn: a channel of fewer turns within ``original_tokens`` is slow.
        high_frequency: llama3 and yarn: a channel of more turns within ``original_tokens`` is left alone.
        original_tokens: llama3, yarn and dynamic: the context that the model was first trained with.
        amplitude: what turned heads are multiplied with; yarn's scores are sharper than those of a shorter context.

    Raises:
        ValueError: an unknown name, or a number out of its range.

    References:
        Su et al. (2021), RoFormer, arXiv:2104.09864; Chen et al. (2023), Position Interpolation, arXiv:2306.15595;
        Peng et al. (2023), YaRN, sections 3.1 to 3.4, arXiv:2309.00071; Grattafiori et al.
        (2024), The Llama 3 Herd of Models, arXiv:2407.21783.
    """

    base: float = 10_000.0
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_tokens: int = 8192
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        check_name("rope scaling", self.scaling, get_args(RopeScaling))
        bounds = {"base": 0.0, "amplitude": 0.0, "low_frequency": 0.0, "high_frequency": self.low_frequency}
        for name, bound in bounds.items():
            value = getattr(self, name)
            if not bound < value < math.inf:
                raise ValueError(f"rope.{name}: got {value!r}, expected a number greater than {bound!r}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope.factor: got {self.factor!r}, expected a number of at least 1")
        if not isinstance(self.original_tokens, int) or self.original_tokens < 1:
            raise ValueError(f"rope.original_tokens: got {self.original_tokens!r}, expected an integer of at least 1")


def frequencies(rope: Rope, *, width: int, lengths: Int[Array, " #b"]) -> Float[Array, "_ {width}//2"]:
    """Returns the angle per token of every pair of channels, ``base^(-2i/k)`` before any scaling.

    Args:
        rope: the scaling.
        width: head width ``k``, even; at least 4 for dynamic scaling.
        lengths: ``[b]`` tokens of each sequence; only dynamic scaling looks at them.

    Returns:
        ``[b, k/2]`` float32 radians per token for dynamic scaling, else ``[1, k/2]``.

    Fidelity:
        Linear, llama3 and yarn scaling as released. Dynamic scaling goes by each sequence's own length, where
        transformers takes the longest of the batch: so a sequence's logits do not depend on its neighbours.
    """
    exponents = np.arange(0, width, 2) / width
    if rope.scaling == "dynamic":
        excess = jnp.maximum(lengths.astype(jnp.float32) / rope.original_tokens, 1.0)
        stretch = jnp.power(rope.factor * excess - (rope.factor - 1.0), width / (width - 2))
        return jnp.exp(-jnp.log(rope.base * stretch)[:, None] * jnp.asarray(exponents, jnp.float32)[None, :])
    plain = rope.base**-exponents
    kept = np.zeros_like(plain)
    if rope.scaling == "llama3":
        turns = rope.original_tokens * plain / (2 * math.pi)
        kept = np.clip((turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0.0, 1.0)
    if rope.scaling == "yarn":
        first, last = (_channel(rope, turns, width) for turns in (rope.high_frequency, rope.low_frequency))
        first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        kept = 1.0 - np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
    factor = 1.0 if rope.scaling == "none" else rope.factor
    return jnp.asarray((kept + (1.0 - kept) / factor) * plain, jnp.float32)[None, :]


def _channel(rope: Rope, turns: float, width: int) -> float:
    """The place of a channel that turns so often within ``original_tokens``."""
    return width * math.log(rope.original_tokens / (turns * 2 * math.pi)) / (2 * math.log(rope.base))


def table_at(
    rope: Rope, *, positions: Int[Array, "#b t"], lengths: Int[Array, " #b"], width: int
) -> Float[Array, "2 _ t {width}//2"]:
    """Returns the cosines, then the sines, of the rotary angles of given positions, for ``layers.rotate``.

    ``positions`` may have b = 1 for all sequences alike; for ``lengths`` and ``width`` see :func:`frequencies`.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope, width=width, lengths=lengths)[:, None, :]
    table = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    return table if rope.amplitude == 1 else rope.amplitude * table
