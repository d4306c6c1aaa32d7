"""Where an update lies: in the base's output space, and beside another method's update."""

import jax.numpy as jnp

from jaxsafety import tree
from jaxsafety.analysis import alignment, update_spaces
from jaxsafety.analysis.quantities import MATRICES, Quantities, Quantity
from jaxsafety.linalg import subspace, svd
from jaxsafety.recipe.schema import Recipe
from jaxsafety.study.probes.quantities import purpose_key
from jaxsafety.types import Key, Params

# Random directions that the sampled baseline is the mean of.
_SAMPLES = 256


def output_quantities(recipe: Recipe, params: Params, base: Params, *, key: Key) -> Quantities:
    """Returns the share of the update's output directions in the null space of the base, beside its baselines."""
    per_matrix = [
        _output_of(recipe, *(side["blocks"]["mlp"][name] for side in (params, base)), key=key) for name in MATRICES
    ]
    return {
        Quantity("output_space", metric, f"matrix {axes}"): values
        for (metric, axes), values in tree.stack(per_matrix).items()
    }


def _output_of(recipe, after, before, *, key):
    energy, delta = recipe.analyze.energy, after - before
    space = update_spaces.output_space(before, delta, energy=energy)
    values = svd.decompose(delta).values
    base = svd.decompose(before)
    mask = subspace.leading(space.rank_base, base.values.shape[-1])
    drawn = subspace.sample_random_energy(base.outputs, key=purpose_key(key, "baseline"), samples=_SAMPLES, mask=mask)
    mean = jnp.nanmean(space.null_norm, axis=-1)
    count = min(recipe.analyze.directions, *before.shape[1:])
    per_layer = {
        "null_norm_mean": mean,
        "null_energy": space.null_energy,
        "total_null_energy": space.total_null_energy,
        "baseline_norm": space.baseline_norm,
        "baseline_energy": space.baseline_energy,
        "baseline_sampled": jnp.mean(jnp.sqrt(jnp.maximum(1 - drawn, 0.0)), axis=-1),
        "excess": mean - space.baseline_norm,
        "excess_energy": space.null_energy - space.baseline_energy,
        "rank_base": space.rank_base.astype(jnp.float32),
        "rank_delta": space.rank_delta.astype(jnp.float32),
        "stable_rank": subspace.stable_rank(values),
        "effective_rank": subspace.effective_rank(values),
        "changed_norm": update_spaces.changed_norm(before, delta),
        "error": space.errors,
    }
    named = {(metric, "layer"): quantity for metric, quantity in per_layer.items()}
    return named | {("null_norm", "layer direction"): space.null_norm[:, :count]}


def alignment_quantities(recipe: Recipe, one: Params, other: Params, base: Params) -> Quantities:
    """Returns how two updates of the same base are aligned: cosines, and angles of their leading spaces."""
    rank = min(recipe.analyze.directions, *base["blocks"]["mlp"]["up"].shape[1:]) // 2 or 1
    found = alignment.align(tree.difference(one, base), tree.difference(other, base), rank=rank)
    overlaps = {
        side: {path: alignment.overlap(angles) for path, angles in by_path.items()}
        for side, by_path in (("input", found.input_angles), ("output", found.output_angles))
    }
    per_matrix = {
        "matrix_cosine": found.matrix_cosine,
        "input_overlap": overlaps["input"],
        "output_overlap": overlaps["output"],
        "input_chance": found.input_chance,
        "output_chance": found.output_chance,
    }
    return {Quantity("alignment", "cosine"): found.cosine} | {
        Quantity("alignment", metric, "matrix layer"): jnp.stack([by_path[f"blocks/mlp/{name}"] for name in MATRICES])
        for metric, by_path in per_matrix.items()
    }
