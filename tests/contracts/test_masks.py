"""What a mask leaves out changes neither a value nor a gradient, whatever stands there; a kink makes no NaN of one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import losses
from jaxsafety.analysis import uncertainty
from jaxsafety.attacks import soft_tokens
from jaxsafety.linalg import alignment, clusters, masked, sensitivity, subspace, update_spaces
from jaxsafety.methods import circuit_breakers, graddiff, primal_dual, rmu
from jaxsafety.models import generation, llama
from jaxsafety.training import preferences
from tests.contracts import public
from tests.contracts.public import AT, BASE, KEPT, KEY, LLAMA, LLAMA_PARAMS, LOGITS, LOGPROBS, MASK, PLACES, TARGETS

BAD = (np.nan, np.inf, -np.inf, np.finfo(np.float32).max)
EMBEDDINGS, MEANS, ATTACK = public.EMBEDDINGS, public.MEANS, {"max_count": 2, "steps": 2, "key": KEY} | public.ATTACK
SEEN = np.arange(public.T)[None] <= PLACES["position"][:, None]
HELD = np.arange(2)[None, :, None] < np.full((3, 1, 4), 1)


def mixing(x):
    """A causal model whose later inputs are multiplied with no weight."""
    return (jnp.tril(jnp.ones((x.shape[1],) * 2)) @ x) ** 2 @ public.HEAD.args[0]


def nll(logits):
    return losses.nll(losses.token_logprobs(logits, np.where(MASK, TARGETS, -100)), MASK)[0]


def llama_logits(embeddings):
    real = llama.apply(LLAMA_PARAMS, embeddings, config=LLAMA, mask=MASK).logits
    return jnp.where(MASK[..., None], real, 0.0)


COLUMNS = np.broadcast_to(np.array([True, False]), public.BASIS.shape)
# Name: a function of what is masked, its values, and where they count.
CASES = {
    "nll of logits": (nll, LOGITS, MASK[..., None]),
    "masked_sum": (lambda x: losses.masked_sum(x, MASK), LOGPROBS, MASK),
    "divergence of logits": (
        lambda x: losses.divergence(x, jnp.full_like(x, -np.log(public.V)), MASK), LOGITS, MASK[..., None]
    ),
    "divergence of a reference": (lambda x: losses.divergence(LOGITS, x, MASK), -np.abs(LOGITS), MASK[..., None]),
    "margin": (
        lambda x: preferences.margin(x, LOGPROBS, MASK, reduction="mean"), -np.abs(LOGITS[..., 0]), MASK
    ),
    "ascent": (lambda x: graddiff.ascent(x, MASK, bound=9.0, reduction="sum"), LOGPROBS, MASK),
    "primal_dual": (
        lambda x: primal_dual.primal_dual(x, MASK, KEPT, log_multiplier=0.5), LOGPROBS, MASK
    ),
    "sequence_logprobs": (lambda x: losses.sequence_logprobs(x, MASK, reduction="mean"), LOGPROBS, MASK),
    "perplexity": (lambda x: uncertainty.perplexity(x, MASK), LOGPROBS, MASK),
    "cosine": (
        lambda x: circuit_breakers.cosine(x, 1 + EMBEDDINGS, MASK), EMBEDDINGS, MASK[..., None],
    ),
    "rmu": (
        lambda x: rmu.rmu(
            x, x, EMBEDDINGS, goal=EMBEDDINGS[0, 0], on_harmful=MASK, on_safe=MASK, alpha=0.5
        )["retain"][0], 1 + EMBEDDINGS, MASK[..., None],
    ),
    "averaged": (lambda x: masked.averaged(x, MASK), LOGPROBS, MASK),
    "centroids": (
        lambda x: clusters.centroids(x, public.UNSAFE, safe_weights=KEPT), public.SAFE, KEPT[None, :, None],
    ),
    "separation": (
        lambda x: clusters.separation(x, public.SAFE[..., 0], centroids=MEANS, safe_weights=KEPT),
        public.UNSAFE[..., 0], KEPT[None],
    ),
    "projection_energy": (
        lambda x: subspace.projection_energy(public.VECTORS, x, mask=COLUMNS[:, 0]), public.BASIS, COLUMNS
    ),
    "complement_energy": (
        lambda x: subspace.complement_energy(public.VECTORS, x, mask=COLUMNS[:, 0]), public.BASIS, COLUMNS
    ),
    "gradient_norm": (
        lambda x: sensitivity.gradient_norm(mixing, x, **PLACES), EMBEDDINGS, SEEN[..., None]
    ),
    "insert": (
        lambda x: soft_tokens.insert(EMBEDDINGS, x, at=AT, count=1), public.normal(3, 2, 4), HELD
    ),
    "llama.apply": (llama_logits, EMBEDDINGS, MASK[..., None]),
    "overlap": (
        lambda x: alignment.overlap(jnp.where(COLUMNS, x, jnp.nan)), np.abs(public.BASIS), COLUMNS
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_garbage_behind_a_mask_is_no_part_of_value_or_gradient(name, unchecked):
    function, values, counts = CASES[name]
    run = jax.jit(jax.value_and_grad(lambda x: public.weighted(function(x))))
    value, gradient = run(values)
    assert np.isfinite(value) and np.any(gradient)
    counts = np.broadcast_to(counts, values.shape)
    np.testing.assert_array_equal(np.where(counts, 0, gradient), 0)
    for bad in BAD:
        other, slope = run(np.where(counts, values, np.float32(bad)))
        assert other == value, bad
        np.testing.assert_array_equal(slope, gradient)


def test_garbage_behind_a_mask_changes_no_iteration(unchecked):
    """Of what has no gradient."""
    run = jax.jit(partial(sensitivity.jacobian_norm, mixing, key=KEY))
    found = run(EMBEDDINGS, **PLACES)
    share, angles = (jax.jit(function) for function in (clusters.leading_share, subspace.principal_angles))
    for bad in BAD:
        assert jax.tree.all(
            jax.tree.map(np.array_equal, run(np.where(SEEN[..., None], EMBEDDINGS, bad), **PLACES), found)
        )
        rows = np.where(KEPT[None, :, None], public.SAFE, bad)
        np.testing.assert_array_equal(share(rows, weights=KEPT), share(public.SAFE, weights=KEPT))
        columns = np.where(COLUMNS, public.BASIS, bad)
        given = {"mask_b": COLUMNS[:, 0]}
        np.testing.assert_array_equal(
            angles(public.OTHER, columns, **given), angles(public.OTHER, public.BASIS, **given)
        )


def test_an_attack_steps_as_if_what_is_not_scored_were_something_else(unchecked):
    def attacked(bad):
        # Targets move along with what is inserted before them.
        scored = np.asarray(soft_tokens.shifted_mask(MASK, at=AT, count=1))
        said = np.where(scored, 0, np.float32(bad))[..., None]
        return soft_tokens.optimise(lambda x: mixing(x) + said, EMBEDDINGS, **ATTACK)

    clean = attacked(1.0)
    assert np.isfinite(clean.soft).all() and np.any(clean.soft)
    for bad in BAD:
        jax.tree.map(np.testing.assert_array_equal, attacked(bad), clean)


# Name: a function, a point on its kink, and the gradient there of the sum of what it gives.
LINE = np.array([[[1.0, 2.0, 2.0, 0, 0, 0]]], np.float32)
KINKS = {
    "bounded, at the bound half": (lambda x: losses.bounded(x, bound=1.0), [[-1.0, -2.0]], [[0.5, 0.0]]),
    "token_logprobs, a token that is never said": (
        lambda x: losses.token_logprobs(x, np.zeros((1, 1), int)), [[[0.0, 0.0, -np.inf]]], [[[0.5, -0.5, 0.0]]]
    ),
    "changed_norm of no update": (
        lambda x: update_spaces.changed_norm(BASE, x), np.zeros_like(BASE), np.zeros_like(BASE)
    ),
    "input_space of what the base does not read": (
        lambda x: update_spaces.input_space(
            jnp.zeros((1, 2, 2)), jnp.asarray([[[2.0, 0.0], [0.0, 0.0]]]), inputs=x
        ).gain, [[[0.0, 1.0]]], [[[0.0, 0.0]]],
    ),
    "tau, at the safe mean": (
        lambda x: clusters.tau(x, clusters.Centroids(jnp.asarray(LINE[0]), jnp.zeros((1, 6)))), LINE, LINE / 3
    ),
    "effective_rank, a value of zero": (subspace.effective_rank, [[1.0, 1.0, 0.0]], [[0.0, 0.0, 1 - np.log(2)]]),
    "stable_rank, the largest value": (subspace.stable_rank, [[2.0, 1.0]], [[-0.25, 0.5]]),
    "projection_energy, inside the subspace": (
        lambda x: subspace.projection_energy(x, jnp.eye(3)[:, :2]), [[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]
    ),
    "cosine of an update with itself": (
        lambda x: subspace.cosine(x, jnp.asarray([[1.0, 0.0]])), [[1.0, 0.0]], [[0.0, 0.0]]
    ),
    "gradient_norm of a flat model": (
        lambda x: sensitivity.gradient_norm(lambda x: x**2, x, position=np.array([0]), prompt=np.array([[True]])),
        [[[0.0, 0.0]]], [[[0.0, 0.0]]],
    ),
    "generate: tokens do not move": (
        lambda x: generation.generate(
            ({**LLAMA_PARAMS, "unembed": x}, public.LLAMA_MODEL), TARGETS, count=2
        ).astype(float), LLAMA_PARAMS["unembed"], np.zeros_like(LLAMA_PARAMS["unembed"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(KINKS))
def test_gradients_at_kinks(name, unchecked):
    function, point, expected = KINKS[name]
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(function(x))))(jnp.asarray(point))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_a_class_of_one_sample_has_no_effect_size_and_spoils_no_gradient(unchecked):
    def gap(x):
        found = clusters.separation(
            x, jnp.zeros((1, 1)), centroids=clusters.Centroids(jnp.ones((1, 2)), jnp.zeros((1, 2)))
        )
        return jnp.sum(found.gap) + jnp.sum(jnp.nan_to_num(found.effect_size))

    np.testing.assert_allclose(jax.jit(jax.grad(gap))(jnp.asarray([[1.0, 2.0]])), [[0.5, 0.5]])
