"""Safe and unsafe clusters in activation space: whose mean a sample is nearer to, and how far apart the classes are.

Activations are ``[l, b, f]``, one vector per layer and sample. ``weights`` are masks of 0 and 1 over the samples (None:
all), so that a subset (the attacks that succeeded) keeps its shape under jit and vmap; what they leave out may be
anything, NaN included. Means belong to other draws than the samples that are measured: in many dimensions every sample
lies nearer to a mean that it is part of. Statistics are float32, or float64 for float64 input.
"""

from __future__ import annotations

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_finite, known
from jaxsafety.entry.programs import compiled, undifferentiated
from jaxsafety.linalg.unbatched import singular_values
from jaxsafety.types import Leaf

Form = Literal["euclidean", "cosine"]
Weights = Bool[Array, " b"] | Real[Array, " b"]
OtherWeights = Bool[Array, " c"] | Real[Array, " c"]

# A spread of this many roundings of what it is computed from is not a spread.
_ROUNDINGS = 4


@flax.struct.dataclass
class Centroids:
    """The means ``[l, f]`` that samples are compared with: mu_S of the activations of safe prompts, mu_U of unsafe."""

    safe: Leaf
    unsafe: Leaf


@flax.struct.dataclass
class Separation:
    """How far apart safe and unsafe samples lie in each layer; NaN where undefined.

    Attributes:
        gap: ``[l]`` mean tau of the safe samples minus that of the unsafe ones, in the activations' unit.
        effect_size: ``[l]`` Cohen's d, the gap over the pooled standard deviation; NaN unless both classes have two
            samples and the spread exceeds rounding.
        relative_gap: ``[l]`` ``gap / (2 |mu_S - mu_U|)`` in [-1, 1], without a unit; NaN where the means coincide.
        accuracy: ``[l]`` balanced accuracy of the nearest mean, in [0, 1]; a tie counts half, chance is 0.5.
        distance: ``[l]`` ``|mu_S - mu_U|``, in the unit of the activations.
    """

    gap: Leaf
    effect_size: Leaf
    relative_gap: Leaf
    accuracy: Leaf
    distance: Leaf


@checked
def centroids(
    safe: Float[Array, "l b f"],
    unsafe: Float[Array, "l c f"],
    *,
    safe_weights: Weights | None = None,
    unsafe_weights: OtherWeights | None = None,
) -> Centroids:
    """Means of the two classes, NaN of an empty one, from draws held out from the samples that :func:`tau` measures.

    Raises:
        ValueError: no samples of a class, which is named, or (unless traced) none chosen, weights other than 0 and 1,
            chosen values not finite.
    """
    _check_samples(safe=(safe, safe_weights), unsafe=(unsafe, unsafe_weights))
    return Centroids(*(_mean(*_samples(*given))[:, 0] for given in ((safe, safe_weights), (unsafe, unsafe_weights))))


@checked
def tau(activations: Float[Array, "l b f"], centroids: Centroids, *, form: Form = "euclidean") -> Float[Array, "l b"]:
    """Which mean a sample is nearer to: ``|a - mu_U| - |a - mu_S|``, or ``cos(a, mu_S) - cos(a, mu_U)``.

    Returns:
        Positive for nearer to the safe mean. Euclidean: at most ``|mu_S - mu_U|`` in size, in the unit of the
        activations. Cosine: in [-2, 2], NaN where a vector is zero.

    Raises:
        ValueError: an unknown form, or (unless traced) values that are not finite.

    References:
        Jain et al. 2024 (arXiv 2407.10264), equation 2 and figure 3.

    Fidelity: the paper's tau, over all the neurons given. The released code keeps the first d of the 4 d neurons (pass
        ``activations[..., :d]`` and means of the same) and gives its cosine form the opposite sign.
    """
    _check_centroids(activations, centroids)
    return _tau(activations, centroids, form=form)


@compiled("form")
def _tau(activations: Array, centroids: Centroids, *, form: Form) -> Float[Array, "l b"]:
    a, safe, unsafe = _with_centroids(activations, centroids)
    apart = safe - unsafe
    if form == "euclidean":
        return _longer(a - unsafe, a - safe, difference=apart)
    # mu_S / |mu_S| - mu_U / |mu_U|, of which two cosines near 1 would leave nothing.
    ratio = _longer(safe, unsafe, difference=apart) / _norm(unsafe)
    turned = (apart - ratio[..., None] * unsafe) / _norm(safe)[..., None]
    return _dot(a, turned) / _norm(a)


