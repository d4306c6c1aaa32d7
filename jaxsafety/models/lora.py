"""Low-rank adapters of a Llama's matrices: two factors beside each matrix, which stays as it is.

Beside ``blocks/attn/q`` ``[l, in, out]`` lie ``blocks/attn/q_lora_a`` ``[l, in, r]`` and ``q_lora_b`` ``[l, r, out]``;
the model multiplies with ``q + a b``, and so it does with ``embed`` and ``unembed``, without ``l``. An adapter is the
tree of factors alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.entry.annotations import checked
from jaxsafety.types import Key, Params

TARGETS = {"q": "attn", "k": "attn", "v": "attn", "o": "attn", "gate": "mlp", "up": "mlp", "down": "mlp"}
# Those outside of the layers, which are adapted where they are named.
OUTER = ("embed", "unembed")


def init(shapes: Params, *, rank: int, targets: Iterable[str], key: Key) -> Params:
    """Returns a fresh adapter, which changes nothing: ``a`` is U(-1, 1) / sqrt(in), ``b`` is 0, both float32.

    Of embeddings ``a`` is 0 and ``b`` N(0, 1): of ``a`` a token reads one row, however many there are. ``shapes`` are
    the model's parameters, or what has their shapes; ``rank`` is ``r``, at least 1; ``targets`` are names among
    ``TARGETS`` and ``OUTER``.

    References:
        Hu et al. 2021 (arXiv 2106.09685), section 4.1; the distributions are those of their release.
    """
    flat, streams = {}, dict(zip(TARGETS, jax.random.split(key, len(TARGETS)), strict=True))
    streams |= {name: jax.random.fold_in(key, place) for place, name in enumerate(OUTER)}
    paths = {name: f"blocks/{block}/{name}" for name, block in TARGETS.items()} | {name: name for name in OUTER}
    known = tree.flatten(shapes)
    there = {name: path for name, path in paths.items() if path in known}
    for name in targets:
        if name not in there:
            raise ValueError(f"targets of an adapter: got {name!r}, expected of this model {', '.join(there)}")
        *lead, m, n = known[there[name]].shape
        a, b = jnp.zeros((*lead, m, rank), jnp.float32), jnp.zeros((*lead, rank, n), jnp.float32)
        if name == "embed":
            b = jax.random.normal(streams[name], b.shape)
        else:
            a = jax.random.uniform(streams[name], a.shape, minval=-1.0, maxval=1.0) / m**0.5
        flat |= {f"{there[name]}_lora_a": a, f"{there[name]}_lora_b": b}
    return tree.unflatten(flat)


@checked
def joined(params: Params, adapter: Params, *, scale: float | Float[Array, ""]) -> Params:
    """Returns the parameters of a model with its adapter, whose product counts ``scale`` times (``alpha / r``).

    Raises:
        ValueError: factors of no matrix of the model, one without the other, or of shapes that do not fit it.
    """
    flat = tree.flatten(adapter)
    _check_factors(tree.flatten(params), flat)
    scaled = {path: (leaf * scale).astype(leaf.dtype) for path, leaf in flat.items() if path.endswith("_lora_b")}
    return tree.unflatten(tree.flatten(params) | flat | scaled)


def _check_factors(params: Params, factors: Params) -> None:
    for path in factors:
        matrix = re.sub("_lora_[ab]$", "", path)
        if path == matrix or matrix not in params:
            raise ValueError(
                f"adapter: {path} belongs to no matrix of the model: expected MATRIX_lora_a and _b beside one"
            )
        *lead, m, n = params[matrix].shape
        shapes = [np.shape(factors.get(f"{matrix}_lora_{name}")) for name in "ab"]
        rank = shapes[0][-1] if shapes[0] else "r"
        if shapes != [(*lead, m, rank), (*lead, rank, n)]:
            first = "".join(f"{size}, " for size in lead)
            raise ValueError(
                f"adapter: the factors of {matrix} have the shapes {shapes[0]} and {shapes[1]}, expected "
                f"({first}{m}, r) and ({first}r, {n})"
            )


def merged(
    weights: Float[np.ndarray, "*shape"], path: str, layer: int | None, adapter: Params, *, scale: float
) -> Float[np.ndarray, "*shape"]:
    """Returns the weights of one layer with their part of an adapter, ``W + scale a b``, in float32.

    What the adapter has no part of comes back as it is. ``path`` is that of the stacked weights, such as
    ``blocks/attn/q``, ``layer`` is None outside of the layers, and the adapter's factors are host arrays.
    """
    flat = tree.flatten(adapter)
    if f"{path}_lora_a" not in flat:
        return weights
    factors = (flat[f"{path}_lora_{name}"] for name in "ab")
    a, b = (np.asarray(one if layer is None else one[layer], np.float32) for one in factors)
    return weights.astype(np.float32) + np.float32(scale) * (a @ b)
