"""Public functions called eagerly: one compiled program each, and a sentence where a gradient is asked that is none.

And the products of the models, which many programs share.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(*static: str) -> Callable[[_F], _F]:
    """Compiles the body of a public function once for its ``static`` keyword arguments and its arrays' shapes.

    Loops and branches would be compiled again in every eager call. Traced arguments go to the body as it is, and in a
    trace that closes over all of them the program is inlined. A function among the arguments keeps the body from being
    compiled, since what it closes over may have changed by the next call; a :class:`jax.tree_util.Partial` holds that
    as its arguments. So does a static argument that holds a traced ``place``, as a world among several does.
    """

    def decorate(body: _F) -> _F:
        program = jax.jit(body, static_argnames=static, inline=True)

        @functools.wraps(body)
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves = jax.tree.leaves((args, {name: value for name, value in kwargs.items() if name not in static}))
            leaves += [getattr(kwargs.get(name), "place", None) for name in static]
            as_it_is = any(isinstance(leaf, jax.core.Tracer) or callable(leaf) for leaf in leaves)
            return (body if as_it_is else program)(*args, **kwargs)

        return call

    return decorate


@functools.cache
def einsum(spec: str, precision: Any = None) -> Callable[..., jax.Array]:
    """Returns the einsum of a spec, traced once for all calls of a shape; jax's own makes a program for every call."""
    return jax.jit(functools.partial(jnp.einsum, spec, precision=precision), inline=True)


def undifferentiated(name: str, tree: Any) -> Any:
    """Returns a tree of arrays as it is; a derivative with respect to it is a ValueError that says what to do."""
    return _undifferentiated(name, tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _undifferentiated(name, tree):
    return tree


@_undifferentiated.defjvp
def _refused(name, primals, tangents):
    raise ValueError(f"{name} has no gradient here: put jax.lax.stop_gradient around what it is given or closes over")
