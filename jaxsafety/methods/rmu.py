"""Representation misdirection for unlearning (RMU): states of harmful answers are pushed along one random direction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jaxsafety import losses
from jaxsafety.config.fields import check, static, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.training import hidden
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, Terms

# Layers whose matrices are trained, the one that is misdirected the last of them.
_TRAINED = 3


@checked
def rmu(
    harmful: Float[Array, "b t d"], safe: Float[Array, "b t d"], kept: Float[Array, "b t d"], *,
    goal: Float[Array, " d"], on_harmful: Bool[Array, "b t"], on_safe: Bool[Array, "b t"],
    alpha: float | Float[Array, ""],
) -> Terms:  # fmt: skip
    """Returns ``|harmful - goal|^2`` and ``alpha`` x ``|safe - kept|^2``, each a sum over its tokens and their number.

    ``harmful`` and ``safe`` are states of one layer, ``kept`` are those that the model before had in the place of
    ``safe``; ``on_harmful`` and ``on_safe`` say which tokens count, and ``goal`` is where harmful ones are to go.

    References:
        Li et al. 2024 (arXiv 2403.03218), the forget and the retain loss.

    Example:
        >>> import jax.numpy as jnp
        >>> h, all_of_them = jnp.ones((1, 2, 3)), jnp.ones((1, 2), bool)
        >>> terms = rmu(h, h, 2 * h, goal=jnp.zeros(3), on_harmful=all_of_them, on_safe=all_of_them, alpha=10.0)
        >>> print({name: (float(total), float(count)) for name, (total, count) in terms.items()})
        {'forget': (6.0, 2.0), 'retain': (60.0, 2.0)}
    """
    moved = _squared(harmful - goal[None, None], on_harmful), _squared(safe - kept, on_safe)
    forget, retain = (losses.masked_sum(*one) for one in zip(moved, (on_harmful, on_safe), strict=True))
    return {"forget": forget, "retain": (alpha * retain[0], retain[1])}


def _squared(difference: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    return jnp.sum(jnp.where(mask[..., None], difference, 0.0) ** 2, axis=-1)


@dataclass(frozen=True)
class Config:
    """Mean squared distance of tokens of harmful answers from a point far out, and of safe ones from where they were.

    Only the MLPs' ``down`` matrices of the layer and of the two before it are trained, or an adapter's factors of them;
    all else stays, bit for bit.

    Attributes:
        layer: share in (0, 1] of the depth that the layer ends: 1/4 is layer 7 of 32, counted from 0.
        coefficient: how far out the point lies, along a direction that a lane draws once.
        alpha: weight of the safe answers.

    References:
        Li et al. 2024 (arXiv 2403.03218).

    Fidelity: to the paper, whose layer, coefficient and weight for a model of 7 billion parameters are the defaults; in
        the tiny world these change little, and 2/3, 6.5 and 10 most of what is complied with.
        Harmful and safe texts are answers to unsafe and safe prompts, of which the answers' own tokens count: what
        refusals share with them, the prompts, is left alone. The direction is uniform over all, where theirs has
        entries above zero alone; distances are sums over the width, where their code has means, which the two weights
        share. A reference over a checkpoint keeps as many numbers of every token as the model is wide, and all examples
        are in memory: what does not fit is refused, and a dry run tells it.
    """

    layer: float = static(0.25, above=0, at_most=1)
    coefficient: float = traced(6.5, at_least=0)
    alpha: float = traced(1200.0, at_least=0)
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: UInt32[Array, " words"], *, key: Key,
    progress: Array,
) -> tuple[Terms, Terms]:  # fmt: skip
    """See :class:`jaxsafety.types.Method`."""
    sides, unsafe = (batch.chosen, batch.rejected), batch.unsafe[:, None]
    safe, harmful = (found[:, 0] for found in hidden.states(model, params, *sides, shares=(config.layer,)))
    goal = config.coefficient * hidden.direction(aux, width=safe.shape[-1])
    on_safe, on_harmful = (hidden.answered(side.mask) for side in sides)
    masks = {"on_harmful": on_harmful & unsafe, "on_safe": on_safe & ~unsafe}
    return rmu(harmful, safe, batch.reference, goal=goal, alpha=config.alpha, **masks), {}


def reference(model: Model, params: Params, batch: PreferenceBatch, config: Config) -> Float[Array, "b t d"]:
    """Returns the states of the preferred answers in the model that tuning began with."""
    return hidden.states(model, params, batch.chosen, shares=(config.layer,))[0][:, 0]


def trained_layers(depth: int, *, share: float) -> range:
    """Returns the layer at a share of the depth and the two before it, as far as there are."""
    last = hidden.layer_at(share, depth=depth)
    return range(max(0, last + 1 - _TRAINED), last + 1)


METHOD = Method(
    Config,
    totals,
    needs=lambda config: Needs(
        trained="blocks/mlp/down", layers=partial(trained_layers, share=config.layer), unsafe=True
    ),
    reference=reference,
    init_aux=hidden.direction_words,
)
