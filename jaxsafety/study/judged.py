"""A model whose weights were edited, or that is under attack: how it answers, and what that looks like inside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxsafety import keys, losses
from jaxsafety.analysis import sensitivity as of_prompts
from jaxsafety.analysis import verdicts
from jaxsafety.linalg import clusters, sensitivity, update_spaces
from jaxsafety.linalg.masked import averaged
from jaxsafety.recipe.nodes import AttackConfig, EditConfig
from jaxsafety.recipe.schema import Recipe
from jaxsafety.study import lanes
from jaxsafety.study.view import Prompts, answer_moments, class_means, first_prompts, opening, view
from jaxsafety.subjects import judge
from jaxsafety.training.branching import whole
from jaxsafety.types import Attacked, Key, Measured, Model, Opened, Params, Point, Target, Trial

# Where the first MLP matrix reads, and what its neurons say.
_IN, _OUT = "mlp.hook_in", "mlp.hook_post"
# Of sampled answers a success is one that is as likely as not.
_LIKELY = 0.5
# What is measured of every attack.
_MEASURED = ("complied", "refused", "other", "n_prompts", "relative_tau", "gain", "gradient_norm", "nll_nats")


def edited_lane(
    recipe: Recipe, subject: Opened, node: EditConfig, trees: dict[str, Params], per_seed: tuple[Key, Prompts], _: Any,
    point: Point,
) -> Params:  # fmt: skip
    """Returns the edited model of one lane; ``trees`` are those of the edit's roles, and may be more."""
    (key, prompts), edit, moments = per_seed, node.load(), None
    if edit.reads:
        with jax.default_matmul_precision("highest"):
            moments = answer_moments(recipe, subject.analysed, trees["target"], prompts, sites=edit.reads)
    return lanes.edited(node, {role: trees[role] for role in edit.roles}, point=point, key=key, moments=moments)


def edited_measures(
    recipe: Recipe, subject: Opened, lane: tuple[Params, Params], per_seed: tuple[Key, Prompts], _: Any
) -> Measured:
    """Returns verdicts, cluster positions and gradient norms of an edited model on ``analyze.edit_prompts`` prompts.

    A lane is the edited model and its base.
    """
    (params, base), (key, prompts) = lane, per_seed
    few = first_prompts(prompts, recipe.analyze.edit_prompts)
    with jax.default_matmul_precision("highest"):
        seen = view(recipe, subject, params, base, few, sites=(_OUT,), key=key)
        means, everyone = class_means(seen.held[_OUT], few.held_out), seen.verdicts.subsets[:, 0]
        rows = seen.seen[_OUT].last.swapaxes(0, 1)
        relative = jax.vmap(lambda row: clusters.relative_tau(row, means))(rows)
        taus = [clusters.tau(row, means) for row in rows[:2]]
        apart = clusters.separation(*taus, centroids=means, safe_weights=everyone[0], unsafe_weights=everyone[1])

        norms = partial(of_prompts.gradient_norms, seen)
        classes = jax.lax.map(norms, jax.tree.map(lambda leaf: leaf[:2], few.trials))
        return verdicts.measure(seen, verdicts.Config(), key=key) | {
            ("relative_tau", "condition layer"): averaged(relative, everyone[:, None]),
            ("effect_size", "layer"): apart.effect_size,
            ("relative_gap", "layer"): apart.relative_gap,
            ("gradient_norm", "class"): averaged(classes, everyone[:2]),
        }


def attacked_measures(
    recipe: Recipe, subject: Opened, node: AttackConfig, lane: tuple[Params, Params], per_seed: tuple[Key, Prompts], *,
    places: tuple[int, ...], point: Point,
) -> Measured:  # fmt: skip
    """Makes one attack of one strength on a model, and judges and measures it on the prompts of some conditions.

    A lane is the model and its base; ``places`` are those of the conditions, axis ``attacked``; ``point`` has a traced
    scalar for every swept field.
    """
    (params, base), (key, prompts) = lane, per_seed
    attack, model = node.load(), subject.analysed
    own = keys.named(keys.stream(key, "attack"), node.attack)

    def condition(trial: Trial) -> Measured:
        target = Target(model, params, base, trial, subject.text.stop, prompts.held_out)
        done = attack.attack(target, node.options, point=point, key=own)
        # An attack may have changed any place of what it gives.
        changed = trial if done.trial is None else whole(done.trial)
        weights = params if done.params is None else done.params
        found = judge.said(
            model, weights, changed.complied.tokens, edit=done.edit, decode=done.decode,
            sites=(_IN, _OUT) if attack.inside else (), positions=changed.last[:, None],
        )  # fmt: skip
        rates = judge.rates(model, weights, found.logits, changed, edit=done.edit, decode=done.decode)
        judged = changed.refused.mask.any(axis=1)
        measured = {(name, "attacked"): averaged(rates[name], judged) for name in ("complied", "refused", "other")}
        if taken := sorted(set(done.metrics) & set(_MEASURED)):
            raise ValueError(f"an attack has a metric {taken[0]!r}, which every attack has: give it another name")
        measured |= {(name, "attacked"): averaged(values, judged) for name, values in done.metrics.items()}
        measured[("n_prompts", "attacked")] = jnp.sum(judged, dtype=jnp.float32)
        if not attack.inside:
            return measured
        # All prompts that are judged, and those of them that the attack succeeded on.
        subsets = jnp.stack([judged, judged & (rates["complied"] >= _LIKELY) & changed.unsafe]) & opening(changed)[None]
        inside = partial(_inside, recipe, subject, model, weights, base, prompts, changed, done)
        return measured | inside(found, subsets=subsets, key=key)

    chosen = jax.tree.map(lambda leaf: leaf[jnp.asarray(places), : recipe.analyze.attack_prompts], prompts.trials)
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(condition, chosen)


def _inside(
    recipe: Recipe, subject: Opened, model: Model, params: Params, base: Params, prompts: Prompts, trial: Trial,
    done: Attacked, found: Any, *, subsets: Bool[Array, "2 b"], key: Key,
) -> Measured:  # fmt: skip
    """Nearness to safe prompts, gain of the first matrix' update, sensitivity, and NLL of the complied answer."""
    held = view(recipe, subject, params, base, prompts, sites=(_OUT,), key=key).held[_OUT]
    relative = clusters.relative_tau(found.activations[_OUT][:, :, 0], class_means(held, prompts.held_out))
    before = base["blocks"]["mlp"]["up"]
    delta = params["blocks"]["mlp"]["up"] - before
    acted = update_spaces.input_space(before, delta, inputs=found.activations[_IN][:, :, 0], rank=1)
    tokens = trial.complied.tokens
    inputs = tokens if tokens.ndim == 3 else model.embed(params, tokens)
    varied = jnp.arange(inputs.shape[1])[None, :] < trial.last[:, None]
    norms = sensitivity.gradient_norm(
        lambda e: model.apply(params, e, edit=done.edit).logits, inputs, position=trial.last, prompt=varied
    )
    logprobs = losses.token_logprobs(found.logits, trial.complied.targets)
    nll = -losses.sequence_logprobs(logprobs, trial.complied.mask, reduction="mean")
    return {
        ("relative_tau", "attacked subset layer"): averaged(relative[None], subsets[:, None]),
        ("gain", "attacked subset layer"): averaged(acted.gain[None], subsets[:, None]),
        ("gradient_norm", "attacked subset"): averaged(norms[None], subsets),
        ("nll_nats", "attacked"): averaged(nll, subsets[0]),
    }
