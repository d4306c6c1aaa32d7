"""Sensitivities of one model's answers to its prompts: gradient norms and spectral norms of Jacobians."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import keys
from jaxsafety.analysis import sensitivity
from jaxsafety.models import gpt
from jaxsafety.probes.quantities import Quantities, Quantity, averaged, model_of
from jaxsafety.recipe import Recipe
from jaxsafety.types import Key, Params
from jaxsafety.world import Trial, World
from jaxsafety.world.layout import last_prompt_index


def before_last(trials: Trial) -> Bool[Array, "b t"]:
    """Marks the prompt's positions before its last token, which the released sensitivities are taken over."""
    index = jnp.arange(trials.complied.tokens.shape[1])
    return index[None, :] < last_prompt_index(trials.prompt.length)[:, None]


def gradient_norms(recipe: Recipe, world: World, params: Params, trials: Trial) -> Float[Array, "c b"]:
    """Returns the gradient norm of the top logit at the first response position, for ``[c, b]`` prompts."""
    config = model_of(recipe, world)
    forward = partial(gpt.forward_embeddings, params, config=config)

    def condition(trial: Trial) -> Float[Array, " b"]:
        embeddings = gpt.embed(params, trial.complied.tokens, config=config)
        at = last_prompt_index(trial.prompt.length)
        return sensitivity.gradient_norm(forward, embeddings, position=at, prompt=before_last(trial))

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
    config, count = model_of(recipe, world), recipe.analyze.jacobian_prompts
    forward = partial(gpt.forward_embeddings, params, config=config)

    def jacobian(trial: Trial) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
        embeddings = gpt.embed(params, trial.complied.tokens, config=config)
        found = sensitivity.jacobian_norm(
            forward, embeddings, position=last_prompt_index(trial.prompt.length), prompt=before_last(trial),
            key=keys.stream(key, "analysis"),
        )  # fmt: skip
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
