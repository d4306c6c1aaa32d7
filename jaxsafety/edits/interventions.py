"""Causal tests of an update: what a model does with a part or a multiple of its delta W, or with another's.

A *part* is a tree of the same structure with zeros in place of what is left out, so every part is added to the base in
the same way (:func:`scaled`, :func:`jaxsafety.tree.interpolate`), and ``only`` a part plus ``all_but`` it is the whole
update. Trees are those of one model: leaves below ``blocks`` lead with the layer; callers vmap over seeds.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafety import tree
from jaxsafety.config.names import check_name
from jaxsafety.linalg import subspace, svd
from jaxsafety.linalg.unbatched import orthonormal
from jaxsafety.types import Key, Params

Part = Literal["whole", "mlp", "up", "down", "attention"]
Keep = Literal["only", "all_but"]

_PATTERNS: dict[str, str] = {
    "whole": ".*",
    "mlp": "blocks/mlp/.*",
    "up": "blocks/mlp/up(_bias)?",
    "down": "blocks/mlp/down(_bias)?",
    "attention": "blocks/attn/.*",
}


def part_delta(delta: Params, part: Part) -> Params:
    """Returns the named part of an update, zeros elsewhere; matrices go with their biases.

    Raises:
        ValueError: unknown part, or a tree that has no such leaves.
    """
    check_name("part", part, get_args(Part))
    return tree_part(delta, _PATTERNS[part])


def tree_part(delta: Params, pattern: str) -> Params:
    """Returns the leaves whose whole path matches the regular expression ``pattern``, zeros elsewhere.

    Raises:
        ValueError: nothing matches; the message lists the paths there are.
    """
    chosen = tree.select(delta, pattern)
    return tree.label(delta, lambda path, leaf: leaf if path in chosen else jnp.zeros_like(leaf))


def scaled(base: Params, delta: Params, *, alpha: float | Float[Array, ""], part: Part = "whole") -> Params:
    """Walks along an update: ``W + alpha * part(delta W)``.

    Args:
        base: the parameters that the update was made to.
        delta: the update, ``tree.difference(tuned, base)``.
        alpha: 0 is the base, 1 the tuned model (of that part), above 1 extrapolates.
        part: which leaves move.

    Returns:
        Parameters.

    Raises:
        ValueError: unknown part, or trees that differ in structure or shape.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.2, interventions along delta W.

    Fidelity: faithful for ``whole`` (every parameter, norms and embeddings included); the other parts are ours.
    """
    return tree.interpolate(base, part_delta(delta, part), alpha)


def transferred(tuned: Params, other_delta: Params, *, alpha: float | Float[Array, ""]) -> Params:
    """Returns one method's model plus ``alpha`` times the update of another method that started from the same base.

    Raises:
        ValueError: the trees differ in structure or shape.
    """
    tree.check_match(tuned, other_delta, names=("tuned", "other_delta"))
    return tree.interpolate(tuned, other_delta, alpha)


def null_part(
    base: Params, delta: Params, *, pattern: str = tree.MLP_MATRICES, energy: float = 0.9, keep: Keep
) -> Params:
    """The part of an update whose outputs the base hardly uses, ``dW (I - P)``; or the update without it.

    ``P`` projects on the base matrix's leading output directions, layer by layer, that hold ``energy`` of its squared
    spectrum. If safety fine-tuning works by what it adds outside the base's range, then ``only`` this part makes a
    model refuse and ``all_but`` it does not, beyond what :func:`random_part` does with as large a subspace.

    Args:
        base: the parameters that the update was made to.
        delta: the update, ``tree.difference(tuned, base)``.
        pattern: paths of the ``[l, m, n]`` stacks to split.
        energy: share of a base matrix's energy that counts as its range, in (0, 1].
        keep: ``only`` this part of those matrices and zeros everywhere else, or the whole update ``all_but`` it.

    Returns:
        An update of the same structure.

    Raises:
        ValueError: energy out of range, an unknown ``keep``, a pattern that matches nothing or something else than
            stacks of matrices, trees that differ in structure or shape, or a base that is not finite.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.2 and Figure 4: the claim that this tests.

    Fidelity: the intervention is ours; P is the paper's, in its clean definition (no centring, whole columns).
    """
    ranges = _ranges(base, delta, pattern=pattern, energy=energy)
    return _kept(delta, {path: _outside(tree.flatten(delta)[path], basis) for path, basis in ranges.items()}, keep)


def range_part(
    base: Params, delta: Params, *, pattern: str = tree.MLP_MATRICES, energy: float = 0.9, keep: Keep
) -> Params:
    """The part of an update whose outputs lie in the base's range, ``dW P``; or the update without it.

    Together with :func:`null_part`, whose arguments and errors it has, it makes up those matrices' update.
    """
    ranges = _ranges(base, delta, pattern=pattern, energy=energy)
    return _kept(delta, {path: _inside(tree.flatten(delta)[path], basis) for path, basis in ranges.items()}, keep)


def random_part(
    base: Params, delta: Params, *, pattern: str = tree.MLP_MATRICES, energy: float = 0.9, keep: Keep, key: Key
) -> Params:
    """The control of :func:`null_part`: a uniformly random subspace of the null space's dimension, layer by layer.

    Of an update's energy, ``1 - k / n`` is expected in a random subspace that leaves out k of n dimensions. What the
    null-space part does beyond this one is due to where the null space lies, not to how large it is.

    Args:
        base: the parameters that the update was made to; their spectra fix the dimensions.
        delta: the update.
        pattern: paths of the ``[l, m, n]`` stacks to split.
        energy: share of a base matrix's energy that counts as its range, in (0, 1].
        keep: ``only`` this part of those matrices and zeros everywhere else, or the whole update ``all_but`` it.
        key: typed PRNG key; every matrix draws its own subspace.

    Returns:
        An update of the same structure.

    Raises:
        ValueError: as :func:`null_part`.
    """
    ranges = _ranges(base, delta, pattern=pattern, energy=energy)
    keys = jax.random.split(key, len(ranges))
    parts = {}
    for key, (path, basis) in zip(keys, ranges.items(), strict=True):
        # The complement of a random k-dimensional subspace is a random (n - k)-dimensional one, and the cheaper draw.
        drawn = orthonormal(jax.random.normal(key, basis.shape, basis.dtype))
        used = jnp.any(basis != 0, axis=1, keepdims=True)
        parts[path] = _outside(tree.flatten(delta)[path], jnp.where(used, drawn, 0))
    return _kept(delta, parts, keep)


def rank_part(delta: Params, *, rank: int | Int[Array, ""], pattern: str = tree.MATRICES) -> Params:
    """The update with its matrices cut to their leading ``rank`` singular directions; everything else is kept whole.

    Args:
        delta: the update.
        rank: singular directions kept in every layer, from 1 to the most that a matched matrix has; a matrix that has
            fewer is kept whole. May be traced, so that one program serves every rank.
        pattern: paths of the ``[l, m, n]`` stacks to cut.

    Returns:
        An update of the same structure.

    Raises:
        ValueError: rank out of range, a pattern that matches nothing or something else than stacks of matrices, or an
            update that is not finite.
    """
    tree.check_finite(delta, name="delta")
    stacks = tree.matrix_stacks(delta, pattern)
    most = max(min(stack.shape[1:]) for stack in stacks.values())
    _check_index("rank", rank, smallest=1, largest=most)
    parts = {path: _truncated(stack, jnp.asarray(rank)) for path, stack in stacks.items()}
    return tree.label(delta, lambda path, leaf: parts[path].astype(leaf.dtype) if path in parts else leaf)


def layer_part(delta: Params, *, layer: int | Int[Array, ""]) -> Params:
    """Returns one layer's part of an update, zeros in the other layers and outside the blocks.

    Args:
        delta: the update, its leaves below ``blocks`` ``[l, ...]``.
        layer: 0-based index. May be traced.

    Raises:
        ValueError: layer out of range, or a tree without blocks.
    """
    blocks = tree.select(delta, "blocks/.*")
    _check_index("layer", layer, smallest=0, largest=min(len(leaf) for leaf in blocks.values()) - 1)

    def only_layer(path: str, leaf: Array) -> Array:
        if path not in blocks:
            return jnp.zeros_like(leaf)
        chosen = (jnp.arange(len(leaf)) == layer).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(chosen, leaf, jnp.zeros_like(leaf))

    return tree.label(delta, only_layer)


def _ranges(base: Params, delta: Params, *, pattern: str, energy: float) -> dict[str, Float[Array, "l n r"]]:
    """Returns each matched base matrix's leading output directions, zeros in the columns beyond."""
    tree.check_match(base, delta, names=("base", "delta"))
    tree.check_finite(base, name="base")
    tree.check_finite(delta, name="delta")
    bases = {}
    for path, stack in tree.matrix_stacks(base, pattern).items():
        found = svd.decompose(stack)
        used = subspace.leading(subspace.rank_at_energy(found.values, energy=energy), found.values.shape[-1])
        bases[path] = jnp.where(used[:, None, :], found.outputs, 0)
    return bases