@checked
def relative_tau(activations: Float[Array, "l b f"], centroids: Centroids) -> Float[Array, "l b"]:
    """Euclidean tau over its largest possible size, ``tau / |mu_S - mu_U|``: comparable across layers and methods.

    Returns:
        In [-1, 1]: 1 at the safe mean and beyond it, -1 at the unsafe one; NaN where the means coincide.

    Raises:
        ValueError: (unless traced) values that are not finite.

    Fidelity: not in the paper, whose tau grows with the activations: more than tenfold between its methods.
    """
    return _relative(tau(activations, centroids), _distance(centroids)[:, None])


@checked
def separation(
    tau_safe: Float[Array, "l b"],
    tau_unsafe: Float[Array, "l c"],
    *,
    centroids: Centroids,
    safe_weights: Weights | None = None,
    unsafe_weights: OtherWeights | None = None,
) -> Separation:
    """How well the Euclidean :func:`tau` tells safe from unsafe samples (or a jailbreak's), in five measures.

    ``centroids`` are those that tau was taken with. All measures but the distance are NaN if a class is empty.

    Raises:
        ValueError: as :func:`centroids`.

    References:
        Jain et al. 2024 (arXiv 2407.10264), figure 3; Cohen 1988, section 2.5.2 (effect size, pooled with n - 1).

    Fidelity: the paper plots mean and spread of tau; effect size, relative gap and accuracy, without a unit, are added.
    """
    _check_samples(tau_safe=(tau_safe, safe_weights), tau_unsafe=(tau_unsafe, unsafe_weights))
    return _separation((tau_safe, safe_weights), (tau_unsafe, unsafe_weights), centroids)


@compiled()
def _separation(
    safe: tuple[Array, Array | None], unsafe: tuple[Array, Array | None], centroids: Centroids
) -> Separation:
    safe, unsafe = _samples(*safe), _samples(*unsafe)
    distance = _distance(centroids)
    gap = (_mean(*safe) - _mean(*unsafe))[:, 0]
    spread = _pooled_std(safe, unsafe)
    # Tau itself is only known to some roundings of the distance.
    defined = spread > _ROUNDINGS * jnp.finfo(spread.dtype).eps * distance
    # A sign is 0 for a tie and NaN for a NaN.
    right = [_mean((1 + sign * jnp.sign(taus)) / 2, mask)[:, 0] for sign, (taus, mask) in ((1, safe), (-1, unsafe))]
    return Separation(
        gap=gap,
        effect_size=jnp.where(defined, gap / jnp.where(defined, spread, 1.0), jnp.nan),
        relative_gap=_relative(gap, 2 * distance),
        accuracy=(right[0] + right[1]) / 2,
        distance=distance,
    )


@checked
def leading_share(
    activations: Float[Array, "l b f"], *, weights: Weights | None = None
) -> tuple[Float[Array, " l"], Float[Array, " l"]]:
    """Share of the leading singular value in a centred cluster, ``s_1 / sum_i s_i`` and ``s_1^2 / sum_i s_i^2``.

    Returns:
        Share of the spectrum and share of the energy of one class, at most 1. NaN for fewer than two samples, and for
        samples that are all the same. n samples have at most ``n - 1`` directions, so the shares are at least
        ``1 / min(n - 1, f)``: compare equal n.

    Raises:
        ValueError: as :func:`centroids`, or a gradient is asked; it has none.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 4.1: the unsafe cluster becomes low-rank, a share of up to 62 %.

    Fidelity: which of the two shares the paper reports is not known; both are given.
    """
    _check_samples(activations=(activations, weights))
    return _leading_share(undifferentiated("leading_share", activations), weights)


@compiled()
def _leading_share(activations: Array, weights: Array | None) -> tuple[Float[Array, " l"], Float[Array, " l"]]:
    values, mask = _samples(activations, weights)
    # What is left out is put to zero after the centring: rows of zeros add no singular value.
    centred = jnp.where(mask, values - _mean(values, mask), 0.0)
    scale = jnp.max(jnp.abs(centred), axis=(1, 2), keepdims=True)  # squares of a tight cluster would underflow
    rounding = _ROUNDINGS * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), axis=(1, 2), keepdims=True)
    spectrum = singular_values(centred / jnp.where(scale > rounding, scale, jnp.nan))
    share = spectrum[:, 0] / jnp.sum(spectrum, axis=-1)
    return share, spectrum[:, 0] ** 2 / jnp.sum(spectrum**2, axis=-1)


