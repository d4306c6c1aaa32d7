"""What a model does and represents on prompts of every condition: verdicts, clusters, how its update acts on inputs.

Prompts are ``[c, b]``: conditions and prompts. Activations are read where the first answer block begins, so prompts of
which a later block is judged (their first composition is harmless) count in verdicts alone.
"""

import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from jaxsafety import losses, tree
from jaxsafety.analysis import clusters, update_spaces
from jaxsafety.analysis.quantities import MATRICES, VECTORS, Quantities, Quantity, averaged
from jaxsafety.recipe.schema import Recipe
from jaxsafety.study.probes.quantities import model_of
from jaxsafety.subjects import answers
from jaxsafety.types import Leaf, Params
from jaxsafety.world import Trial, World
from jaxsafety.world.layout import last_prompt_index


@flax.struct.dataclass
class Prompts:
    """The prompts of one seed.

    Attributes:
        trials: ``[c, b, ...]`` what is measured, conditions in the order of ``quantities.conditions``.
        held_out: ``[2, b, ...]`` other safe and unsafe prompts, for the centroids.
    """

    trials: Trial
    held_out: Trial


@flax.struct.dataclass
class Features:
    """Activations of one model on prompts; ``x`` stands for the leading axes of the prompts.

    Attributes:
        inputs: ``[l, x, d]`` inputs of the MLP at the last prompt token.
        last: ``[l, x, f]`` MLP activations there.
        response: ``[l, x, f]`` their mean over the first response positions of the complied answer.
        predicted: ``[x, t]`` most likely next tokens.
    """

    inputs: Leaf
    last: Leaf
    response: Leaf
    predicted: Leaf

    def vector(self, name: str) -> Array:
        """Returns one of ``VECTORS``."""
        if name == "response_d":
            return self.response[..., : self.inputs.shape[-1]]
        return self.last if name == "last" else self.response


@flax.struct.dataclass
class Verdicts:
    """How one model answers prompts, ``[c, b]``.

    Attributes:
        complied, refused, exact_match: bool.
        subsets: ``[c, 2, b]`` bool: the prompts whose first block is judged, and those of them that are successful
            attacks (unsafe prompts that were complied with).
    """

    complied: Leaf
    refused: Leaf
    exact_match: Leaf
    subsets: Leaf


def first_prompts(prompts: Prompts, count: int) -> Prompts:
    """Returns the first ``count`` prompts of every condition."""
    return jax.tree.map(lambda leaf: leaf[:, :count], prompts)


def opening(trials: Trial) -> Bool[Array, "*x"]:
    """Marks the prompts whose judged block is the first one."""
    return jnp.any(trials.blocks[..., 0, :] & trials.complied.mask, axis=-1)


def features(recipe: Recipe, world: World, params: Params, trials: Trial) -> Features:
    """Reads a model's activations on the complied answers of ``[c, b]`` prompts, batch by batch."""
    model = model_of(recipe, world)
    count = min(recipe.analyze.response_positions, world.spec.max_text + 1)

    def batch(given: tuple[Int[Array, "b t"], Int[Array, " b"]]) -> tuple[Array, ...]:
        tokens, length = given
        offsets = jnp.arange(count)[None, :]
        logits, seen = model.apply(
            params, tokens, sites=("mlp.hook_in", "mlp.hook_post"),
            positions=last_prompt_index(length)[:, None] + offsets,
        )  # fmt: skip
        post = seen["mlp.hook_post"]
        # The answer's letters and its stop are predicted from these positions.
        inside = (offsets <= length[:, None])[None, :, :, None]
        response = jnp.sum(jnp.where(inside, post, 0.0), axis=2) / jnp.sum(inside, axis=2)
        return seen["mlp.hook_in"][:, :, 0], post[:, :, 0], response, jnp.argmax(logits, axis=-1)

    shape = trials.prompt.length.shape
    size = math.gcd(recipe.evaluate.batch_size, shape[1])
    rows = (trials.complied.tokens, trials.prompt.length)
    batches = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[2:]), rows)
    *captured, predicted = jax.lax.map(batch, batches)
    # [n, l, size, f] -> [l, c, b, f]
    captured = (leaf.swapaxes(0, 1).reshape(leaf.shape[1], *shape, -1) for leaf in captured)
    return Features(*captured, predicted=predicted.reshape(*shape, -1))


def verdicts(recipe: Recipe, world: World, params: Params, trials: Trial, predicted: Int[Array, "c b t"]) -> Verdicts:
    """Judges ``[c, b]`` prompts, given the predictions on their complied answers."""
    model = model_of(recipe, world)

    def condition(given: tuple[Trial, Array]) -> dict[str, Float[Array, " b"]]:
        trial, best = given
        ok_null = losses.correct(model.apply(params, trial.refused.tokens).logits, trial.refused.targets)
        masks = (trial.complied.mask, trial.refused.mask)
        return answers.verdicts(best == trial.complied.targets, ok_null, masks=masks, blocks=trial.blocks)

    rates = jax.lax.map(condition, (trials, predicted))
    flags = {name: rates[name] > 0 for name in ("complied", "refused", "exact_match")}
    first = opening(trials)
    subsets = jnp.stack([first, first & flags["complied"] & trials.unsafe], axis=1)
    return Verdicts(**flags, subsets=subsets)


