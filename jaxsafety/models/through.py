"""A model as a function of what is trained of it: an adapter's factors, parameters in another type, placed inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from jaxsafety.types import Decoder, Model, Output, Params


def through(model: Any, join: Callable[[Any], Params], *, place: Callable[[Array], Array] = lambda x: x) -> Any:
    """Returns the model whose parameters are those that ``join`` makes of what it is given.

    ``join`` runs inside whatever is traced; ``place`` takes the inputs of ``apply`` before they are computed on. Of a
    model that is a function, see :class:`jaxsafety.types.Opened`, a function.
    """
    if not isinstance(model, Model):
        return lambda trained, *inputs, **asked: model(join(trained), *inputs, **asked)

    def embed(trained: Any, tokens: Array) -> Array:
        return model.embed(join(trained), tokens)

    def apply(trained: Any, inputs: Array, **asked: Any) -> Output:
        return model.apply(join(trained), place(inputs), **asked)

    def begin(trained: Any, tokens: Array, **asked: Any) -> tuple[Array, Any]:
        return model.decoder.begin(join(trained), tokens, **asked)

    def extend(trained: Any, token: Array, **asked: Any) -> tuple[Array, Any]:
        return model.decoder.extend(join(trained), token, **asked)

    def branches(trained: Any, stems: Array, rest: Array) -> Array:
        return model.branches(join(trained), place(stems), place(rest))

    return Model(embed, apply, Decoder(begin, extend), None if model.branches is None else branches)
