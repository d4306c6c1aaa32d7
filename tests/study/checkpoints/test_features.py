"""What is measured of activations, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.study.checkpoints import features

# float32 beside float64, over a few dozen numbers of order one.
RTOL, ATOL = 2e-5, 2e-5
N = 22


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    activations = rng.normal(size=(N, 12))
    activations[:8] += 1.5
    classes = np.zeros((2, N), bool)
    classes[0, :8], classes[1, 8:16] = True, True
    return activations, classes, np.arange(N) % 2 == 1


def measured(drawn):
    activations, classes, second = drawn
    return jax.device_get(jax.jit(features.cluster_measures)(jnp.asarray(activations, jnp.float32), classes, second))


def means_of_the_other_half(drawn, row):
    activations, classes, second = drawn
    return [activations[own & (second != second[row])].mean(axis=0) for own in classes]


def test_every_prompt_is_measured_with_the_means_of_the_other_half(drawn):
    found = measured(drawn)
    for row, a in enumerate(drawn[0]):
        safe, unsafe = means_of_the_other_half(drawn, row)
        tau = np.linalg.norm(a - unsafe) - np.linalg.norm(a - safe)
        cosines = [a @ mean / np.linalg.norm(a) / np.linalg.norm(mean) for mean in (safe, unsafe)]
        np.testing.assert_allclose(found["tau"][row], tau, rtol=RTOL, atol=ATOL)
        np.testing.assert_allclose(found["relative_tau"][row], tau / np.linalg.norm(safe - unsafe), atol=ATOL)
        np.testing.assert_allclose(found["cosine_tau"][row], cosines[0] - cosines[1], atol=ATOL)


def test_accuracy_counts_the_labelled_prompts_on_their_side(drawn):
    found = measured(drawn)
    right = [np.mean((found["tau"] > 0)[drawn[1][0] & half]) / 2 + np.mean((found["tau"] < 0)[drawn[1][1] & half]) / 2
             for half in (drawn[2], ~drawn[2])]  # fmt: skip
    np.testing.assert_allclose(found["accuracy"], np.mean(right), atol=ATOL)
    assert 0.5 < found["accuracy"] <= 1 and found["gap"] > 0 and found["effect_size"] > 0


def test_what_has_no_structure_has_no_accuracy(drawn):
    """Means that a prompt were part of would pull it to its own side: here the expectation is one half."""
    rng = np.random.default_rng(1)
    rates = [measured((rng.normal(size=drawn[0].shape), *drawn[1:]))["accuracy"] for _ in range(200)]
    assert abs(np.mean(rates) - 0.5) < 4 * np.std(rates) / np.sqrt(len(rates))


def test_leading_shares_are_those_of_the_classes(drawn):
    found = measured(drawn)
    for place, own in enumerate(drawn[1]):
        values = np.linalg.svd(drawn[0][own], compute_uv=False)
        centred = np.linalg.svd(drawn[0][own] - drawn[0][own].mean(axis=0), compute_uv=False)
        shares = [v[0] / v.sum() for v in (values, centred)]
        assert min(abs(found["leading_share"][place] - share) for share in shares) < 1e-4


def test_action_of_the_update(drawn):
    rng = np.random.default_rng(2)
    base, delta = rng.normal(size=(12, 9)), rng.normal(size=(12, 3)) @ rng.normal(size=(3, 9))
    inputs = rng.normal(size=(30, 12))
    given = (jnp.asarray(x, jnp.float32) for x in (base, base + delta, inputs))
    found = jax.device_get(jax.jit(lambda *a: features.action_measures(*a, directions=3))(*given))
    size = np.linalg.norm(inputs, axis=1)
    left, values, _ = np.linalg.svd(delta, full_matrices=False)
    projected = np.abs(inputs @ left[:, :3]) / size[:, None]
    np.testing.assert_allclose(found["gain"], np.linalg.norm(inputs @ delta, axis=1) / size, rtol=1e-4)
    ratio = np.linalg.norm(inputs @ delta, axis=1) / np.linalg.norm(inputs @ base, axis=1)
    np.testing.assert_allclose(found["ratio"], ratio, rtol=1e-4)
    np.testing.assert_allclose(found["projection"], projected * values[:3], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["energy"], (projected**2).sum(axis=1), atol=1e-4)