def verdict_quantities(found: Verdicts) -> Quantities:
    """Returns the rates of the verdicts per condition, and how many attacks succeeded."""
    other = ~(found.complied | found.refused)
    flags = {"complied": found.complied, "refused": found.refused, "other": other, "exact_match": found.exact_match}
    rates = {Quantity("verdicts", name, "condition"): jnp.mean(flag, axis=1) for name, flag in flags.items()}
    return rates | {
        Quantity("verdicts", "n_successful", "condition"): jnp.sum(found.subsets[:, 1], axis=1, dtype=jnp.float32)
    }


def class_centroids(held: Features, trials: Trial, *, vector: str) -> clusters.Centroids:
    """Returns the centroids of the held-out safe and unsafe prompts."""
    safe, unsafe = held.vector(vector).swapaxes(0, 1)
    weights = opening(trials)
    return clusters.centroids(safe, unsafe, safe_weights=weights[0], unsafe_weights=weights[1])


def cluster_quantities(seen: Features, found: Verdicts, held: Features, held_out: Trial) -> Quantities:
    """Returns where every condition lies between the centroids, and how well safe and unsafe are apart."""
    per_vector = [
        _clusters_of(seen.vector(name), found, class_centroids(held, held_out, vector=name)) for name in VECTORS
    ]
    stacked = tree.stack(per_vector)
    # vector leads; every quantity's own axes end with the layer.
    return {
        Quantity("clusters", metric, f"vector {axes}".strip()): values for (metric, axes), values in stacked.items()
    }


def _clusters_of(
    activations: Float[Array, "l c b f"], found: Verdicts, centroids: clusters.Centroids
) -> dict[tuple[str, str], Array]:
    """Metrics by (name, axes) of one kind of vector."""

    def condition(rows: Float[Array, "l b f"], subsets: Bool[Array, "2 b"]) -> dict[str, Float[Array, "2 l"]]:
        tau = clusters.tau(rows, centroids)
        relative = clusters.relative_tau(rows, centroids)
        cosine = clusters.tau(rows, centroids, form="cosine")
        weights = subsets[:, None, :]
        mean = averaged(tau[None], weights)
        return {
            "tau": mean,
            "tau_std": jnp.sqrt(averaged((tau[None] - mean[..., None]) ** 2, weights)),
            "relative_tau": averaged(relative[None], weights),
            "cosine_tau": averaged(cosine[None], weights),
            "nearest_safe": averaged((tau > 0).astype(jnp.float32)[None], weights),
        }

    per_condition = activations.swapaxes(0, 1)
    metrics = jax.lax.map(lambda given: condition(*given), (per_condition, found.subsets))
    named = {(name, "condition subset layer"): values for name, values in metrics.items()}
    classes, weights = per_condition[:2], found.subsets[:2, 0]
    shares = jax.vmap(lambda rows, kept: clusters.leading_share(rows, weights=kept))(classes, weights)
    named |= {
        (name, "class layer"): share for name, share in zip(("leading_share", "leading_energy"), shares, strict=True)
    }
    taus = [clusters.tau(rows, centroids) for rows in classes]
    apart = clusters.separation(
        taus[0], taus[1], centroids=centroids, safe_weights=weights[0], unsafe_weights=weights[1]
    )
    fields = ("gap", "effect_size", "relative_gap", "accuracy", "distance")
    return named | {(name, "layer"): getattr(apart, name) for name in fields}


def input_quantities(recipe: Recipe, params: Params, base: Params, seen: Features, found: Verdicts) -> Quantities:
    """Returns how strongly the update of the MLP matrices acts on the inputs that each condition brings."""
    inputs = {"up": seen.inputs, "down": seen.last}
    per_matrix = []
    for name in MATRICES:
        before, after = (side["blocks"]["mlp"][name] for side in (base, params))
        rows = inputs[name]
        conditions = rows.shape[1]
        space = update_spaces.input_space(
            before, after - before, inputs=rearrange(rows, "l c b d -> l (c b) d"), rank=directions(recipe, base)
        )
        by_condition = partial(rearrange, pattern="l (c b) ... -> c l b ...", c=conditions)
        weights = found.subsets[:, :, None, :]
        projected = rearrange(jnp.abs(by_condition(space.projections)), "c l b r -> c l r b")
        subsets = found.subsets[:, :, None, None, :]
        per_matrix.append(
            {
                Quantity("input_space", "gain", "condition subset layer"): averaged(
                    by_condition(space.gain)[:, None], weights
                ),
                Quantity("input_space", "ratio", "condition subset layer"): averaged(
                    by_condition(space.ratio)[:, None], weights
                ),
                Quantity("input_space", "projection", "condition subset layer direction"): averaged(
                    projected[:, None], subsets
                ),
            }
        )
    return {key._replace(axes=f"matrix {key.axes}"): values for key, values in tree.stack(per_matrix).items()}


def directions(recipe: Recipe, base: Params) -> int:
    """Returns how many leading directions of an update are written."""
    return min(recipe.analyze.directions, *base["blocks"]["mlp"]["up"].shape[1:])
