"""What the analyses look at: one model of one lane on its seed's prompts, as :class:`jaxsafety.types.View`.

Activations are read where the first answer block begins, so prompts of which a later block is judged (their first
composition is harmless) count in verdicts alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxsafety import keys, world
from jaxsafety.linalg import clusters
from jaxsafety.recipe.models import Training
from jaxsafety.recipe.schema import Recipe
from jaxsafety.subjects import judge
from jaxsafety.training import objective, stepping
from jaxsafety.types import Batch, Key, Leaf, Model, Opened, Params, Seen, Text, Trial, Verdicts, View


@flax.struct.dataclass
class Prompts:
    """The prompts of one seed: ``[c, b, ...]`` what is measured, conditions in the order of ``Recipe.conditions``, and
    ``[2, b, ...]`` other safe and unsafe ones, for the means of clusters."""

    trials: Leaf
    held_out: Leaf


def first_prompts(prompts: Prompts, count: int) -> Prompts:
    """Returns the first ``count`` prompts of every condition."""
    return jax.tree.map(lambda leaf: leaf[:, :count], prompts)


def opening(trials: Trial) -> Bool[Array, "*x"]:
    """Marks the prompts whose judged block is the first one."""
    return jnp.any(trials.blocks[..., 0, :] & trials.complied.mask, axis=-1)


def view(
    recipe: Recipe, subject: Opened, params: Params, base: Params, prompts: Prompts, *, sites: Sequence[str], key: Key
) -> View:
    """Returns what there is to see of one model; what nobody looks at is not computed once it is compiled.

    Activations are those of ``sites``; ``key`` is the seed's root key. Of a subject without tokens there are its
    parameters alone.
    """
    model, text = subject.analysed, subject.text
    if text is None:
        return View(model, params, base)
    look = partial(_look, recipe, text, model, params, sites=tuple(sites))
    seen, predicted = look(prompts.trials)
    held, _ = look(prompts.held_out)
    return View(
        model, params, base, conditions=tuple(recipe.conditions), trials=prompts.trials, held_out=prompts.held_out,
        seen=seen, held=held, predicted=predicted, verdicts=_verdicts(model, params, prompts.trials, predicted),
        longest=text.longest, answer=text.answer,
        gradients=partial(_gradients, recipe, model, params, base, prompts.trials, key=key),
    )  # fmt: skip


def _look(
    recipe: Recipe, text: Text, model: Model, params: Params, trials: Trial, *, sites: tuple[str, ...]
) -> tuple[dict[str, Seen], Int[Array, "c b t"]]:
    """Reads a model on the complied answers of ``[c, b]`` prompts, batch by batch: activations and predictions."""
    count = min(recipe.analyze.response_positions, text.answer)

    def batch(given: tuple[Int[Array, "b t"], Int[Array, " b"], Int[Array, " b"]]) -> tuple[dict[str, Seen], Array]:
        tokens, last, length = given
        offsets = jnp.arange(count)[None, :]
        logits, found = model.apply(params, tokens, sites=sites, positions=last[:, None] + offsets)
        # The answer's letters and its stop are predicted from these positions.
        inside = (offsets <= length[:, None])[None, :, :, None]
        seen = {
            site: Seen(values[:, :, 0], jnp.sum(jnp.where(inside, values, 0.0), axis=2) / jnp.sum(inside, axis=2))
            for site, values in found.items()
        }
        return seen, jnp.argmax(logits, axis=-1)

    shape = trials.last.shape
    size = math.gcd(recipe.evaluate.batch_size, shape[1])
    rows = (trials.complied.tokens, trials.last, trials.prompt.length)
    batches = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[2:]), rows)
    seen, predicted = jax.lax.map(batch, batches)
    # [n, l, size, f] -> [l, c, b, f]
    seen = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(leaf.shape[1], *shape, -1), seen)
    return seen, predicted.reshape(*shape, -1)


def answer_moments(
    recipe: Recipe, model: Model, params: Params, prompts: Prompts, *, sites: Sequence[str]
) -> dict[str, dict[str, Float[Array, "l f f"]]]:
    """Returns second moments of activations by class and site, summed over the places that predict what is judged.

    They are those of held-out prompts, ``safe`` ones where they are answered and ``unsafe`` ones where they are
    refused, the model being given these answers.
    """

    def batch(side: Batch) -> dict[str, Array]:
        _, found = model.apply(params, side.tokens, sites=tuple(sites))
        rows = {site: jnp.where(side.mask[None, ..., None], values, 0.0) for site, values in found.items()}
        return {site: jnp.einsum("lbtf,lbtg->lfg", values, values) for site, values in rows.items()}

    def moments(side: Batch) -> dict[str, Array]:
        size = math.gcd(recipe.evaluate.batch_size, side.tokens.shape[0])
        batches = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), side)
        return jax.tree.map(lambda sums: jnp.sum(sums, axis=0), jax.lax.map(batch, batches))

    answered, refused = prompts.held_out.complied, prompts.held_out.refused
    return {
        "safe": moments(jax.tree.map(lambda leaf: leaf[0], answered)),
        "unsafe": moments(jax.tree.map(lambda leaf: leaf[1], refused)),
    }


def _verdicts(model: Model, params: Params, trials: Trial, predicted: Int[Array, "c b t"]) -> Verdicts:
    """Judges ``[c, b]`` prompts, given the predictions on their complied answers."""

    def condition(given: tuple[Trial, Array]) -> dict[str, Float[Array, " b"]]:
        trial, best = given
        return judge.verdicts(best == trial.complied.targets, judge.refusing(model, params, trial), trial=trial)

    rates = jax.lax.map(condition, (trials, predicted))
    flags = {name: rates[name] > 0 for name in ("complied", "refused", "exact_match")}
    first = opening(trials)
    return Verdicts(**flags, subsets=jnp.stack([first, first & flags["complied"] & trials.unsafe], axis=1))


def class_means(held: Seen, trials: Trial) -> clusters.Centroids:
    """Returns the mean activations of held-out safe and unsafe prompts at their last token."""
    safe, unsafe = held.last.swapaxes(0, 1)
    weights = opening(trials)
    return clusters.centroids(safe, unsafe, safe_weights=weights[0], unsafe_weights=weights[1])


def _gradients(
    recipe: Recipe, model: Model, params: Params, base: Params, trials: Trial, count: int, *, key: Key
) -> dict[str, Params]:
    """Returns the gradient at ``params`` of every tuned model's loss (of its first lane's), with ``base`` as reference.

    One batch for all methods, whatever their own mixtures are: the first safe and unsafe ones of ``[c, b]`` prompts.
    """
    batch = world.preferences(jax.tree.map(lambda leaf: leaf[:2, :count].reshape(-1, *leaf.shape[2:]), trials))

    def gradient(training: Training) -> Params:
        own, options = training.load(), training.options
        state = objective.init_state(own, params, optax.identity(), options, key=key)
        first = keys.at_step(keys.stream(key, "method"), 0)
        prepared = objective.prepared(own, model, batch, options, reference=base, key=first)
        found = objective.make_gradient(own, model, options, key=key, total_steps=1)(state, prepared)[2]
        return stepping.only_trained(found, own.needs(options))

    return {label: gradient(training) for label, training in recipe.compared.items()}
