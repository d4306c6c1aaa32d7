"""A method bound to a model: the batch that it wants, its step and first state, for studies and checkpoints alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxsafety import keys, tree
from jaxsafety.training import stepping
from jaxsafety.training.branching import whole
from jaxsafety.types import Examples, Key, Method, Metrics, Params, Step, Terms, TrainState

# Below a step's key, whose own draws are the loss's; and a step that no run reaches, for what comes before the first.
_DATA = 1
_FIRST = 1 << 31


def prepared(
    method: Method, model: Any, batch: Examples, config: Any, *, reference: Params | None, key: Key
) -> Examples:
    """Returns a drawn batch as the method's loss takes it: transformed, and with what the reference says of it.

    ``reference`` are the parameters that tuning began with, for a method that asks them; no gradient flows into them.
    ``key`` is the step's.

    Raises:
        ValueError: the method asks a reference, and there is none.
    """
    batch = transformed(method, batch, config, key=key)
    if method.reference is None or not method.needs(config).reference:
        return batch
    if reference is None:
        raise ValueError("reference: got None, expected the parameters that tuning began with, which this method asks")
    return batch.replace(reference=method.reference(model, jax.lax.stop_gradient(reference), batch, config))


def transformed(method: Method, batch: Examples, config: Any, *, key: Key) -> Examples:
    """Returns a drawn batch as the method transforms it, with randomness of its own below the step's ``key``."""
    if method.data is None:
        return batch
    return whole(method.data(batch, key=jax.random.fold_in(key, _DATA), config=config))


def make_loss(
    method: Method,
    model: Any,
    config: Any,
    *,
    key: Key,
    reference: Params | None = None,
    aux: Any = None,
    progress: float = 0.0,
) -> Callable[[Params, Examples], tuple[Float[Array, ""], Metrics]]:
    """Returns a method's loss of drawn examples, and the means of its metrics, for a trainer of one's own.

    ``key`` is that of the step, ``progress`` the share of the run in [0, 1) that is done. ``reference`` are the
    parameters that tuning began with, and ``aux`` what the method carries, for a method that asks them.
    """

    def loss(params: Params, batch: Examples) -> tuple[Float[Array, ""], Metrics]:
        batch = prepared(method, model, batch, config, reference=reference, key=key)
        terms, metrics = method.totals(
            model, params, batch, config, {} if aux is None else aux, key=key, progress=jnp.float32(progress)
        )
        value, seen = stepping.added(terms, metrics)
        return value, stepping.means(seen)

    return loss


def make_gradient(
    method: Method, model: Any, config: Any, *, key: Key, total_steps: int, parts: int = 1
) -> stepping.Gradient:
    """Returns the method's loss, means and gradient at a state, on a prepared batch.

    ``config`` has this lane's scalars, ``key`` is the run's, ``total_steps`` its length; for ``parts`` of a batch see
    :func:`jaxsafety.training.stepping.make_gradient`.

    Raises:
        ValueError: several parts for a method that doesn't take a batch in parts.
    """
    if parts > 1 and not method.needs(config).divisible:
        raise ValueError(f"accumulate: got {parts}, expected 1: this method doesn't take a batch in parts")

    def totals(params: Params, batch: Any, aux: Any, **given: Any) -> tuple[Terms, Terms]:
        return method.totals(model, params, batch, config, aux, **given)

    return stepping.make_gradient(totals, key=keys.stream(key, "method"), total_steps=total_steps, parts=parts)


def init_state(
    method: Method, params: Params, optimizer: optax.GradientTransformation, config: Any, *, key: Key
) -> TrainState:
    """Returns the state before the first step of a run with this key, with what the method carries beside it.

    Raises:
        ValueError: the method trains none of the parameters.
    """
    pattern, first = method.needs(config).trained, keys.at_step(keys.stream(key, "method"), _FIRST)
    if not any(stepping.is_trained(path, pattern) for path in tree.flatten(params)):
        raise ValueError(
            f"no parameter path matches {pattern!r}, which the method trains: {', '.join(tree.flatten(params))}"
        )
    aux = None if method.init_aux is None else method.init_aux(params, key=first, config=config)
    return stepping.init_state(params, optimizer, aux=aux)


def make_step(
    method: Method,
    model: Any,
    optimizer: optax.GradientTransformation,
    config: Any,
    *,
    key: Key,
    total_steps: int,
    parts: int = 1,
) -> Step:
    """Returns the method's update of a state on a prepared batch; see :func:`make_gradient`.

    ``optimizer`` makes an update of a gradient; only the parameters that the method trains have one.
    """
    gradient = make_gradient(method, model, config, key=key, total_steps=total_steps, parts=parts)
    update_aux = None if method.update_aux is None else partial(method.update_aux, config=config)
    return stepping.make_step(gradient, optimizer, needs=method.needs(config), update_aux=update_aux)
