"""Latent adversarial training (LAT): to refuse also where somebody moves what the model makes of the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety import losses
from jaxsafety.config.fields import check, static, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between, whole_number
from jaxsafety.entry.programs import compiled
from jaxsafety.linalg import descent
from jaxsafety.linalg.masked import norm
from jaxsafety.training import hidden
from jaxsafety.types import RESIDUAL, Batch, Key, Method, Model, Needs, Params, PreferenceBatch, Terms

Scalar = float | Float[Array, ""]
# Perturbations [b, t, d] to what each example's adversary makes small.
Objective = Callable[[Float[Array, "b t d"]], Float[Array, " b"]]


@checked
def perturbation(
    objective: Objective, places: Bool[Array, "b t"], *, width: int, radius: Scalar, steps: int
) -> tuple[Float[Array, "b t d"], Float[Array, " b"]]:
    """Returns what projected gradient descent from zero makes of every example's objective, and the objective at zero.

    Its steps are those of :func:`jaxsafety.linalg.descent.descended`, at the ``places`` that may be perturbed. No
    gradient flows into what is found.

    Raises:
        ValueError: fewer than one step, or a radius below 0.

    References:
        Madry et al. 2018 (arXiv 1706.06083); of activations: Sheshadri et al. 2024 (arXiv 2407.15549).

    Example:
        >>> import jax.numpy as jnp
        >>> goal, places = jnp.float32([[[3.0, 4.0]]]), jnp.ones((1, 1), bool)
        >>> objective = lambda moved: jnp.sum((moved - goal) ** 2, axis=(1, 2))
        >>> found, before = perturbation(objective, places, width=2, radius=1.0, steps=4)
        >>> print([round(float(one), 3) for one in found[0, 0]], before)
        [0.6, 0.8] [25.]
    """
    whole_number("steps", steps, 1)
    check_between("radius", radius, 0)
    return _perturbed(objective, places, radius, width=width, steps=steps)


@compiled("width", "steps")
def _perturbed(objective, places, radius, *, width, steps):
    def summed(moved: Float[Array, "b t d"]) -> tuple[Float[Array, ""], Float[Array, " b"]]:
        values = objective(moved)
        # Examples have nothing to do with each other: the gradient of the sum is each one's own.
        return jnp.sum(values), values

    start = jnp.zeros((*places.shape, width), jnp.float32)
    given = {"active": places[..., None], "radius": radius, "steps": steps, "taken": steps}
    found, values = descent.descended(summed, start, **given)
    return jax.lax.stop_gradient((found, values[0]))


@dataclass(frozen=True)
class Config:
    """Weighted sum of the means over scored tokens of refusals, of harmful answers and of safe answers, in nats.

    Refusals and harmful answers are those of perturbed prompts: at every token what is perturbed moves by a vector that
    makes the harmful answer as likely as can be.

    Attributes:
        site: what is perturbed: the ``embeddings``, or the residual stream behind one ``layer``.
        layer: share in (0, 1] of the depth that this layer ends.
        radius: how far a token may be moved, in multiples of the norm that is there.
        inner_steps: of the adversary.
        away: weight of the harmful answers' log-likelihood, which is pushed down.
        ascent_bound: nats per token beyond which it is not pushed any further.

    References:
        Sheshadri et al. 2024 (arXiv 2407.15549), targeted latent adversarial training.

    Fidelity: theirs is of the residual stream, ``layer`` here; their adversary also avoids the refusal, moves several
        layers at once and by one length everywhere; the loss away from harmful answers is here that of
        :func:`jaxsafety.losses.bounded`, theirs of ``log(1 - p)``. A perturbation begins at zero: nothing is drawn.
    """

    site: Literal["embeddings", "layer"] = "embeddings"
    layer: float = static(0.25, above=0, at_most=1)
    radius: float = traced(0.3, at_least=0)
    inner_steps: int = static(8, at_least=1)
    away: float = traced(0.5, at_least=0)
    ascent_bound: float = traced(10.0, above=0, infinite=True)
    __post_init__ = check


def _logits(
    model: Model, params: Params, tokens: Int[Array, "b t"], moved: Float[Array, "b t d"], *, config: Config
) -> Float[Array, "b t v"]:
    """Returns the logits of a model whose embeddings or one layer's states are moved, in multiples of their norm."""

    def perturbed(h: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        length = jax.lax.stop_gradient(norm(h.astype(jnp.float32), axis=-1))[..., None]
        return (h + length * moved).astype(h.dtype)

    if config.site == "embeddings":
        return model.apply(params, perturbed(model.embed(params, tokens))).logits
    (chosen,) = hidden.layers_at(model, params, tokens, shares=(config.layer,))

    def edit(site: str, layer: Int[Array, ""], positions: Int[Array, "b t"], h: Float[Array, "b t d"]) -> Array:
        return jnp.where(layer == chosen, perturbed(h), h) if site == RESIDUAL else h

    return model.apply(params, tokens, edit=edit).logits


def _found(
    model: Model, params: Params, batch: PreferenceBatch, config: Config
) -> tuple[Float[Array, "b t d"], Float[Array, " b"]]:
    """The perturbation of every unsafe prompt, and how unlikely its harmful answer was without."""
    side, fixed = batch.rejected, jax.lax.stop_gradient(params)
    before = jnp.arange(side.mask.shape[1])[None] <= jnp.argmax(side.mask, axis=1)[:, None]
    width = jax.eval_shape(model.embed, fixed, side.tokens).shape[-1]

    def objective(moved: Float[Array, "b t d"]) -> Float[Array, " b"]:
        found = losses.token_logprobs(_logits(model, fixed, side.tokens, moved, config=config), side.targets)
        return -losses.sequence_logprobs(found, side.mask, reduction="mean")

    places = before & batch.unsafe[:, None]
    return perturbation(objective, places, width=width, radius=config.radius, steps=config.inner_steps)


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    moved, before = _found(model, params, batch, config)
    sides, unsafe = (batch.chosen, batch.rejected), batch.unsafe[:, None]
    both: Batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(side.replace(stem=0) for side in sides))
    logits = _logits(model, params, both.tokens, jnp.concatenate([moved, moved]), config=config)
    chosen, rejected = jnp.split(losses.token_logprobs(logits, both.targets), 2)
    right = jnp.split(losses.correct(logits, both.targets), 2)[0]
    pushed = losses.masked_sum(losses.bounded(rejected, bound=config.ascent_bound), batch.rejected.mask & unsafe)
    terms = {
        "safety": losses.nll(chosen, batch.chosen.mask & unsafe),
        "away": (config.away * pushed[0], pushed[1]),
        "utility": losses.nll(chosen, batch.chosen.mask & ~unsafe),
    }
    after = -losses.sequence_logprobs(rejected, batch.rejected.mask, reduction="mean")
    return terms, {
        "token_accuracy": losses.masked_sum(right.astype(jnp.float32), batch.chosen.mask),
        "harmful_nll/before": losses.masked_sum(before, batch.unsafe),
        "harmful_nll/after": losses.masked_sum(after, batch.unsafe),
    }


METHOD = Method(Config, totals, needs=lambda config: Needs(unsafe=True))
