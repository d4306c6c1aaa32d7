"""Public functions called eagerly: one compiled program each, and a sentence where a gradient is asked that is none."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(*static: str) -> Callable[[_F], _F]:
    """Compiles the body of a public function once for its ``static`` keyword arguments and its arrays' shapes.

    Loops and branches would be compiled again in every eager call. Inside a transformation the body is inlined: the
    program is what it would be without. A function among the arguments keeps the body from being compiled, since what
    it closes over may have changed by the next call; a :class:`jax.tree_util.Partial` holds that as its arguments.
    """

    def decorate(body: _F) -> _F:
        program = jax.jit(body, static_argnames=static, inline=True)

        @functools.wraps(body)
        def call(*args: Any, **kwargs: Any) -> Any:
            traced = (args, {name: value for name, value in kwargs.items() if name not in static})
            run = body if any(callable(leaf) for leaf in jax.tree.leaves(traced)) else program
            return run(*args, **kwargs)

        return call

    return decorate


def undifferentiated(name: str, tree: Any) -> Any:
    """Returns a tree of arrays as it is; a derivative with respect to it is a ValueError that says what to do."""
    return _undifferentiated(name, tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _undifferentiated(name, tree):
    return tree


@_undifferentiated.defjvp
def _refused(name, primals, tangents):
    raise ValueError(f"{name} has no gradient here: put jax.lax.stop_gradient around what it is given")
