"""A gate over an update: which parts of what training has changed are kept, learned by any method's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsafety import tree
from jaxsafety.config.fields import check, static, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.types import Key, Leaf, Parametrisation, Params

Per = Literal["entry", "row", "leaf"]
Kept = Literal["expected", "hard", "sampled", "shuffled"]
# Of the one mask that is drawn to be kept.
_DRAWN = 53


@dataclass(frozen=True)
class Config:
    """The update is that of the model that training begins with from ``base``; its gates begin half open.

    Attributes:
        base: the ancestor that the update is taken from: ``root``, or the nearest one of a name.
        per: one gate for every ``entry``, every ``row`` of a matrix (its inputs), or every ``leaf`` and layer.
        scale: multiples of the gated update, lambda.
        temperature: of the relaxed gates while they are trained, T.
        noise: whether gates are drawn at every step (the concrete distribution).
        kept: what the model is judged with: the ``expected`` gates ``sigmoid(logit)``, ``hard`` ones, open where that
            is above one half, ``sampled`` ones, open with that probability, or, to compare with, ``shuffled`` ones: the
            expected ones of every leaf in random places. Draws are the same for every model.
        rescale: whether the gated update is divided by the gates' mean, which keeps its size.

    References:
        Yi et al. 2024 (arXiv 2405.09055), SOMF: ``m = sigmoid((logit + logistic noise) / T)``, ``m * delta / mean(m)``.
        Fidelity: one update instead of several; the mask is by default the expected one, where the paper's is
        ``sampled``; gates per row and leaf are ours.
    """

    base: str = "root"
    per: Per = "entry"
    scale: float = traced(1.0, above=0)
    temperature: float = static(0.5, above=0)
    noise: bool = True
    kept: Kept = "expected"
    rescale: bool = True
    __post_init__ = check


@checked
def gated(delta: Params, gates: Params, *, scale: float | Array, rescale: bool = True) -> Params:
    """Returns ``scale * gates * delta``, divided by the mean of all gates over all entries with ``rescale``.

    ``gates`` are in [0, 1], of the structure of ``delta`` and of shapes that broadcast to its own.

    Raises:
        ValueError: another structure, or a gate that does not broadcast to its leaf; the path is named.
    """
    tree.check_structure(gates, delta, names=("gates", "delta"))
    flat = tree.flatten(delta)
    whole = tree.label(gates, lambda path, gate: _spread(path, gate, flat[path].shape))
    if rescale:
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(whole))
        # Of gates that are all shut nothing is left, whatever it is divided by.
        scale = scale * float(sum(leaf.size for leaf in jax.tree.leaves(whole))) / jnp.where(total > 0, total, 1)
    return jax.tree.map(lambda gate, leaf: (scale * gate * leaf).astype(leaf.dtype), whole, delta)


def _spread(path: str, gate: Leaf, shape: tuple[int, ...]) -> Array:
    try:
        return jnp.broadcast_to(gate, shape)
    except ValueError as error:
        raise ValueError(f"gates: {path} has shape {gate.shape}, expected one that broadcasts to {shape}") from error


def _gates(path: str, leaf: Array, per: Per) -> Array:
    if per == "entry":
        shape = leaf.shape
    else:
        first = leaf.shape[:1] if tree.is_stacked(path) else ()
        rows = leaf.shape[len(first) : -1] if per == "row" else (1,) * (leaf.ndim - len(first) - 1)
        shape = (*first, *rows, 1)
    return jnp.zeros(shape, jnp.float32)


def init(trees: dict[str, Params], *, config: Config, key: Key) -> Params:
    """See :class:`jaxsafety.types.Parametrisation`."""
    return tree.label(trees["parent"], lambda path, leaf: _gates(path, leaf, config.per))


def join(trees: dict[str, Params], trained: Any, *, config: Config, key: Key | None = None) -> Params:
    """See :class:`jaxsafety.types.Parametrisation`."""
    if key is not None:
        logits = _noisy(trained, key) if config.noise else trained
        gates = jax.tree.map(lambda leaf: jax.nn.sigmoid(leaf / config.temperature), logits)
    elif config.kept in ("expected", "shuffled"):
        gates = jax.tree.map(jax.nn.sigmoid, trained)
        gates = gates if config.kept == "expected" else _shuffled(gates, jax.random.key(_DRAWN))
    else:
        logits = _noisy(trained, jax.random.key(_DRAWN)) if config.kept == "sampled" else trained
        gates = jax.tree.map(lambda leaf: (leaf > 0).astype(leaf.dtype), logits)
    delta = tree.difference(trees["parent"], trees["base"])
    kept = gated(delta, gates, scale=config.scale, rescale=config.rescale)
    return jax.tree.map(jnp.add, trees["base"], kept)


def _shuffled(gates: Any, key: Key) -> Any:
    leaves, structure = jax.tree.flatten(gates)
    keys = jax.random.split(key, len(leaves))
    moved = [jax.random.permutation(k, leaf.ravel()).reshape(leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


def _noisy(logits: Any, key: Key) -> Any:
    leaves, structure = jax.tree.flatten(logits)
    keys = jax.random.split(key, len(leaves))
    drawn = [leaf + jax.random.logistic(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, drawn)


PARAMETRISATION = Parametrisation(Config, init, join, roles=("base",))
