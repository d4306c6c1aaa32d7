"""The pure training step and the loop over steps. Nothing here jits or vmaps seeds.

A lane whose loss or gradient is not finite is frozen from that step on (``state.finite`` turns False) and reported;
nothing is raised in traced code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Float, Int

from jaxsafety import keys, losses, tree
from jaxsafety.types import Key, Metrics, Needs, Params, Step, Terms, TrainState

# (params, part of a batch, aux, *, key, progress) to the loss's terms and the metrics, each (sum, count).
Totals = Callable[..., tuple[Terms, Terms]]
# (state, batch) to the loss, the means of all terms and metrics, and the gradient.
Gradient = Callable[[TrainState, Any], tuple[Float[Array, ""], Metrics, Params]]


def init_state(params: Params, optimizer: optax.GradientTransformation, *, aux: Any = None) -> TrainState:
    """Returns the state before the first step."""
    opt_state = optimizer.init(params)
    return TrainState(
        step=jnp.int32(0), params=params, opt_state=opt_state, aux={} if aux is None else aux, finite=jnp.asarray(True)
    )


def make_gradient(totals: Totals, *, key: Key, total_steps: int, parts: int = 1) -> Gradient:
    """Returns the loss of a batch, means and its gradient, taken one part of the batch at a time.

    The loss is the sum of the terms, each a sum divided by its count over the whole batch, so that ``parts``, which are
    of equal size, change nothing but rounding and memory. Gradients of parts are added in float32. ``key`` is that of
    the run's steps, ``total_steps`` what ``progress`` is a share of.
    """

    def gradient(state: TrainState, batch: Any) -> tuple[Float[Array, ""], Metrics, Params]:
        given = {"key": keys.at_step(key, state.step), "progress": state.step / total_steps}

        def summed(params: Params, part: Any) -> tuple[Terms, Terms]:
            return totals(params, part, state.aux, **given)

        if parts == 1:
            value, seen, grads = _of_part(summed, state.params, batch, counts=None)
            return value, means(seen), grads
        split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
        # Counts follow from masks: the compiler drops the model's own pass from this one.
        every = jax.lax.map(lambda part: _counts(summed(state.params, part)[0]), split)
        value, seen, grads = _of_parts(summed, state.params, split, counts=jax.tree.map(jnp.sum, every))
        return value, means(seen), grads

    return gradient


# What says whose a row of metrics is, and what every step shows.
_TAKEN = ("stage", "method", "lr_name", "lr", "seed", "step", "loss", "grad_norm", "finite")


def added(terms: Terms, metrics: Terms, *, counts: Metrics | None = None) -> tuple[Float[Array, ""], Terms]:
    """Returns the loss, the sum of the terms' means, and all terms and metrics that are shown.

    Both are sums and counts of examples. ``counts`` are those of the whole batch where these are a part's sums; None
    takes their own. A metric with the name of what a row of metrics holds anyhow is a ValueError.
    """
    if taken := sorted(set(metrics) & set(_TAKEN)):
        raise ValueError(f"a method has a metric {taken[0]!r}, which every row of metrics has: give it another name")
    whole = _counts(terms) if counts is None else counts
    shares = [losses.quotient(total, whole[name]) for name, (total, _) in terms.items()]
    # One term alone is the loss, which is a metric anyhow.
    shown = {f"loss/{name}": term for name, term in terms.items()} if len(terms) > 1 else {}
    return reduce(jnp.add, shares), shown | metrics


def means(seen: Terms) -> Metrics:
    """Returns every sum over its count, 0 where nothing was counted."""
    return {name: losses.quotient(*own) for name, own in seen.items()}


def _of_part(
    summed: Callable[[Params, Any], tuple[Terms, Terms]], params: Params, part: Any, *, counts: Metrics | None
) -> tuple[Float[Array, ""], Terms, Params]:
    """Returns this part's share of the loss, the sums and counts of all terms and metrics, and the gradient."""

    def loss(params: Params) -> tuple[Float[Array, ""], Terms]:
        return added(*summed(params, part), counts=counts)

    (value, seen), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, seen, grads


