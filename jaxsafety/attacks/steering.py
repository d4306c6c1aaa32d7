"""Steering: a direction of refusing, found on other prompts, is added to the residual stream, or taken from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.linalg import masked
from jaxsafety.linalg.contrasts import Component, at_last, direction
from jaxsafety.linalg.masked import averaged
from jaxsafety.types import RESIDUAL, Attack, Attacked, Batch, Key, Model, Params, Point, Section, Target, Trial

Level = Literal["prompts", "answers"]


@checked
def steered(
    h: Float[Array, "b t d"], unit: Float[Array, " d"], *, alpha: float | Float[Array, ""]
) -> Float[Array, "b t d"]:
    """Returns ``h + alpha |h| unit``, with the norm that h had; alpha 0 is h, bit for bit.

    References:
        Hazra et al. 2024 (arXiv 2406.11801), eq. 5. Fidelity: there alpha is not in units of the activation's norm.
    """
    norm = masked.norm(h, axis=-1)[..., None]
    moved = h + alpha * norm * unit[None, None]
    length = masked.norm(moved, axis=-1)[..., None]
    rescaled = moved * (norm / jnp.where(length > 0, length, 1))
    return jnp.where(jnp.asarray(alpha) == 0, h, rescaled.astype(h.dtype))


@dataclass(frozen=True)
class Config:
    """Which direction, and how far.

    Attributes:
        level: the direction is from safe to unsafe ``prompts``, at their last token, or from complied to refused
            ``answers`` of unsafe prompts, mean over the places that predict the judged tokens. Prompts are held-out
            ones in pairs of one text.
        component: see :func:`jaxsafety.linalg.contrasts.direction`.
        alpha: multiples of the activation's norm, added at every layer and position: above 0 towards refusing, below
            away from it.
    """

    level: Level = "prompts"
    component: Component = "mean"
    alpha: tuple[float, ...] = swept(0.0, 0.1, 0.2, 0.5, 1.0)
    __post_init__ = check


@checked
def differences(model: Model, params: Params, held_out: Trial, *, level: Level) -> Float[Array, "l b d"]:
    """Returns what a direction is found in: of pairs of safe and unsafe prompts ``[2, b, ...]``, see ``Config``."""
    safe, unsafe = (jax.tree.map(lambda leaf, i=i: leaf[i], held_out) for i in (0, 1))
    if level == "answers":
        return _answering(model, params, unsafe.refused) - _answering(model, params, unsafe.complied)
    return (at_last(model, params, unsafe) - at_last(model, params, safe))[:, :, 0]


def _answering(model: Model, params: Params, side: Batch) -> Float[Array, "l b d"]:
    found = model.apply(params, side.tokens, sites=(RESIDUAL,)).activations[RESIDUAL]
    return averaged(found.swapaxes(2, 3), side.mask[None, :, None])


def attack(target: Target, config: Config, *, point: Point, key: Key) -> Attacked:
    """See :class:`jaxsafety.types.Attack`."""
    found = differences(target.model, target.params, target.held_out, level=config.level)
    units = direction(found, component=config.component)

    def edit(site: str, layer: Int[Array, ""], positions: Int[Array, "b t"], h: Float[Array, "b t d"]) -> Array:
        return steered(h, units[layer].astype(h.dtype), alpha=point["alpha"]) if site == RESIDUAL else h

    return Attacked(edit=edit)


SECTION = Section(
    "Steering by a direction of refusing",
    "arXiv 2406.11801",
    "To the right more of the direction is added, and refusals should rise; below 0 it is taken away, which is an "
    "attack.",
)
ATTACK = Attack(Config, attack, section=SECTION)
