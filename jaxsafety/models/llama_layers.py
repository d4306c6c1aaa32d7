"""What a Llama's layers differ in: the angles that their heads are turned by, and how far back they see.

All of it is there once, and a layer picks its own by its index, so that a scan over the layers stays one program. Where
layers are alike nothing is picked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.models import layers as nn
from jaxsafety.models import rope
from jaxsafety.models.llama_config import LlamaConfig

# Of a layer, whose index is None only where all are alike.
Index = Int[Array, ""] | None


def tables(
    config: LlamaConfig, *, positions: Int[Array, "#b t"], lengths: Int[Array, " #b"]
) -> Callable[[Index], Float[Array, "2 _ t half"]]:
    """Returns from a layer to the rotary angles of its heads at some positions, see ``rope.table_at``."""
    at = partial(rope.table_at, positions=positions, lengths=lengths, width=config.head_width)
    own = at(config.rope)
    local = own if config.local_rope is None else at(config.local_rope)

    def of(layer: Index) -> Array:
        table = own if config.local_rope is None else _chosen(config.windowed, layer, local, own)
        if not config.rotated:
            return table
        # Turned by nothing, a head keeps its bits.
        still = jnp.stack([jnp.ones_like(table[0]), jnp.zeros_like(table[1])])
        return _chosen(config.rotated, layer, table, still)

    return of


def visibility(
    config: LlamaConfig, mask: Bool[Array, "b u"], *, positions: Int[Array, "b u"], queries: Int[Array, " t"]
) -> Callable[[Index], Bool[Array, "b t u"]]:
    """Returns from a layer to the places that its queries see, see ``layers.visibility``."""
    see = partial(nn.visibility, mask, positions=positions, queries=queries)
    near = see(window=config.window)
    everything = see(window=None) if config.windowed else near
    return lambda layer: _chosen(config.windowed, layer, near, everything)


def _chosen(layers: tuple[bool, ...], layer: Index, one: Array, other: Array) -> Array:
    """``one`` where the layer is among ``layers``, which is every layer if they are none."""
    return jnp.where(jnp.asarray(layers)[layer], one, other) if layers else one