def _inside(matrices: Float[Array, "l m n"], basis: Float[Array, "l n r"]) -> Float[Array, "l m n"]:
    return _product(_product(matrices.astype(basis.dtype), basis), basis.mT)


def _outside(matrices: Float[Array, "l m n"], basis: Float[Array, "l n r"]) -> Float[Array, "l m n"]:
    return matrices.astype(basis.dtype) - _inside(matrices, basis)


def _truncated(matrices: Float[Array, "l m n"], rank: Int[Array, ""]) -> Float[Array, "l m n"]:
    found = svd.decompose(matrices)
    values = jnp.where(subspace.leading(rank, found.values.shape[-1])[None], found.values, 0)
    return _product(found.inputs * values[:, None, :], found.outputs.mT)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _kept(delta: Params, parts: dict[str, Float[Array, "l m n"]], keep: Keep) -> Params:
    """Returns the parts alone or the update without them; parts may be wider than the leaves that they belong to."""
    check_name("keep", keep, get_args(Keep))

    def leaf_of(path: str, leaf: Array) -> Array:
        if path not in parts:
            return jnp.zeros_like(leaf) if keep == "only" else leaf
        part = parts[path] if keep == "only" else leaf.astype(parts[path].dtype) - parts[path]
        return part.astype(leaf.dtype)

    return tree.label(delta, leaf_of)


def _check_index(name: str, value: int | Int[Array, ""], *, smallest: int, largest: int) -> None:
    if not isinstance(value, jax.core.Tracer) and not smallest <= int(value) <= largest:
        raise ValueError(f"{name}: got {int(value)}, expected from {smallest} to {largest}")
