"""Do the methods pull a model the same way? Cosines of their gradients at one model, on one batch."""

from itertools import combinations

import jax
import jax.numpy as jnp
import optax

from jaxsafety import keys, world
from jaxsafety.analysis import alignment
from jaxsafety.analysis.quantities import Quantities, Quantity
from jaxsafety.recipe.schema import MethodConfig, Recipe
from jaxsafety.study.probes.quantities import model_of
from jaxsafety.training import objective, stepping
from jaxsafety.types import Key, Params
from jaxsafety.world import Trial, World


def pairs(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """Returns the pairs of methods that are compared."""
    return tuple(combinations(recipe.tune.methods, 2))


def gradient_quantities(
    recipe: Recipe, world_: World, params: Params, base: Params, trials: Trial, *, key: Key
) -> Quantities:
    """Returns the cosine of every two methods' gradients at ``params``, with ``base`` as their reference.

    One batch for all methods, whatever their own mixtures are: the first safe and unsafe ones of ``[c, b]`` prompts.
    """
    count, model = recipe.analyze.gradient_prompts, model_of(recipe, world_)
    batch = world.preferences(jax.tree.map(lambda leaf: leaf[:2, :count].reshape(-1, *leaf.shape[2:]), trials))

    def gradient(method: MethodConfig) -> Params:
        own, options = method.load(), method.options
        state = objective.init_state(own, params, optax.identity(), options, key=key)
        first = keys.at_step(keys.stream(key, "method"), 0)
        prepared = objective.prepared(own, model, batch, options, reference=base, key=first)
        found = objective.make_gradient(own, model, options, key=key, total_steps=1)(state, prepared)[2]
        return stepping.only_trained(found, own.needs(options).trained)

    gradients = {name: gradient(method) for name, method in recipe.tune.methods.items()}
    cosines = [alignment.tree_cosine(gradients[one], gradients[other]) for one, other in pairs(recipe)]
    return {Quantity("alignment", "gradient_cosine", "pair"): jnp.stack(cosines)} if cosines else {}
