"""The pure training step, the loop over steps, and the evaluation of verdicts. Nothing here jits or vmaps seeds.

A lane whose loss or gradient is not finite is frozen from that step on (``state.finite`` turns False) and reported;
nothing is raised in traced code.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxsafety import losses
from jaxsafety.types import Loss, Metrics, Params, Step, Totals, TrainState

# (params, batch) to the mean loss, its metrics and its gradient.
Gradient = Callable[[Params, Any], tuple[Float[Array, ""], Metrics, Params]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), finite=jnp.asarray(True))


def make_step(loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """Returns the pure update ``(state, batch) -> (state, metrics)`` of a loss; see :func:`make_gradient_step`."""

    def gradient(params: Params, batch: Any) -> tuple[Float[Array, ""], Metrics, Params]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return value, metrics, grads

    return make_gradient_step(gradient, optimizer)


def accumulated(totals: Totals, *, parts: int) -> Gradient:
    """Returns the loss of a batch, its metrics and its gradient, taken one part of the batch at a time.

    Gradients are summed in float32, and divided once by the count of the whole batch, so that ``parts`` changes
    nothing but rounding and memory.

    Args:
        totals: the objective.
        parts: of equal size; they divide the batch.
    """

    def gradient(params: Params, batch: Any) -> tuple[Float[Array, ""], Metrics, Params]:
        def summed(params: Params, part: Any) -> tuple[Float[Array, ""], Any]:
            (value, count), metrics = totals(params, part)
            return value, (count, metrics)

        def one(part: Any) -> Any:
            (value, (count, metrics)), grads = jax.value_and_grad(summed, has_aux=True)(params, part)
            return value, count, metrics, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)

        def body(carry: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, one(part)), None

        split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
        shapes = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], split))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (value, count, metrics, grads), _ = jax.lax.scan(body, zeros, split)
        means = {name: losses.quotient(*own) for name, own in metrics.items()}
        return losses.quotient(value, count), means, jax.tree.map(lambda leaf: losses.quotient(leaf, count), grads)

    return gradient


def make_gradient_step(gradient: Gradient, optimizer: optax.GradientTransformation) -> Step:
    """Returns the pure update ``(state, batch) -> (state, metrics)``.

    Metrics: the loss's own, and ``loss``, ``grad_norm`` (before clipping), ``finite`` (1 while the lane lives).

    Args:
        gradient: ``(params, batch)`` to loss, metrics and gradient.
        optimizer: what makes an update of it.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        value, metrics, grads = gradient(state.params, batch)
        grad_norm = optax.tree.norm(grads)
        finite = state.finite & jnp.isfinite(value) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        moved = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), moved, (state.params, state.opt_state)
        )
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, finite=finite)
        return state, metrics | {"loss": value, "grad_norm": grad_norm, "finite": finite.astype(jnp.float32)}

    return step


def run_steps(
    step: Step, draw: Callable[[Int[Array, ""]], Any], state: TrainState, *, steps: int | Int[Array, ""]
) -> tuple[TrainState, Metrics]:
    """Runs ``steps`` updates on batches drawn inside the program from the state's own step counter.

    Args:
        step: from :func:`make_step`.
        draw: pure draw of the batch at a step.
        state: where to start.
        steps: number of updates, at least 1. It may be traced: one compiled program serves chunks of any length.

    Returns:
        The state after them and each metric's mean over them.
    """
    seen = jax.eval_shape(lambda state: step(state, draw(state.step))[1], state)

    def body(_: Int[Array, ""], carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, sums = carry
        state, metrics = step(state, draw(state.step))
        return state, jax.tree.map(jnp.add, sums, metrics)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), seen)
    state, sums = jax.lax.fori_loop(0, steps, body, (state, zeros))
    return state, jax.tree.map(lambda total: total / steps, sums)