def _check_samples(**classes: tuple[Array, Array | None]) -> None:
    for name, (values, weights) in classes.items():
        if not (count := values.shape[1]):
            raise ValueError(f"empty class: {name} holds no samples, expected at least one")
        kept, numbers = np.ones(count, bool) if weights is None else known(weights), known(values)
        if kept is not None and not np.isin(kept, (0, 1)).all():
            raise ValueError(f"weights of {name} hold other values than 0 and 1, expected a mask over its samples")
        if kept is not None and not kept.any():
            raise ValueError(f"empty class: weights of {name} choose none of {count} samples, expected at least one")
        if kept is not None and numbers is not None:
            check_finite(**{name: numbers[:, kept != 0]})


def _samples(values: Array, weights: Array | None) -> tuple[Array, Array]:
    """One class: values ``[l, b, ...]`` of at least float32, zero where left out, and a mask that broadcasts to it."""
    chosen = jnp.ones((values.shape[1],), bool) if weights is None else weights != 0
    mask = chosen.reshape(1, -1, *[1] * (values.ndim - 2))
    # A NaN that is left out would spread through a product with zero.
    return jnp.where(mask, values.astype(jnp.promote_types(values.dtype, jnp.float32)), 0.0), mask


def _mean(values: Array, mask: Array) -> Array:
    """Mean over axis 1 of what the mask chooses, NaN for nothing; the axis is kept."""
    count = jnp.sum(mask, axis=1, keepdims=True, dtype=values.dtype)
    rough = jnp.sum(jnp.where(mask, values, 0.0), axis=1, keepdims=True) / count
    # A second pass takes back the rounding of the first: a thousand terms far from zero lose three digits.
    return rough + jnp.sum(jnp.where(mask, values - rough, 0.0), axis=1, keepdims=True) / count


def _pooled_std(*classes: tuple[Array, Array]) -> Float[Array, " l"]:
    """Root of the pooled variance, each class about its own mean; NaN unless each has two samples."""
    squares = [jnp.sum(jnp.where(mask, (t - _mean(t, mask)) ** 2, 0.0), axis=1) for t, mask in classes]
    counts = [jnp.sum(mask, axis=1, dtype=square.dtype) for square, (_, mask) in zip(squares, classes, strict=True)]
    enough = jnp.minimum(*counts) >= 2
    variance = sum(squares) / jnp.where(enough, sum(counts) - 2, 1.0)
    # A root has no slope at zero that could be multiplied with nothing.
    root = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), variance)
    return jnp.where(enough, root, jnp.nan)


def _check_centroids(activations: Array, centroids: Centroids) -> None:
    means = {"safe mean": centroids.safe, "unsafe mean": centroids.unsafe}
    shape = activations.shape[:1] + activations.shape[2:]
    for name, mean in means.items():
        if mean.shape != shape:
            raise ValueError(f"{name} has shape {mean.shape}, expected {shape} beside activations {activations.shape}")
    check_finite(activations=activations, **means)


def _with_centroids(activations: Array, centroids: Centroids) -> tuple[Array, Array, Array]:
    """Activations and both means ``[l, 1, f]``, in one dtype of at least float32."""
    dtype = jnp.promote_types(jnp.result_type(activations, centroids.safe, centroids.unsafe), jnp.float32)
    return activations.astype(dtype), *(mean.astype(dtype)[:, None] for mean in (centroids.safe, centroids.unsafe))


def _distance(centroids: Centroids) -> Float[Array, " l"]:
    dtype = jnp.promote_types(jnp.result_type(centroids.safe, centroids.unsafe), jnp.float32)
    return _norm(centroids.safe.astype(dtype) - centroids.unsafe.astype(dtype))


def _relative(values: Array, size: Array) -> Array:
    # Rounding may take a value past its bound; at the bound itself a clip would halve the gradient.
    share = values / jnp.where(size > 0, size, jnp.nan)
    return jnp.where(jnp.abs(share) > 1, jnp.sign(share), share)


def _longer(x: Array, y: Array, *, difference: Array) -> Array:
    """``|x| - |y|`` given ``x - y``, as ``(x - y) (x + y) / (|x| + |y|)``.

    It errs by the rounding of ``x - y``; two norms would by their own, which for distant samples exceeds a small tau.
    """
    total = (_norm(x) + _norm(y))[..., None]
    return _dot(difference, (x + y) / jnp.where(total > 0, total, 1.0))


def _norm(vectors: Array) -> Array:
    """Euclidean norm over the last axis, scaled so that squares neither overflow nor underflow; no slope at zero."""
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    scaled = vectors / jnp.where(scale > 0, scale, 1.0)
    return scale[..., 0] * jnp.sqrt(jnp.where(scale[..., 0] > 0, _dot(scaled, scaled), 1.0))


def _dot(a: Array, b: Array) -> Array:
    # Element by element: a matrix unit may round its factors to fewer bits.
    return jnp.sum(a * b, axis=-1)
