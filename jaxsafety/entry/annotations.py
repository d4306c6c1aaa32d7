"""Annotations of public functions, checked where they are called: traced or not, jax's arrays or NumPy's.

What the tests' type checker says of everything, users are told at the functions that they import: an array of another
shape would broadcast, one of another type would be computed on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import jaxtyping
from jaxtyping import Integer

from jaxsafety.config.names import check_name

_F = TypeVar("_F", bound=Callable[..., Any])
_NUMBERS = (bool, int, float, complex)


def checked(function: _F) -> _F:
    """Has a function compare its arrays and names with its annotations: axes of one name are equally long in all.

    Whoever calls it with an array of another shape or type, or with a list in the place of one, meets a ValueError
    that names argument, shape and expectation; one with a name that its ``Literal`` does not list, what it lists and
    the nearest.
    """
    signature = inspect.signature(function, eval_str=True)
    annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    names = {name: get_args(kind) for name, kind in annotations.items() if get_origin(kind) is Literal}
    kinds = {name: own for name, kind in annotations.items() if (own := _kinds(kind))}
    others = {name: _others(annotations[name]) for name in kinds}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # which Python refuses by the function's name
        for name in names.keys() & given.keys():
            check_name(name, given[name], names[name])
        named = [name for name in kinds if name in given and not isinstance(given[name], others[name])]
        arrays = {name: given[name] for name in named}
        with jaxtyping.jaxtyped("context"):
            for name, value in arrays.items():
                if not any(isinstance(value, kind) for kind in kinds[name]):
                    raise ValueError(_sentence(function.__name__, name, arrays, kinds[name]))
        return function(*args, **kwargs)

    return call


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _kinds(annotation: Any) -> list[Any]:
    """The arrays that an annotation allows, of any library; tokens may well be unsigned."""
    alternatives = [kind for kind in _alternatives(annotation) if hasattr(kind, "dim_str")]
    return [(Integer if kind.dtype is jaxtyping.Int else kind.dtype)[Any, kind.dim_str] for kind in alternatives]


def _others(annotation: Any) -> tuple[type, ...]:
    """What else than an array it allows: what is written beside, and Python's numbers for a scalar or any shape."""
    alternatives = _alternatives(annotation)
    beside = tuple(kind for kind in alternatives if isinstance(kind, type) and not hasattr(kind, "dim_str"))
    scalar = any(getattr(kind, "dim_str", " ").strip() in ("", "...") for kind in alternatives)
    return (*beside, *(_NUMBERS if scalar or set(beside) & set(_NUMBERS) else ()))


def _sentence(function: str, name: str, arrays: dict[str, Any], kinds: list[Any]) -> str:
    expected = " or ".join(f"{kind.dtype.__name__}[{kind.dim_str.strip()}]" for kind in kinds)
    others = ", ".join(f"{other} {_shown(value)}" for other, value in arrays.items() if other != name)
    beside = f" beside {others}" if others else ""
    return f"{function}: {name} is {_shown(arrays[name])}, expected {expected}{beside}"


def _shown(value: Any) -> str:
    if not hasattr(value, "shape"):
        return f"a {type(value).__name__}"
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
