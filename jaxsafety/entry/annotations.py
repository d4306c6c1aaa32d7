"""Array annotations of public functions, checked where they are called: traced or not, jax's arrays or NumPy's.

What the tests' type checker says of everything, users are told at the functions that they import: an array of another
shape would broadcast, one of another type would be computed on.
"""

import functools
import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import jaxtyping
from jaxtyping import Integer

_F = TypeVar("_F", bound=Callable[..., Any])
_NUMBERS = (bool, int, float, complex)


def checked(function: _F) -> _F:
    """Has a function compare its arrays with its annotations: axes of one name are equally long in all of them.

    Whoever calls it with an array of another shape or type, or with a list in the place of one, meets a ValueError
    that names argument, shape and expectation.
    """
    signature = inspect.signature(function)
    kinds = {name: _kinds(parameter.annotation) for name, parameter in signature.parameters.items()}
    kinds = {name: own for name, own in kinds.items() if own}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        # None where an argument may be left out, a Python number where it may be a scalar.
        arrays = {name: given[name] for name in kinds if not isinstance(given.get(name), (type(None), *_NUMBERS))}
        with jaxtyping.jaxtyped("context"):
            for name, value in arrays.items():
                if not any(isinstance(value, kind) for kind in kinds[name]):
                    raise ValueError(_sentence(function.__name__, name, arrays, kinds[name]))
        return function(*args, **kwargs)

    return call


def _kinds(annotation: Any) -> list[Any]:
    """The arrays that an annotation allows, of any library; tokens may well be unsigned."""
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    alternatives = [kind for kind in alternatives if hasattr(kind, "dim_str")]
    return [(Integer if kind.dtype is jaxtyping.Int else kind.dtype)[Any, kind.dim_str] for kind in alternatives]


def _sentence(function: str, name: str, arrays: dict[str, Any], kinds: list[Any]) -> str:
    expected = " or ".join(f"{kind.dtype.__name__}[{kind.dim_str.strip()}]" for kind in kinds)
    others = ", ".join(f"{other} {_shown(value)}" for other, value in arrays.items() if other != name)
    beside = f" beside {others}" if others else ""
    return f"{function}: {name} is {_shown(arrays[name])}, expected {expected}{beside}"


def _shown(value: Any) -> str:
    if not hasattr(value, "shape"):
        return f"a {type(value).__name__}"
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
