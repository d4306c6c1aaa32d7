"""Linear probes against NumPy in float64, closed forms, and what is undefined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.linalg import probes

# A float32 solve of five unknowns against float64.
RTOL = 2e-4
L, B, D = 2, 12, 5
LABELS = np.arange(B) % 3 == 0
MARKS = jnp.asarray(LABELS)


def samples(seed=0, shift=1.0):
    drawn = np.random.default_rng(seed).normal(size=(L, B, D)) + shift * LABELS[None, :, None] * np.arange(D)
    return jnp.asarray(drawn, jnp.float32)


def plain_fit(rows, labels, ridge):
    """Weighted least squares on an extended design, the penalty on all but the offset."""
    rows = rows.astype(np.float64)
    weights = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    mean = weights @ rows
    penalty = ridge * (weights @ (rows - mean) ** 2).mean()
    design = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    normal = design.T @ (weights[:, None] * design) + penalty * np.diag([*np.ones(rows.shape[1]), 0])
    found = np.linalg.solve(normal, design.T @ (weights * np.where(labels, 1, -1)))
    return found[:-1], found[-1]


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_it_is_weighted_ridge_regression(ridge):
    found = jax.jit(lambda rows: probes.fit(rows, MARKS, ridge=ridge))(samples())
    for layer, rows in enumerate(np.asarray(samples())):
        direction, offset = plain_fit(rows, LABELS, ridge)
        np.testing.assert_allclose(found.direction[layer], direction, rtol=RTOL, atol=RTOL * np.abs(direction).max())
        np.testing.assert_allclose(found.offset[layer], offset, rtol=RTOL, atol=RTOL)


def test_scores_are_above_zero_where_classes_are_far_apart():
    rows = samples(shift=20.0)
    found = probes.scores(probes.fit(rows, MARKS), rows)
    np.testing.assert_array_equal(found > 0, np.broadcast_to(LABELS, found.shape))
    np.testing.assert_array_equal(probes.auc(found, MARKS), np.ones(L))


@pytest.mark.parametrize("digits", [0, 6])  # with ties, and without
def test_the_area_is_counted_pair_by_pair(digits):
    drawn = np.round(np.random.default_rng(1).normal(size=(L, B)), digits)
    for row, area in zip(drawn, probes.auc(jnp.asarray(drawn), MARKS), strict=True):
        pairs = [(a > b) + (a == b) / 2 for a in row[LABELS] for b in row[~LABELS]]
        assert area == pytest.approx(np.mean(pairs), rel=1e-5)


def test_what_is_undefined_is_nan():
    one = jnp.ones(B, bool)
    assert np.isnan(probes.auc(samples()[..., 0], one)).all()
    assert np.isnan(probes.fit(samples(), one).direction).all()
    scores = jnp.asarray(samples()[..., 0]).at[0, 3].set(jnp.nan)
    assert np.isnan(probes.auc(scores, MARKS)).tolist() == [True, False]


def test_of_samples_that_are_all_one_nothing_is_told():
    found = probes.fit(jnp.ones((1, B, D)), MARKS)
    np.testing.assert_array_equal(found.direction, 0)


def test_a_ridge_is_above_zero():
    with pytest.raises(ValueError, match=r"ridge: got 0\.0, expected a number greater than 0"):
        probes.fit(samples(), MARKS, ridge=0.0)
