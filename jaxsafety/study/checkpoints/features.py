"""What a model represents of labelled prompts in one layer, and how its update acts on it: pure.

The names are those of the synthetic study. There are no held-out prompts: each half of a class makes the means that the
other half is measured with.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.linalg import clusters, update_spaces
from jaxsafety.models import llama
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.types import Params

SITES = ("mlp.hook_in", "mlp.hook_post")


def layer(
    weights: Params,
    x: Float[Array, "b t d"],
    mask: Bool[Array, "b t"],
    chosen: Float[Array, "p b t"],
    index: Int[Array, ""],
    *,
    config: LlamaConfig,
) -> tuple[Float[Array, "b t d"], dict[str, Float[Array, "p b _"]]]:
    """Runs one layer of a model on sequences and reads its MLP.

    ``weights`` are the leaves below ``blocks`` without their leading axis, ``x`` the residual stream, ``chosen`` the
    weights of the places whose mean is read, p kinds of it; a row of zeros reads zeros. ``index`` is the layer's.

    Returns:
        The residual stream after the layer, and by site ``[p, b, d]`` (``f`` for ``mlp.hook_post``).
    """
    batch, tokens, width = x.shape
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    attend = partial(llama.attention(mask, config=config), layer=index)
    out, seen, _ = llama.block(x.reshape(-1, width), weights, config=config, tokens=tokens, attend=attend)
    picked = {
        site: jnp.einsum(
            "pbt,btd->pbd", chosen, seen[site].reshape(batch, tokens, -1), precision=jax.lax.Precision.HIGHEST
        )
        for site in SITES
    }
    return out.reshape(batch, tokens, width), picked


def cluster_measures(
    activations: Float[Array, "n d"], classes: Bool[Array, "2 n"], second: Bool[Array, " n"]
) -> dict[str, Array]:
    """Measures where every prompt lies between the means of safe and unsafe prompts, and how far these are apart.

    ``activations`` are those of all prompts, jailbreaks included; ``classes`` the safe and the unsafe ones; ``second``
    which half a prompt belongs to.

    Returns:
        ``tau``, ``relative_tau`` and ``cosine_tau`` ``[n]``, each with the means of the other half; ``gap``,
        ``effect_size``, ``relative_gap``, ``accuracy``, ``distance``, the mean over the halves; ``leading_share`` and
        ``leading_energy`` ``[2]`` of the classes' spectra, all of a class.

    References: Jain et al. 2024 (arXiv 2407.10264), section 4.1 and figure 3.

    Fidelity: the released curve of real models takes the means from the prompts that it is made of.
    """
    stack = activations[None]
    halves = []
    for own in (~second, second):
        safe, unsafe = classes & ~own[None]
        means = clusters.centroids(stack, stack, safe_weights=safe, unsafe_weights=unsafe)
        tau = clusters.tau(stack, means)
        measured = {
            "tau": tau[0],
            "relative_tau": clusters.relative_tau(stack, means)[0],
            "cosine_tau": clusters.tau(stack, means, form="cosine")[0],
        }
        safe, unsafe = classes & own[None]
        apart = clusters.separation(tau, tau, centroids=means, safe_weights=safe, unsafe_weights=unsafe)
        fields = ("gap", "effect_size", "relative_gap", "accuracy", "distance")
        halves.append((measured, {name: getattr(apart, name)[0] for name in fields}))
    (first, apart), (other, apart_too) = halves
    found = {name: jnp.where(second, other[name], value) for name, value in first.items()}
    found |= {name: (value + apart_too[name]) / 2 for name, value in apart.items()}
    shares = [clusters.leading_share(stack, weights=own) for own in classes]
    return found | {
        name: jnp.concatenate([share[place] for share in shares])
        for place, name in enumerate(("leading_share", "leading_energy"))
    }


def action_measures(
    base: Float[Array, "m n"], tuned: Float[Array, "m n"], inputs: Float[Array, "b m"], *, directions: int
) -> dict[str, Any]:
    """Measures how the update of one matrix acts on the inputs that prompts bring to it in the tuned model.

    ``directions`` are the update's strongest, in [1, min(m, n)].

    Returns:
        ``gain``, ``ratio`` and ``energy`` ``[b]``, ``projection`` ``[b, r]``; see
        :class:`jaxsafety.linalg.update_spaces.InputSpace`.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.2 and figure 5.
    """
    space = update_spaces.input_space(
        base[None],
        (tuned - base)[None],
        inputs=inputs[None],
        rank=directions,
        method="randomized",
        key=jax.random.key(0),
    )
    found = {name: getattr(space, name)[0] for name in ("gain", "ratio", "energy")}
    return found | {"projection": jnp.abs(space.projections[0])}
