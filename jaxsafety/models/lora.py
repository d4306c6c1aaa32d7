"""Low-rank adapters of a Llama's matrices: two factors beside each matrix, which stays as it is.

Beside ``blocks/attn/q`` ``[l, in, out]`` lie ``blocks/attn/q_lora_a`` ``[l, in, r]`` and ``q_lora_b`` ``[l, r, out]``;
the model multiplies with ``q + a b``. An adapter is the tree of factors alone.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsafety import tree
from jaxsafety.entry.annotations import checked
from jaxsafety.types import Key, Params

TARGETS = {"q": "attn", "k": "attn", "v": "attn", "o": "attn", "gate": "mlp", "up": "mlp", "down": "mlp"}


def init(shapes: Params, *, rank: int, targets: Iterable[str], key: Key) -> Params:
    """Returns a fresh adapter, which changes nothing: ``a`` is U(-1, 1) / sqrt(in), ``b`` is 0, both float32.

    ``shapes`` are the model's parameters, or what has their shapes; ``rank`` is ``r``, at least 1; ``targets`` are
    names among ``TARGETS``.

    References:
        Hu et al. 2021 (arXiv 2106.09685), section 4.1; the distribution of ``a`` is that of their release.
    """
    flat, streams = {}, dict(zip(TARGETS, jax.random.split(key, len(TARGETS)), strict=True))
    for name in targets:
        if name not in shapes["blocks"][TARGETS[name]]:
            there = [own for own, block in TARGETS.items() if own in shapes["blocks"][block]]
            raise ValueError(f"targets of an adapter: got {name!r}, expected of this model {', '.join(there)}")
        depth, m, n = shapes["blocks"][TARGETS[name]][name].shape
        path = f"blocks/{TARGETS[name]}/{name}_lora"
        flat[f"{path}_a"] = jax.random.uniform(streams[name], (depth, m, rank), minval=-1.0, maxval=1.0) / m**0.5
        flat[f"{path}_b"] = jnp.zeros((depth, rank, n), jnp.float32)
    return tree.unflatten(flat)


@checked
def joined(params: Params, adapter: Params, *, scale: float | Float[Array, ""]) -> Params:
    """Returns the parameters of a model with its adapter, whose product counts ``scale`` times (``alpha / r``)."""
    flat = tree.flatten(adapter)
    scaled = {path: (leaf * scale).astype(leaf.dtype) for path, leaf in flat.items() if path.endswith("_lora_b")}
    return tree.unflatten(tree.flatten(params) | flat | scaled)


def merged(
    weights: Float[np.ndarray, "*shape"], path: str, layer: int, adapter: Params, *, scale: float
) -> Float[np.ndarray, "*shape"]:
    """Returns the weights of one layer with their part of an adapter, ``W + scale a b``, in float32.

    What the adapter has no part of comes back as it is. ``path`` is that of the stacked weights, such as
    ``blocks/attn/q``, and the adapter's factors are host arrays.
    """
    flat = tree.flatten(adapter)
    if f"{path}_lora_a" not in flat:
        return weights
    a, b = (np.asarray(flat[f"{path}_lora_{name}"][layer], np.float32) for name in "ab")
    return weights.astype(np.float32) + np.float32(scale) * (a @ b)
