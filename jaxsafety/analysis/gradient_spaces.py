"""Does the update go where prompts push? Its lie to the gradients of the wanted answers, before tuning.

A gradient is of the mean log-likelihood, per scored token, of refusals: of those of unsafe prompts, which tuning wants,
and of those of safe prompts, which it does not: the same answer to another kind of prompt. Beside the cosine stand the
shares of the update's energy in the gradient's leading input and output directions (:mod:`jaxsafety.linalg.kept`), and
what random ones hold. Tuning begins along such a gradient, so that more than chance is expected of any training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafety import losses
from jaxsafety.analysis import kept_energy
from jaxsafety.analysis.kept_energy import SHARES
from jaxsafety.config.fields import check, static
from jaxsafety.linalg import subspace, svd
from jaxsafety.linalg.directions import INPUTS
from jaxsafety.linalg.update_spaces import Method
from jaxsafety.types import Analysis, Batch, Coordinate, Key, Measured, Model, Params, Section, View

SIDES = {"reads": "inputs", "writes": "outputs"}
# Whose refusals become likelier, in the order of held-out prompts.
PUSHED = ("safe", "unsafe")


@dataclass(frozen=True)
class Config:
    """Of how many prompts, and how directions are found.

    Attributes:
        prompts: held-out prompts of either kind that a gradient is of, at most as many as there are.
        method: of the decompositions; ``gram`` is faster, and refuses directions that it does not resolve.
    """

    prompts: int = static(64, at_least=1)
    method: Method = "full"
    __post_init__ = check


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns cosines in [-1, 1] of the update and the gradients by matrix and layer, and the shares of the update's
    energy in their first directions, for :data:`SHARES` of that side's dimensions.

    The gradients are of the model before tuning, on held-out prompts. They have as many directions as the smaller side:
    of the larger one's dimensions no further share is there (NaN).
    """
    gradients = {
        pushed: _gradient(
            view.model,
            view.base,
            jax.tree.map(lambda leaf, row=row: leaf[row, : config.prompts], view.held_out.refused),
        )
        for row, pushed in enumerate(PUSHED)
    }
    cosines, shares, chance = [], [], []
    for name in INPUTS:
        delta = view.params["blocks"]["mlp"][name] - view.base["blocks"]["mlp"][name]
        for pushed in PUSHED:
            own = gradients[pushed][name]
            cosines.append(subspace.cosine(delta, own))
            found = svd.decompose(own, method=config.method)
            for side, basis in zip(SIDES.values(), (found.inputs, found.outputs), strict=True):
                own_shares, expected = kept_energy.by_share(delta, basis, side=side)
                shares.append(own_shares)
                chance.append(expected)
    return {
        ("cosine", "gradient layer"): jnp.stack(cosines),
        ("kept_mean", "space share"): jnp.mean(jnp.stack(shares), axis=1),
        ("chance", "space share"): jnp.asarray(chance),
    }


def _gradient(model: Model, params: Params, batch: Batch) -> dict[str, Float[Array, "l m n"]]:
    """The gradient of the mean log-likelihood by the MLP's matrices: the way that an answer becomes likelier."""

    def likelihood(matrices: dict[str, Array]) -> Array:
        mlp = params["blocks"]["mlp"] | matrices
        own = params | {"blocks": params["blocks"] | {"mlp": mlp}}
        logits = model.apply(own, batch.tokens).logits
        total, count = losses.nll(losses.token_logprobs(logits, batch.targets), batch.mask)
        return -total / count

    return jax.grad(likelihood)({name: params["blocks"]["mlp"][name] for name in INPUTS})


def draw(table: Any, plot: Any) -> Any:
    """The update's energy against the share of a gradient's directions: a column per matrix, a row per side."""
    spaces = {f"{pushed}:{side}": f"{side}, {pushed}" for pushed in PUSHED for side in SIDES}
    return kept_energy.panels(table, plot, analysis="gradient_spaces", spaces=spaces, of="gradients")


SECTION = Section(
    "Does the update go where prompts push?",
    "beyond the paper",
    "The share of the update's energy in the leading input and output directions of the gradient, before tuning, by "
    "which refusals of safe and of unsafe prompts become likelier, mean over layers; on the dotted line it is what a "
    "random space as large holds.",
    draw,
    claims=("reads_gradient", "writes_gradient", "gradient_unsafe_beyond_safe", "follows_gradient"),
)
# It looks at no site, but a subject without text, and so without those, has no such gradients.
ANALYSIS = Analysis(
    Config, measure, about="update", reads=tuple(INPUTS.values()), section=SECTION,
    axes=lambda config: {
        "gradient": Coordinate("part", tuple(f"{matrix}:{pushed}" for matrix in INPUTS for pushed in PUSHED)),
        "space": Coordinate(
            "part", tuple(f"{matrix}:{pushed}:{side}" for matrix in INPUTS for pushed in PUSHED for side in SIDES)
        ),
        "share": Coordinate("strength", SHARES),
    },
)  # fmt: skip