def _of_parts(
    summed: Callable[[Params, Any], tuple[Terms, Terms]], params: Params, split: Any, *, counts: Metrics
) -> tuple[Float[Array, ""], Terms, Params]:
    def one(part: Any) -> Any:
        value, seen, grads = _of_part(summed, params, part, counts=counts)
        return value, seen, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)

    def body(carry: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one(part)), None

    shapes = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(body, zeros, split)[0]


def _counts(terms: Terms) -> Metrics:
    return {name: count for name, (_, count) in terms.items()}


_ALL = Needs()


def is_trained(path: str, pattern: str) -> bool:
    """Whether a parameter is one of those that ``pattern`` names; an adapter's factors have their matrix's path."""
    return re.fullmatch(pattern, re.sub(r"_lora_[ab]$", "", path)) is not None


def only_trained(updates: Params, needs: Needs) -> Params:
    """Returns gradients or updates with zeros for the parameters, and the layers of them, that are not trained."""
    if needs.trained == ".*" and needs.layers is None:
        return updates

    def kept(path: str, leaf: Array) -> Array:
        if not is_trained(path, needs.trained):
            return jnp.zeros_like(leaf)
        if needs.layers is None or not tree.is_stacked(path):
            return leaf
        own = jnp.zeros(len(leaf), bool).at[jnp.asarray(needs.layers(len(leaf)))].set(True)
        return jnp.where(own.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)

    return tree.label(updates, kept)


def make_step(
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    *,
    needs: Needs = _ALL,
    update_aux: Callable[[Any, Metrics], Any] | None = None,
) -> Step:
    """Returns the pure update ``(state, batch) -> (state, metrics)``.

    Metrics: the objective's own, and ``loss``, ``grad_norm`` (before clipping), ``finite`` (1 while the lane lives).
    ``needs`` says which parameters change, and which layers of them; the others have neither gradient nor decay.
    ``update_aux`` is ``(aux, means) -> aux`` after the step; None leaves it.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        value, metrics, grads = gradient(state, batch)
        grads = only_trained(grads, needs)
        grad_norm = optax.tree.norm(grads)
        finite = state.finite & jnp.isfinite(value) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = only_trained(updates, needs)
        aux = state.aux if update_aux is None else update_aux(state.aux, metrics)
        moved, before = (
            (optax.apply_updates(state.params, updates), opt_state, aux),
            (state.params, state.opt_state, state.aux),
        )
        # What has another shape or type would be broadcast or promoted below, in silence.
        chex.assert_trees_all_equal_shapes_and_dtypes(moved, before)
        params, opt_state, aux = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, before)
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, aux=aux, finite=finite)
        return state, metrics | {"loss": value, "grad_norm": grad_norm, "finite": finite.astype(jnp.float32)}

    return step


def run_steps(
    step: Step, draw: Callable[[Int[Array, ""]], Any], state: TrainState, *, steps: int | Int[Array, ""]
) -> tuple[TrainState, Metrics]:
    """Runs ``steps`` updates on batches drawn inside the program from the state's own step counter.

    ``draw`` is the pure draw of the batch at a step. ``steps``, at least 1, may be traced: one compiled program serves
    chunks of any length.

    Returns:
        The state after them and each metric's mean over them.
    """
    # Traced once, for its metrics' names and for the loop: a step is most of what a program is traced in.
    jaxpr, shapes = jax.make_jaxpr(lambda state: step(state, draw(state.step)), return_shape=True)(state)
    structure, once = jax.tree.structure(shapes), jaxpr_as_fun(jaxpr)

    def body(_: Int[Array, ""], carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, sums = carry
        state, metrics = jax.tree.unflatten(structure, once(*jax.tree.leaves(state)))
        return state, jax.tree.map(jnp.add, sums, metrics)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1])
    state, sums = jax.lax.fori_loop(0, steps, body, (state, zeros))
    return state, jax.tree.map(lambda total: total / steps, sums)
