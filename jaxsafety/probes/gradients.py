"""Do the methods pull a model the same way? Cosines of their gradients at one model, on one batch."""

from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp

from jaxsafety import lanes, world
from jaxsafety.analysis import alignment
from jaxsafety.models import gpt
from jaxsafety.probes.quantities import Quantities, Quantity, model_of, purpose_key
from jaxsafety.recipe import Recipe
from jaxsafety.types import HParams, Key, Params
from jaxsafety.world import World

# Half of the pairs are about unsafe prompts, whatever the methods' own mixtures are: one batch for all of them.
_P_UNSAFE = 0.5


def pairs(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """Returns the pairs of methods that are compared."""
    return tuple(combinations(recipe.tune.methods, 2))


def gradient_quantities(recipe: Recipe, world_: World, params: Params, base: Params, *, key: Key) -> Quantities:
    """Returns the cosine of every two methods' gradients at ``params``, with ``base`` as DPO's reference."""
    batch = world.tune_batch_at(
        world_, key=purpose_key(key, "gradients"), step=0, batch_size=recipe.analyze.gradient_prompts,
        p_unsafe=_P_UNSAFE, mix="prompt",
    )  # fmt: skip
    forward = partial(gpt.forward, config=model_of(recipe, world_))
    gradients = {}
    for name, method in recipe.tune.methods.items():
        point = HParams(
            peak_lr=1.0, weight_chosen=method.weight_chosen, weight_rejected=method.weight_rejected,
            p_unsafe=_P_UNSAFE, ascent_bound=method.ascent_bound,
        )  # fmt: skip
        loss = lanes.objective(forward, method, reference=base, point=point)
        gradients[name] = jax.grad(lambda p, loss=loss: loss(p, batch)[0])(params)
    cosines = [alignment.tree_cosine(gradients[one], gradients[other]) for one, other in pairs(recipe)]
    return {Quantity("alignment", "gradient_cosine", "pair"): jnp.stack(cosines)} if cosines else {}
