"""Do the methods pull a model the same way? Cosines of their gradients at one model, on one batch."""

from itertools import combinations

import jax
import jax.numpy as jnp

from jaxsafety import world
from jaxsafety.analysis import alignment
from jaxsafety.analysis.quantities import Quantities, Quantity
from jaxsafety.recipe.schema import Recipe
from jaxsafety.study import lanes
from jaxsafety.study.probes.quantities import model_of
from jaxsafety.types import HParams, Params
from jaxsafety.world import Trial, World


def pairs(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """Returns the pairs of methods that are compared."""
    return tuple(combinations(recipe.tune.methods, 2))


def gradient_quantities(recipe: Recipe, world_: World, params: Params, base: Params, trials: Trial) -> Quantities:
    """Returns the cosine of every two methods' gradients at ``params``, with ``base`` as DPO's reference.

    One batch for all methods, whatever their own mixtures are: the first safe and unsafe ones of ``[c, b]`` prompts.
    """
    count = recipe.analyze.gradient_prompts
    batch = world.preferences(jax.tree.map(lambda leaf: leaf[:2, :count].reshape(-1, *leaf.shape[2:]), trials))
    forward = lanes.forward_of(model_of(recipe, world_))
    gradients = {}
    for name, method in recipe.tune.methods.items():
        point = HParams(
            peak_lr=1.0, weight_chosen=method.weight_chosen, weight_rejected=method.weight_rejected,
            p_unsafe=method.p_unsafe, ascent_bound=method.ascent_bound,
        )  # fmt: skip
        loss = lanes.objective(forward, method, reference=base, point=point)
        gradients[name] = jax.grad(lambda p, loss=loss: loss(p, batch)[0])(params)
    cosines = [alignment.tree_cosine(gradients[one], gradients[other]) for one, other in pairs(recipe)]
    return {Quantity("alignment", "gradient_cosine", "pair"): jnp.stack(cosines)} if cosines else {}
