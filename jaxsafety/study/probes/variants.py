"""Interventions: models made of the base and parts or multiples of an update, and what they still do.

Which intervention is a branch index and how strong a number, both traced: one compiled program runs them all.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety import tree
from jaxsafety.analysis import clusters
from jaxsafety.analysis.quantities import Quantities, Quantity, averaged
from jaxsafety.edits import interventions
from jaxsafety.recipe.schema import Recipe
from jaxsafety.study.probes.features import (
    Prompts,
    class_centroids,
    features,
    first_prompts,
    verdict_quantities,
    verdicts,
)
from jaxsafety.study.probes.quantities import purpose_key
from jaxsafety.study.probes.slopes import gradient_norms
from jaxsafety.types import Key, Params
from jaxsafety.world import World


class Intervention(NamedTuple):
    """One point of the interventions' grid.

    Attributes:
        part: what is kept of the update; see :func:`_branches`.
        strength: its multiple alpha, or the rank, or the layer.
    """

    part: str
    strength: float


def grid(recipe: Recipe, *, layers: int) -> tuple[Intervention, ...]:
    """Returns the interventions on one model, without transfers: multiples of its parts, then the causal tests."""
    scaled = [
        Intervention(part, alpha)
        for part in ("whole", "mlp", "up", "down")
        for alpha in recipe.analyze.alphas
        # Nothing of any part is the base, and one whole update the tuned model.
        if alpha or part == "whole"
    ]
    return (
        *scaled,
        Intervention("attention", 1.0),
        Intervention("mlp_matrices", 1.0),
        *(
            Intervention(f"{keep}_{space}", 1.0)
            for space in ("null", "range", "random")
            for keep in ("only", "all_but")
        ),
        *(Intervention("rank", float(rank)) for rank in recipe.analyze.ranks),
        *(Intervention("layer", float(layer)) for layer in range(layers)),
    )


def along_training(recipe: Recipe) -> tuple[Intervention, ...]:
    """Returns the few interventions that every snapshot is put through: beyond it, and its null-space part."""
    beyond = max(recipe.analyze.alphas)
    return (Intervention("whole", beyond), Intervention("only_null", 1.0), Intervention("all_but_null", 1.0))


def transfers(recipe: Recipe) -> tuple[Intervention, ...]:
    """Returns the interventions that add another model's update to a tuned model."""
    return tuple(Intervention("transfer", alpha) for alpha in recipe.analyze.alphas if alpha in (0.5, 1.0)) or (
        Intervention("transfer", 1.0),
    )


def parts(recipe: Recipe, *, layers: int) -> tuple[str, ...]:
    """Returns the parts in the order of their branch indices."""
    return tuple(dict.fromkeys(point.part for point in (*grid(recipe, layers=layers), *transfers(recipe))))


def intervened(
    recipe: Recipe, tuned: Params, other: Params, base: Params, *, branch: Int[Array, ""], strength: Float[Array, ""],
    key: Key,
) -> Params:  # fmt: skip
    """Builds one intervention on a model.

    Args:
        recipe: the study.
        tuned: the model whose update is taken apart.
        other: the model whose update is transferred.
        base: what both were tuned from.
        branch: index into :func:`parts`.
        strength: alpha, rank or layer.
        key: the seed's root key; draws the random subspace of the control.
    """
    delta = tree.difference(tuned, base)
    builders = _branches(recipe, tuned, delta, tree.difference(other, base), base, strength, key)
    layers = base["blocks"]["mlp"]["up"].shape[0]
    chosen = [builders[name] for name in parts(recipe, layers=layers)]
    return jax.lax.switch(branch, chosen)


def _branches(
    recipe: Recipe, tuned: Params, delta: Params, other: Params, base: Params, strength: Float[Array, ""], key: Key
) -> dict[str, Callable[[], Params]]:
    energy, draw = recipe.analyze.energy, purpose_key(key, "subspaces")

    def added(part: Callable[[], Params]) -> Callable[[], Params]:
        return lambda: tree.interpolate(base, part(), 1.0)

    named: dict[str, Callable[[], Params]] = {
        part: partial(interventions.scaled, base, delta, alpha=strength, part=part)
        for part in get_args(interventions.Part)
    }
    for keep in get_args(interventions.Keep):
        named[f"{keep}_null"] = added(partial(interventions.null_part, base, delta, energy=energy, keep=keep))
        named[f"{keep}_range"] = added(partial(interventions.range_part, base, delta, energy=energy, keep=keep))
        named[f"{keep}_random"] = added(
            partial(interventions.random_part, base, delta, energy=energy, keep=keep, key=draw)
        )
    named["mlp_matrices"] = added(partial(interventions.tree_part, delta, tree.MLP_MATRICES))
    named["rank"] = added(partial(interventions.rank_part, delta, rank=strength.astype(jnp.int32)))
    named["layer"] = added(partial(interventions.layer_part, delta, layer=strength.astype(jnp.int32)))
    named["transfer"] = partial(interventions.transferred, tuned, other, alpha=strength)
    return named


def variant_quantities(recipe: Recipe, world: World, params: Params, prompts: Prompts) -> Quantities:
    """Returns verdicts, cluster positions and gradient norms on ``analyze.intervention_prompts`` prompts."""
    few = first_prompts(prompts, recipe.analyze.intervention_prompts)
    seen = features(recipe, world, params, few.trials)
    found = verdicts(recipe, world, params, few.trials, seen.predicted)
    centroids = class_centroids(features(recipe, world, params, few.held_out), few.held_out, vector="last")
    everyone = found.subsets[:, 0]
    rows = seen.last.swapaxes(0, 1)
    relative = jax.vmap(lambda row: clusters.relative_tau(row, centroids))(rows)
    taus = [clusters.tau(row, centroids) for row in rows[:2]]
    apart = clusters.separation(*taus, centroids=centroids, safe_weights=everyone[0], unsafe_weights=everyone[1])
    classes = jax.tree.map(lambda leaf: leaf[:2], few.trials)
    norms = gradient_norms(recipe, world, params, classes)
    judged = {key._replace(analysis="interventions"): value for key, value in verdict_quantities(found).items()}
    return judged | {
        Quantity("interventions", "relative_tau", "condition layer"): averaged(relative, everyone[:, None]),
        Quantity("interventions", "effect_size", "layer"): apart.effect_size,
        Quantity("interventions", "relative_gap", "layer"): apart.relative_gap,
        Quantity("interventions", "gradient_norm", "class"): averaged(norms, everyone[:2]),
    }
