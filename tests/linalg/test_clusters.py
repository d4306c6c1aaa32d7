"""Clusters against NumPy float64 by loops, closed forms, subsets, dead lanes and what is undefined."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety import tree
from jaxsafety.linalg import clusters
from jaxsafety.linalg.clusters import Centroids

# float32 sums of some ten terms against float64.
RTOL = 1e-5
# The same float32 program in another order.
SAME = 2e-6
L, B, C, F = 3, 7, 9, 5
KEPT, OTHERS = np.array([1, 0, 1, 1, 0, 1, 1]), np.array([0, 1, 1, 0, 1, 0, 0, 1, 1])


# Jitted, which compiles faster than all the operations one by one; contracts/test_entry.py compares the two.
def one_program(function, **options):
    """Results in NumPy."""
    compiled = jax.jit(function, **options)
    return lambda *args, **kwargs: jax.device_get(compiled(*args, **kwargs))


tau = one_program(clusters.tau, static_argnames="form")
relative_tau, separation, leading_share, centroids = map(
    one_program,
    (clusters.relative_tau, clusters.separation, clusters.leading_share, clusters.centroids),
)


def f32(values):
    return np.asarray(values, np.float32)


def concrete(given):
    """What public functions want where no program hides the arrays."""
    return jax.tree.map(jnp.asarray, given)


def draw(seed=0):
    """Two overlapping classes away from the origin, exact in float32."""
    rng = np.random.default_rng(seed)
    safe, unsafe = 2 + rng.normal(size=(L, B, F)), 1.2 + 1.3 * rng.normal(size=(L, C, F))
    return safe.astype(np.float32), unsafe.astype(np.float32)


def means(safe, unsafe):
    return Centroids(f32(safe.mean(1, dtype=float)), f32(unsafe.mean(1, dtype=float)))


def masked_mean(activations, weights=None):
    return clusters.centroids(activations, activations, safe_weights=weights, unsafe_weights=weights).safe


def measure(safe, unsafe, safe_weights, unsafe_weights):
    """Every function of the module, once."""
    both = {"safe_weights": safe_weights, "unsafe_weights": unsafe_weights}
    middle = clusters.centroids(safe, unsafe, **both)
    taus = clusters.tau(safe, middle), clusters.tau(unsafe, middle)
    return {
        "centroids": middle,
        "tau": taus,
        "cosine": clusters.tau(unsafe, middle, form="cosine"),
        "relative": clusters.relative_tau(unsafe, middle),
        "separation": clusters.separation(*taus, centroids=middle, **both),
        "shares": clusters.leading_share(unsafe, weights=unsafe_weights),
    }


measured, measured_lanes = one_program(measure), one_program(jax.vmap(measure))


def plain_tau(activations, safe, unsafe, form):
    taus = np.zeros(activations.shape[:2])
    for layer, sample in np.ndindex(*taus.shape):
        a, s, u = activations[layer, sample].astype(float), safe[layer], unsafe[layer]
        if form == "euclidean":
            taus[layer, sample] = np.sqrt(((a - u) ** 2).sum()) - np.sqrt(((a - s) ** 2).sum())
        else:
            cosines = [a @ m / np.sqrt((a @ a) * (m @ m)) for m in (s, u)]
            taus[layer, sample] = cosines[0] - cosines[1]
    return taus


def plain_separation(safe, unsafe, distance):
    """From lists of taus of one layer."""
    gap = np.mean(safe) - np.mean(unsafe)
    freedom = len(safe) + len(unsafe) - 2
    pooled = np.sqrt(((len(safe) - 1) * np.var(safe, ddof=1) + (len(unsafe) - 1) * np.var(unsafe, ddof=1)) / freedom)
    accuracy = (np.mean([t > 0 for t in safe]) + np.mean([t < 0 for t in unsafe])) / 2
    return gap, gap / pooled, gap / (2 * distance), accuracy, distance


# Means


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_masked_mean_is_the_mean_of_the_subset(dtype):
    safe, _ = draw()
    got = masked_mean(*concrete((safe, KEPT.astype(dtype))))
    np.testing.assert_allclose(got, safe[:, KEPT == 1].mean(1, dtype=float), rtol=RTOL)
    np.testing.assert_allclose(masked_mean(concrete(safe)), safe.mean(1, dtype=float), rtol=RTOL)


def test_what_is_left_out_may_be_anything():
    safe, unsafe = draw()
    expected = measured(f32(safe), f32(unsafe), KEPT, OTHERS)
    safe[:, KEPT == 0], unsafe[:, OTHERS == 0] = np.nan, np.inf
    got = measured(f32(safe), f32(unsafe), KEPT, OTHERS)
    for name in ("centroids", "separation", "shares"):
        jax.tree.map(np.testing.assert_array_equal, got[name], expected[name])
    # Outside of jit, where values are checked, too.
    mean = masked_mean(*concrete((f32(unsafe), OTHERS)))
    np.testing.assert_array_equal(mean, got["centroids"].unsafe)


def test_the_mean_of_many_samples_far_from_zero_keeps_its_digits():
    values = (1e4 + np.random.default_rng(1).normal(size=(1, 4096, 64))).astype(np.float32)
    # One rounding of the result: half of float32's spacing at 1e4.
    np.testing.assert_allclose(centroids(values, values).safe, values.mean(1, dtype=float), rtol=0, atol=5e-4)


def test_centroids_are_the_means_of_the_classes():
    safe, unsafe = draw()
    weights = {"safe_weights": KEPT, "unsafe_weights": OTHERS == 1}
    got = centroids(f32(safe), f32(unsafe), **weights)
    np.testing.assert_allclose(got.safe, safe[:, KEPT == 1].mean(1, dtype=float), rtol=RTOL)
    np.testing.assert_allclose(got.unsafe, unsafe[:, OTHERS == 1].mean(1, dtype=float), rtol=RTOL)


# Tau


@pytest.mark.parametrize("form", ["euclidean", "cosine"])
def test_tau_matches_numpy(form):
    safe, unsafe = draw()
    middle = means(safe, unsafe)
    expected = plain_tau(unsafe, *(np.asarray(m, float) for m in (middle.safe, middle.unsafe)), form)
    np.testing.assert_allclose(tau(f32(unsafe), middle, form=form), expected, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("form", ["euclidean", "cosine"])
def test_tau_is_positive_at_the_safe_mean_and_negative_at_the_unsafe_one(form):
    middle = means(*draw())
    ends = np.stack([middle.safe, middle.unsafe], axis=1)
    got = tau(ends, middle, form=form)
    assert (got[:, 0] > 0).all() and (got[:, 1] < 0).all()
    if form == "euclidean":
        distance = np.linalg.norm(np.asarray(middle.safe - middle.unsafe, float), axis=-1)
        np.testing.assert_allclose(got, np.stack([distance, -distance], 1), rtol=RTOL)
        np.testing.assert_allclose(relative_tau(ends, middle), [[1, -1]] * L, rtol=RTOL)


def test_tau_of_distant_samples_keeps_its_digits():
    rng = np.random.default_rng(2)
    middle = Centroids(*(f32(rng.normal(size=(1, 200)) * 1e-3) for _ in range(2)))
    far = f32(100 * rng.normal(size=(1, 20, 200)))
    a, s, u = (np.asarray(x, float) for x in (far, middle.safe, middle.unsafe))
    expected = plain_tau(a, s, u, "euclidean")
    # The difference of two float32 norms of 1400 is a multiple of 1e-4, a hundred times this.
    np.testing.assert_allclose(tau(far, middle), expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


def test_cosine_tau_of_nearly_parallel_means_keeps_its_digits():
    rng = np.random.default_rng(3)
    base = rng.normal(size=(1, 50))
    middle = Centroids(*(f32(base + 1e-3 * rng.normal(size=(1, 50))) for _ in range(2)))
    near = f32(base[:, None] + 1e-3 * rng.normal(size=(1, 20, 50)))
    s, u = (np.asarray(x, float) for x in (middle.safe, middle.unsafe))
    expected = plain_tau(np.asarray(near), s, u, "cosine")
    # The two cosines are 1 to six digits: their difference would be off by 1e-7.
    np.testing.assert_allclose(tau(near, middle, form="cosine"), expected, atol=1e-10)
    assert np.abs(expected).max() > 1e-7


@pytest.mark.parametrize("scale", [1e-25, 1e3, 1e25])
def test_relative_tau_has_no_unit(scale):
    safe, unsafe = draw()
    expected = relative_tau(f32(unsafe), means(safe, unsafe))
    middle = Centroids(*(m * f32(scale) for m in (means(safe, unsafe).safe, means(safe, unsafe).unsafe)))
    np.testing.assert_allclose(relative_tau(f32(unsafe) * f32(scale), middle), expected, rtol=RTOL, atol=RTOL)
    assert (np.abs(expected) <= 1).all()


def test_cosine_tau_ignores_the_length_of_a_sample():
    _, unsafe = draw()
    middle = means(*draw())
    one, ten = (tau(f32(scale * unsafe), middle, form="cosine") for scale in (1, 10))
    np.testing.assert_allclose(one, ten, rtol=RTOL, atol=SAME)
    assert np.isnan(tau(np.zeros_like(unsafe), middle, form="cosine")).all()


def test_tau_has_the_gradient_of_finite_differences():
    safe, unsafe = draw()
    middle = concrete(means(safe, unsafe))
    for form in ("euclidean", "cosine"):
        function = jax.jit(lambda a, form=form: clusters.tau(a, middle, form=form))
        check_grads(function, (f32(unsafe),), order=1, modes=("rev",), rtol=2e-2, atol=1e-2)


# Separation


def test_separation_matches_numpy():
    safe, unsafe = draw()
    middle = means(safe, unsafe)
    taus = tau(f32(safe), middle), tau(f32(unsafe), middle)
    weights = {"safe_weights": KEPT, "unsafe_weights": OTHERS}
    got = separation(*taus, centroids=middle, **weights)
    distance = np.linalg.norm(np.asarray(middle.safe - middle.unsafe, float), axis=-1)
    for layer in range(L):
        chosen = [np.asarray(t, float)[layer, m == 1] for t, m in zip(taus, (KEPT, OTHERS), strict=True)]
        expected = plain_separation(*chosen, distance[layer])
        np.testing.assert_allclose([leaf[layer] for leaf in jax.tree.leaves(got)], expected, rtol=RTOL, atol=SAME)


def test_samples_at_their_means_are_wholly_separated():
    middle = means(*draw())
    samples = np.repeat(middle.safe[:, None], B, axis=1), np.repeat(middle.unsafe[:, None], C, axis=1)
    got = separation(*(tau(s, middle) for s in samples), centroids=middle)
    np.testing.assert_allclose(got.gap, 2 * got.distance, rtol=RTOL)
    np.testing.assert_allclose(got.relative_gap, 1, rtol=RTOL)
    np.testing.assert_array_equal(got.accuracy, 1)
    # Without a spread the gap is no number of spreads.
    assert np.isnan(got.effect_size).all()


def test_means_that_coincide_separate_nothing():
    _, unsafe = draw()
    middle = Centroids(f32(np.ones((L, F))), f32(np.ones((L, F))))
    equal = tau(f32(unsafe), middle)
    np.testing.assert_array_equal(equal, 0)
    got = separation(equal, equal, centroids=middle)
    np.testing.assert_array_equal([got.gap, got.distance, got.accuracy], [[0] * L, [0] * L, [0.5] * L])
    assert np.isnan([got.relative_gap, got.effect_size]).all()
    assert np.isnan(relative_tau(f32(unsafe), middle)).all()


def test_accuracy_is_balanced_and_a_tie_counts_half():
    middle = Centroids(f32([[1]]), f32([[-1]]))
    got = separation(f32([[2, 0]]), f32([[-1, -1, -1, 1, 1, 1, 1, -1]]), centroids=middle)
    np.testing.assert_allclose(got.accuracy, (0.75 + 0.5) / 2)


@pytest.mark.parametrize("count", [1, 2])
def test_an_effect_size_takes_two_samples_of_each_class(count):
    safe, unsafe = draw()
    middle = means(safe, unsafe)
    few = np.arange(B) < count
    taus = tau(f32(safe), middle), tau(f32(unsafe), middle)
    got = separation(*taus, centroids=middle, safe_weights=few)
    assert np.isfinite(got.effect_size).all() == (count == 2)
    assert np.isfinite([got.gap, got.accuracy, got.relative_gap]).all()


def test_an_effect_size_is_not_made_of_rounding():
    middle = Centroids(f32([[1.0, 0.0]]), f32([[-1.0, 0.0]]))
    one = np.float32(2.0)
    taus = f32([[one, np.nextafter(one, np.float32(0))]])
    assert np.isnan(separation(taus, -taus, centroids=middle).effect_size)
    taus = f32([[2.0, 1.9]])
    np.testing.assert_allclose(
        separation(taus, -taus, centroids=middle).effect_size, 3.9 / np.std([2, 1.9], ddof=1), rtol=RTOL
    )


# Spectrum of a cluster


@pytest.mark.parametrize("shape", [(L, 12, 4), (L, 12, 30)], ids=["tall", "wide"])
def test_leading_share_matches_numpy(shape):
    rng = np.random.default_rng(4)
    values = (5 + rng.normal(size=shape)).astype(np.float32)
    kept = rng.random(12) < 0.6
    got = leading_share(f32(values), weights=kept)
    for layer in range(L):
        chosen = values[layer, kept].astype(float)
        spectrum = np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(chosen.T)), 0))
        expected = spectrum.max() / spectrum.sum(), spectrum.max() ** 2 / (spectrum**2).sum()
        np.testing.assert_allclose([share[layer] for share in got], expected, rtol=RTOL)


def test_a_cluster_on_a_line_has_one_direction():
    rng = np.random.default_rng(5)
    line = f32(rng.normal(size=(1, 1, F)) + rng.normal(size=(1, 6, 1)) * rng.normal(size=(1, 1, F)))
    np.testing.assert_allclose(leading_share(line), [[1], [1]], rtol=1e-5)
    pair = np.asarray([1, 0, 0, 1, 0, 0])
    np.testing.assert_allclose(leading_share(f32(rng.normal(size=(1, 6, F))), weights=pair), [[1], [1]])


def test_a_simplex_spreads_evenly():
    np.testing.assert_allclose(leading_share(f32(np.eye(5))[None]), [[1 / 4], [1 / 4]], rtol=RTOL)


def test_the_share_has_no_unit():
    _, unsafe = draw()
    one, tiny = (leading_share(f32(unsafe) * f32(scale)) for scale in (1, 1e-25))
    np.testing.assert_allclose(one, tiny, rtol=RTOL)


@pytest.mark.parametrize("weights", [[1, 0, 0], [1, 1, 0], [1, 1, 1]], ids=["one sample", "all the same", "rounding"])
def test_a_point_has_no_spectrum(weights):
    nearly = f32(np.full((1, 3, 4), 0.1))
    nearly[0, 2, 1] = np.nextafter(nearly[0, 2, 1], np.float32(1))
    assert np.isnan(leading_share(nearly, weights=np.asarray(weights))).all()


# Transformations


def lanes():
    rng = np.random.default_rng(6)
    weights = [(rng.random(B) < 0.7, rng.random(C) < 0.7) for _ in range(3)]
    return [(*map(f32, draw(seed)), *pair) for seed, pair in enumerate(weights)]


def stacked(lanes):
    return [np.stack(arrays) for arrays in zip(*lanes, strict=True)]


def test_vmapped_is_looped():
    given = lanes()
    batched = measured_lanes(*stacked(given))
    for lane, arguments in enumerate(given):
        close = partial(np.testing.assert_allclose, rtol=SAME, atol=SAME)
        jax.tree.map(close, tree.lane(batched, lane), measured(*arguments))


def test_a_dead_lane_is_nan_and_leaves_the_others_alone():
    given = lanes()
    dead = (np.full_like(given[1][0], np.nan), np.full_like(given[1][1], np.nan), *given[1][2:])
    batched = measured_lanes(*stacked([given[0], dead, given[2]]))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(tree.lane(batched, 1)))
    close = partial(np.testing.assert_allclose, rtol=SAME, atol=SAME)
    for lane in (0, 2):
        jax.tree.map(close, tree.lane(batched, lane), measured(*given[lane]))


def test_a_traced_empty_class_is_nan():
    safe, unsafe, kept, _ = lanes()[0]
    got = jax.jit(measure)(safe, unsafe, kept, jnp.zeros(C, bool))
    undefined = (got["shares"], got["centroids"].unsafe, got["separation"], got["relative"])
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(undefined))
    assert np.isfinite(got["centroids"].safe).all()


def test_statistics_are_at_least_float32():
    def dtypes(dtype):
        given = [jax.ShapeDtypeStruct(array.shape, dtype) for array in draw()]
        return {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(lambda *a: measure(*a, None, None), *given))}

    assert dtypes(jnp.bfloat16) == dtypes(jnp.float32) == {jnp.dtype("float32")}
    with jax.enable_x64(True):
        assert dtypes(jnp.float64) == {jnp.dtype("float64")}


# Errors


def test_a_class_without_samples_is_refused():
    safe, unsafe = draw()
    none, empty, tau_safe, tau_unsafe = concrete((safe[:, :0], np.zeros(B, bool), safe[..., 0], unsafe[:, :0, 0]))
    safe, unsafe, middle = concrete((safe, unsafe, means(safe, unsafe)))
    with pytest.raises(ValueError, match="empty class: safe holds no samples"):
        clusters.centroids(none, unsafe)
    with pytest.raises(ValueError, match=f"empty class: weights of unsafe choose none of {C} samples"):
        clusters.centroids(safe, unsafe, unsafe_weights=jnp.asarray(f32(np.zeros(C))))
    with pytest.raises(ValueError, match="empty class: weights of safe choose none"):
        masked_mean(safe, weights=empty)
    with pytest.raises(ValueError, match="empty class: weights of activations choose none"):
        clusters.leading_share(safe, weights=empty)
    with pytest.raises(ValueError, match="empty class: tau_unsafe holds no samples"):
        clusters.separation(tau_safe, tau_unsafe, centroids=middle)


def test_weights_are_a_mask():
    with pytest.raises(ValueError, match="weights of safe hold other values than 0 and 1"):
        masked_mean(*concrete((draw()[0], f32(np.full(B, 0.5)))))


def test_concrete_weights_are_checked_inside_a_traced_function():
    safe, nothing = concrete((draw()[0], f32(np.zeros(B))))
    with pytest.raises(ValueError, match="empty class"):
        jax.jit(lambda a: masked_mean(a, weights=nothing))(safe)


def test_values_that_are_not_finite_are_named():
    safe, unsafe = draw()
    middle, broken, bad = concrete(means(safe, unsafe)), means(safe, unsafe), safe.copy()
    bad[0, 1, 2], broken.unsafe[0, 0] = np.nan, np.inf
    bad_taus, taus = concrete((bad[..., 2], unsafe[..., 2]))
    bad, broken, safe, unsafe = concrete((bad, broken, safe, unsafe))
    with pytest.raises(ValueError, match="safe holds values that are not finite"):
        clusters.centroids(bad, unsafe)
    with pytest.raises(ValueError, match="activations holds values that are not finite"):
        clusters.tau(bad, middle)
    with pytest.raises(ValueError, match="unsafe mean holds values that are not finite"):
        clusters.tau(safe, broken)
    with pytest.raises(ValueError, match="tau_safe holds values that are not finite"):
        clusters.separation(bad_taus, taus, centroids=middle)
    with pytest.raises(ValueError, match="activations holds values that are not finite"):
        clusters.leading_share(bad)


def test_an_unknown_form_is_named(unchecked):
    with pytest.raises(ValueError, match=r"unknown form 'cosin': .*did you mean 'cosine'"):
        clusters.tau(*concrete((draw()[0], means(*draw()))), form="cosin")


def test_at_a_mean_the_relative_tau_has_the_whole_slope_of_its_formula():
    """A sample at the safe mean has the largest value there is: a clip would halve its gradient."""
    means = clusters.Centroids(jnp.zeros((1, 3)), jnp.ones((1, 3)))
    samples = jnp.zeros((1, 1, 3))
    whole = jax.grad(lambda x: clusters.tau(x, means).sum())(samples) / jnp.sqrt(3.0)
    found = jax.grad(lambda x: clusters.relative_tau(x, means).sum())(samples)
    assert float(clusters.relative_tau(samples, means)[0, 0]) == 1
    np.testing.assert_allclose(found, whole, rtol=1e-5)
