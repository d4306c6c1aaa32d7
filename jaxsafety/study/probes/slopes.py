"""Sensitivities of one model's answers to its prompts: gradient norms and spectral norms of Jacobians."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.analysis import sensitivity
from jaxsafety.analysis.quantities import Quantities, Quantity, averaged
from jaxsafety.recipe.schema import Recipe
from jaxsafety.study import lanes
from jaxsafety.study.probes.quantities import model_of, purpose_key
from jaxsafety.types import Key, Params
from jaxsafety.world import Trial, World
from jaxsafety.world.layout import last_prompt_index


def _without_answer(world: World, trials: Trial) -> tuple[Int[Array, "b t"], Int[Array, " b"], Bool[Array, "b t"]]:
    """Returns the prompts without their answers, where each one's last token is, and what stands before that.

    The released sensitivities are taken over the embeddings before the last prompt token. What comes after it cannot
    matter to a causal model, and would be half of the work.
    """
    tokens = trials.complied.tokens[:, : last_prompt_index(world.spec.max_text) + 1]
    at = last_prompt_index(trials.prompt.length)
    return tokens, at, jnp.arange(tokens.shape[1])[None, :] < at[:, None]


def gradient_norms(recipe: Recipe, world: World, params: Params, trials: Trial) -> Float[Array, "c b"]:
    """Returns the gradient norm of the top logit at the first response position, for ``[c, b]`` prompts."""
    model = model_of(recipe, world)
    forward = partial(lanes.forward_of(model), params)

    def condition(trial: Trial) -> Float[Array, " b"]:
        tokens, at, prompt = _without_answer(world, trial)
        embeddings = model.embed(params, tokens)
        return sensitivity.gradient_norm(forward, embeddings, position=at, prompt=prompt)

    return jax.lax.map(condition, trials)


def sensitivity_quantities(
    recipe: Recipe, world: World, params: Params, trials: Trial, subsets: Bool[Array, "c 2 b"], *, key: Key
) -> Quantities:
    """Returns gradient norms and Jacobian norms per condition.

    Args:
        recipe: the study.
        world: its world.
        params: the model.
        trials: ``[c, b]`` prompts of the gradient norms; the first few safe and unsafe ones have their Jacobian norms
            taken.
        subsets: ``[c, 2, b]`` see ``features.Verdicts``.
        key: the seed's root key.
    """
    norms = gradient_norms(recipe, world, params, trials)
    model, count = model_of(recipe, world), recipe.analyze.jacobian_prompts
    forward = partial(lanes.forward_of(model), params)

    def jacobian(trial: Trial) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
        tokens, at, prompt = _without_answer(world, trial)
        embeddings = model.embed(params, tokens)
        found = sensitivity.jacobian_norm(
            forward, embeddings, position=at, prompt=prompt, key=purpose_key(key, "jacobian")
        )
        return found.value, found.converged

    classes = jax.tree.map(lambda leaf: leaf[:2, :count], trials)
    spectral, converged = jax.lax.map(jacobian, classes)
    kept = jnp.where(subsets, norms[:, None], jnp.nan)
    return {
        Quantity("sensitivity", "gradient_norm", "condition subset"): averaged(norms[:, None], subsets),
        Quantity("sensitivity", "gradient_norm_median", "condition subset"): jnp.nanmedian(kept, axis=-1),
        Quantity("sensitivity", "gradient_norm_log", "condition subset"): averaged(jnp.log10(norms)[:, None], subsets),
        Quantity("sensitivity", "jacobian_norm", "class"): averaged(spectral, subsets[:2, 0, :count]),
        Quantity("sensitivity", "jacobian_converged", "class"): jnp.mean(converged, axis=1),
        # Per prompt, for the histograms.
        Quantity("sensitivity", "prompt_norms", "condition prompt"): jnp.where(subsets[:, 0], norms, jnp.nan),
    }
