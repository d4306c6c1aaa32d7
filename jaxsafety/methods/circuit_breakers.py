"""Circuit breakers by representation rerouting: states of harmful answers leave the directions that they had."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jaxsafety import losses
from jaxsafety.config.fields import check, static, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.linalg.masked import norm
from jaxsafety.training import hidden
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms

Scalar = float | Float[Array, ""]


@checked
def cosine(a: Float[Array, "*b d"], b: Float[Array, "*b d"], mask: Bool[Array, "*b"]) -> Float[Array, "*b"]:
    """Returns the cosine of the angle between two states where the mask holds, and 0 elsewhere or where one is zero."""
    a, b = (jnp.where(mask[..., None], x, 0.0) for x in (a, b))
    lengths = norm(a, axis=-1) * norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.where(lengths > 0, lengths, 1.0)


@checked
def circuit_breakers(
    cosines: Float[Array, "b l t"], distances: Float[Array, "b l t"], *, on_harmful: Bool[Array, "b t"],
    on_kept: Bool[Array, "b t"], alpha: Scalar, progress: Scalar,
) -> Terms:  # fmt: skip
    """Returns ``c_s relu(cosine)`` and ``c_r distance``, each summed over its tokens and all layers, and their number.

    ``cosines`` are between states of harmful answers and what they were before, ``distances`` how far those of kept
    answers have moved. ``c_s = alpha (1 - progress / 2)`` and ``c_r = alpha progress / 2``, of a progress in [0, 1].

    References:
        Zou et al. 2024 (arXiv 2406.04313), algorithm 1.

    Example:
        >>> import jax.numpy as jnp
        >>> cosines, distances, mask = jnp.float32([[[0.5, -0.5]]]), jnp.float32([[[1.0, 3.0]]]), jnp.ones((1, 2), bool)
        >>> terms = circuit_breakers(cosines, distances, on_harmful=mask, on_kept=mask, alpha=10.0, progress=0.5)
        >>> print({name: (float(total), float(count)) for name, (total, count) in terms.items()})
        {'reroute': (3.75, 2.0), 'retain': (10.0, 2.0)}
    """
    masks = (jnp.broadcast_to(mask[:, None], cosines.shape) for mask in (on_harmful, on_kept))
    values = jax.nn.relu(cosines), distances
    reroute, retain = (losses.masked_sum(*one) for one in zip(values, masks, strict=True))
    share = progress / 2
    return {"reroute": (alpha * (1 - share) * reroute[0], reroute[1]), "retain": (alpha * share * retain[0], retain[1])}


@dataclass(frozen=True)
class Config:
    """Mean over tokens of harmful answers and layers of what is left of their directions, and of how far others moved.

    What is kept are safe answers and refusals. It teaches no refusal, so it is meant for a model that refuses.

    Attributes:
        layers: shares in (0, 1] of the depth that the layers end.
        alpha: weight of both terms; it goes from the first to the second, half of it by the end.
        nudge: how far, in multiples of its norm, a harmful state is compared from where it is, along a direction that a
            lane draws once: where it has not moved its cosine is largest, and has no gradient. In the tiny world 0.3
            moves a model that refuses at a rate of 2e-3 and 0.1 hardly; one that complies, whose harmful states are
            like those that are kept, the second term holds where it is.

    References:
        Zou et al. 2024 (arXiv 2406.04313), algorithm 1, layers 10 and 20 of 32.

    Fidelity: to the paper but for the ``nudge`` (0 is theirs), where dropout and rounding leave the start. The
        answers' own tokens count, where theirs are prompts' as well, which refusals share. A reference over a
        checkpoint keeps, for every layer and side, as many numbers of every token as the model is wide, and all
        examples are in memory: what does not fit is refused, and a dry run tells it.
    """

    layers: tuple[float, ...] = static((0.33, 0.67), above=0, at_most=1)
    alpha: float = traced(10.0, at_least=0)
    nudge: float = traced(0.1, at_least=0)

    def __post_init__(self):
        check(self)
        if not self.layers:
            raise ValueError("layers must name at least one share of the depth, got none")


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: UInt32[Array, " words"], *, key: Key,
    progress: Array,
) -> tuple[Terms, Terms]:  # fmt: skip
    """See :class:`jaxsafety.types.Method`."""
    sides = (batch.chosen, batch.rejected)
    (kept, harmful), before = hidden.states(model, params, *sides, shares=config.layers), batch.reference
    on_kept, on_harmful = (hidden.answered(side.mask) for side in sides)
    on_harmful &= batch.unsafe[:, None]
    everywhere = [jnp.broadcast_to(mask[:, None], kept.shape[:-1]) for mask in (on_kept, on_harmful)]
    length = jax.lax.stop_gradient(norm(harmful, axis=-1))[..., None]
    along = hidden.direction(aux, width=harmful.shape[-1])[None, None, None]
    cosines = cosine(harmful + config.nudge * length * along, before[1], everywhere[1])
    distances = norm(jnp.where(everywhere[0][..., None], kept - before[0], 0.0), axis=-1)
    masks = {"on_harmful": on_harmful, "on_kept": on_kept}
    terms = circuit_breakers(cosines, distances, **masks, alpha=config.alpha, progress=progress)
    return terms, {"cosine": losses.masked_sum(cosines, everywhere[1])}


def reference(
    model: Model, params: Params, batch: PreferenceBatch, config: Config
) -> tuple[Float[Array, "b l t d"], Float[Array, "b l t d"]]:
    """Returns the states of both answers in the model that tuning began with."""
    return tuple(hidden.states(model, params, batch.chosen, batch.rejected, shares=config.layers))


METHOD = Method(
    Config,
    totals,
    needs=lambda config: Needs(unsafe=True),
    reference=reference,
    init_aux=hidden.direction_words,
)
