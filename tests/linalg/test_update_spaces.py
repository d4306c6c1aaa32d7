"""Update spaces against NumPy float64 projectors, closed forms, baselines, dead layers and refused decompositions."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import tree
from jaxsafety.linalg import update_spaces

# float32 decompositions and products of well-conditioned matrices against float64.
RTOL, ATOL = 2e-5, 2e-5
# The same float32 program in another order: a direction turns by the rounding over the gap between two values.
SAME = 2e-4
L, B = 3, 6
SHAPES = [(5, 8), (8, 5)]
NAMES = ("gain", "ratio", "projections")


def f32(values):
    return np.asarray(values, np.float32)


def concrete(*arrays):
    """What public functions want where no program hides the arrays."""
    return [jnp.asarray(array) for array in arrays]


def one_program(function, **options):
    """The function as one program, where eager calls would compile one for every operation; results in NumPy."""
    compiled = jax.jit(function, **options)
    return lambda *args, **kwargs: jax.device_get(compiled(*args, **kwargs))


def stack(shape, *, spectrum, seed):
    """Matrices with these singular values and random directions."""
    rng = np.random.default_rng(seed)
    factors = [np.linalg.qr(rng.normal(size=(L, side, len(spectrum))))[0] for side in shape]
    return f32(factors[0] * np.asarray(spectrum) @ factors[1].swapaxes(1, 2))


def case(shape=(5, 8), seed=0):
    base = stack(shape, spectrum=(3, 2, 1, 0.6, 0.3), seed=seed)
    delta = stack(shape, spectrum=(0.05, 0.04, 0.02, 0.01, 0.005), seed=seed + 100)
    inputs = f32(np.random.default_rng(seed + 200).normal(size=(L, B, shape[0])))
    return base, delta, inputs


def measure(base, delta, inputs):
    """Every function of the module, once; signs of the projections are arbitrary."""
    acted = update_spaces.input_space(base, delta, inputs=inputs)
    return {
        "output": update_spaces.output_space(base, delta),
        "input": acted.replace(projections=jnp.abs(acted.projections)),
        "changed": update_spaces.changed_norm(base, delta),
    }


# Jitted, which compiles faster than all the operations one by one; contracts/test_entry.py compares the two.
measured = one_program(measure)
measured_lanes = one_program(jax.vmap(measure))
output_space = one_program(update_spaces.output_space, static_argnames=("energy", "method"))
input_space = one_program(update_spaces.input_space, static_argnames="rank")
changed_norm = one_program(update_spaces.changed_norm)
range_basis = one_program(update_spaces.range_basis, static_argnames=("energy", "method"))
ENERGIES = (0.5, 0.9, 1.0)
METHODS = ("full", "gram")


@jax.jit
def every_space(base, delta):
    """Of every energy and method: one program takes less to compile than seven."""
    return {
        "output": {energy: update_spaces.output_space(base, delta, energy=energy) for energy in ENERGIES},
        "gram": update_spaces.output_space(base, delta, method="gram"),
        "both": {method: update_spaces.both_spaces(base, delta, method=method) for method in METHODS},
    }


@cache
def spaces(shape):
    """Those of the case of this shape."""
    return jax.device_get(every_space(*case(shape)[:2]))


def leading(gram, energy):
    """Eigenvectors of a Gram matrix that hold a share of its trace, by the definition, and their eigenvalues."""
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    count = 0
    while values[:count].sum() < energy * values.sum():
        count += 1
    return vectors[:, :count], values[:count]


def plain_output(base, delta, energy):
    """One layer, from eigenvectors of the output-side Gram matrices and the whole projector."""
    n = base.shape[1]
    kept, _ = leading(base.T @ base, energy)
    null = np.eye(n) - kept @ kept.T
    directions, powers = leading(delta.T @ delta, energy)
    norms = np.sqrt(((null @ directions) ** 2).sum(0))
    whole = np.trace(delta @ null @ delta.T) / np.trace(delta @ delta.T)
    return norms, (powers * norms**2).sum() / powers.sum(), whole, kept.shape[1]


# Output space


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "tall"])
@pytest.mark.parametrize("energy", ENERGIES)
def test_output_space_matches_numpy(shape, energy):
    base, delta, _ = case(shape)
    got = spaces(shape)["output"][energy]
    for layer in range(L):
        # A share of 1 leaves out what is exactly zero, which the eigenvalues of a Gram matrix do not tell.
        given = (np.asarray(weights[layer], float) for weights in (base, delta))
        norms, null, whole, rank = plain_output(*given, min(energy, 1 - 1e-9))
        assert (got.rank_base[layer], got.rank_delta[layer]) == (rank, len(norms))
        np.testing.assert_allclose(got.null_norm[layer, : len(norms)], norms, rtol=RTOL, atol=ATOL)
        assert np.isnan(got.null_norm[layer, len(norms) :]).all()
        np.testing.assert_allclose([got.null_energy[layer], got.total_null_energy[layer]], [null, whole], atol=ATOL)
    assert (got.errors < 1e-6).all() and (got.errors > 0).all()


def test_the_baseline_is_what_random_directions_have():
    base, delta, _ = case()
    got = measured(base, delta, case()[2])["output"]
    for layer in range(L):
        kept, _ = leading(np.asarray(base[layer], float).T @ np.asarray(base[layer], float), 0.9)
        drawn = np.random.default_rng(layer).normal(size=(20_000, 8))
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        outside = 1 - ((drawn @ kept) ** 2).sum(1)
        # Five standard errors of 20 000 draws.
        np.testing.assert_allclose(got.baseline_energy[layer], outside.mean(), atol=5 * outside.std() / 141)
        np.testing.assert_allclose(got.baseline_norm[layer], np.sqrt(outside).mean(), atol=5 * outside.std() / 141)
        np.testing.assert_allclose(got.baseline_std[layer], outside.std(), rtol=0.05)
        np.testing.assert_allclose(got.baseline_energy[layer], 1 - kept.shape[1] / 8, rtol=1e-6)


def corners(where):
    """A base of rank 2 on the first outputs, and an update on those, on others, or on both equally."""
    base, delta = np.zeros((1, 5, 8)), np.zeros((1, 5, 8))
    base[0, 0, 0], base[0, 1, 1] = 2, 1
    for output in where:
        delta[0, 3, output] = 1e-3
    return f32(base), f32(delta)


@pytest.mark.parametrize(("where", "share"), [((0,), 0), ((5,), 1), ((0, 5), 0.5), ((0, 1, 6, 7), 0.5)], ids=str)
def test_output_space_in_closed_form(where, share):
    got = output_space(*corners(where), energy=0.99)
    assert (got.rank_base, got.rank_delta) == (2, 1)
    np.testing.assert_allclose(got.null_norm[0, 0], np.sqrt(share), atol=1e-6)
    np.testing.assert_allclose([got.null_energy, got.total_null_energy], [[share]] * 2, atol=1e-6)


def test_a_small_part_in_the_null_space_is_seen():
    base, delta = corners((0,))
    delta[0, 3, 5] = 1e-8
    got = output_space(base, delta, energy=0.99)
    np.testing.assert_allclose(got.null_norm[0, 0], 1e-5, rtol=1e-3)
    np.testing.assert_allclose([got.null_energy, got.total_null_energy], [[1e-10]] * 2, rtol=1e-3)


def test_shares_do_not_depend_on_the_size_of_the_update():
    base, delta, inputs = case()
    one, tiny = (measured(base, delta * np.float32(scale), inputs) for scale in (1, 1e-25))
    for name in ("null_norm", "null_energy", "total_null_energy"):
        np.testing.assert_allclose(getattr(one["output"], name), getattr(tiny["output"], name), rtol=SAME, atol=SAME)


def test_a_layer_without_update_has_no_share_and_one_without_base_is_all_null():
    base, delta, inputs = case()
    base[1], delta[0] = 0, 0
    got = measured(base, delta, inputs)
    output = got["output"]
    np.testing.assert_array_equal(np.asarray(output.rank_delta) == 0, [True, False, False])
    np.testing.assert_array_equal(np.asarray(output.rank_base) == 0, [False, True, False])
    assert np.isnan(output.null_norm[0]).all()
    for value in (output.null_energy, output.total_null_energy):
        np.testing.assert_array_equal(np.isnan(value), [True, False, False])
    np.testing.assert_allclose(
        [output.null_energy[1], output.total_null_energy[1], output.baseline_norm[1]], 1, rtol=RTOL
    )
    np.testing.assert_array_equal(got["input"].gain[0], 0)
    assert np.isnan(got["input"].ratio[1]).all() and np.isnan(got["changed"][1])
    assert all(np.isfinite(leaf[2]).all() for leaf in jax.tree.leaves(got) if leaf is not output.null_norm)


# The Gram matrix


def test_gram_agrees_with_full_where_it_resolves_the_energy():
    # Values below the method's limit are refused; 90 % of the energy lies above it.
    spectrum = (3, 2, 1, 1e-3, 1e-4)
    base, delta = (stack((5, 8), spectrum=spectrum, seed=seed) for seed in (0, 1))
    every = jax.device_get(every_space(base, delta))
    full, gram = every["output"][0.9], every["gram"]
    np.testing.assert_array_equal([full.rank_base, full.rank_delta], [gram.rank_base, gram.rank_delta])
    for name in ("null_norm", "null_energy", "total_null_energy", "baseline_norm"):
        np.testing.assert_allclose(getattr(full, name), getattr(gram, name), rtol=SAME, atol=SAME)


def test_gram_refuses_what_it_cannot_resolve():
    base = stack((5, 8), spectrum=(3, 3e-3, 2e-3, 1e-3, 1e-4), seed=0)
    got = output_space(base, case()[1], method="gram", energy=1 - 1e-6)
    np.testing.assert_array_equal(got.rank_base, -1)
    shares = (got.null_norm, got.null_energy, got.total_null_energy, got.baseline_norm, got.baseline_energy)
    assert all(np.isnan(leaf).all() for leaf in (*shares, got.baseline_std, got.errors))


def test_gram_falls_back_outside_of_jit():
    base = stack((5, 8), spectrum=(3, 3e-3, 2e-3, 1e-3, 1e-4), seed=0)
    with pytest.warns(RuntimeWarning, match="method 'full' instead"):
        got = update_spaces.output_space(*concrete(base, case()[1]), method="gram", energy=1 - 1e-6)
    assert (np.asarray(got.rank_base) > 1).all() and np.isfinite(np.asarray(got.null_energy)).all()


# Both sides


both_spaces = one_program(update_spaces.both_spaces, static_argnames=("energy", "method", "rank"))


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "tall"])
@pytest.mark.parametrize("method", METHODS)
def test_both_sides_are_those_of_the_matrix_and_of_its_transpose(shape, method):
    base, delta, _ = case(shape)
    got = spaces(shape)["both"][method]
    turned = jax.device_get(every_space(base.mT, delta.mT))
    sides = [every["output"][0.9] if method == "full" else every["gram"] for every in (spaces(shape), turned)]
    for side, expected in zip((got.output, got.input), sides, strict=True):
        np.testing.assert_array_equal(side.rank_delta, expected.rank_delta)
        for name in ("null_norm", "null_energy", "total_null_energy", "baseline_norm", "baseline_energy"):
            np.testing.assert_allclose(getattr(side, name), getattr(expected, name), rtol=SAME, atol=SAME)
    for values, weights in ((got.base_values, base), (got.delta_values, delta)):
        np.testing.assert_allclose(values, np.linalg.svd(weights, compute_uv=False), rtol=RTOL, atol=ATOL)


def test_a_randomised_decomposition_finds_an_update_of_low_rank(key):
    base, _, _ = case((30, 40))
    delta = stack((30, 40), spectrum=(0.05, 0.04, 0.02, 1e-7, 1e-7), seed=7)
    got = both_spaces(base, delta, method="randomized", rank=3, key=key)
    expected = both_spaces(base, delta)
    np.testing.assert_array_equal(got.output.rank_delta, expected.output.rank_delta)
    np.testing.assert_allclose(got.delta_values[:, :3], expected.delta_values[:, :3], rtol=RTOL)
    for ours, theirs in zip((got.output, got.input), (expected.output, expected.input), strict=True):
        np.testing.assert_allclose(ours.null_energy, theirs.null_energy, rtol=1e-4, atol=ATOL)
        np.testing.assert_allclose(ours.total_null_energy, theirs.total_null_energy, rtol=1e-4, atol=ATOL)
        assert (ours.errors < 1e-4).all()


def test_too_few_randomised_triplets_are_refused(key):
    base, delta, _ = case((30, 40))
    enough, few = (both_spaces(base, delta, method="randomized", rank=rank, key=key) for rank in (3, 1))
    np.testing.assert_array_equal(enough.output.rank_delta, both_spaces(base, delta).output.rank_delta)
    np.testing.assert_array_equal(few.output.rank_delta, -1)
    assert np.isnan(few.output.null_energy).all() and np.isfinite(few.output.total_null_energy).all()


# Input space


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "tall"])
def test_input_space_matches_numpy(shape):
    base, delta, inputs = case(shape)
    got = measured(base, delta, inputs)["input"]
    for layer in range(L):
        w, dw, a = (np.asarray(x[layer], float) for x in (base, delta, inputs))
        norms = np.sqrt((a**2).sum(1))
        values, vectors = np.linalg.eigh(dw @ dw.T)
        order = np.argsort(values)[::-1][:5]
        projected = np.abs(a @ vectors[:, order]) * np.sqrt(np.maximum(values[order], 0)) / norms[:, None]
        np.testing.assert_allclose(got.gain[layer], np.sqrt(((a @ dw) ** 2).sum(1)) / norms, rtol=RTOL)
        np.testing.assert_allclose(got.ratio[layer], np.sqrt(((a @ dw) ** 2).sum(1) / ((a @ w) ** 2).sum(1)), rtol=RTOL)
        np.testing.assert_allclose(got.projections[layer], projected, rtol=1e-3, atol=ATOL * 0.05)


def test_energy_is_the_share_of_the_input_in_the_leading_directions():
    base, delta, inputs = case()
    for rank in (2, 5):
        got = input_space(base, delta, inputs=inputs, rank=rank).energy
        for layer in range(L):
            directions = np.linalg.svd(np.asarray(delta[layer], float))[0][:, :rank]
            a = np.asarray(inputs[layer], float)
            share = ((a @ directions) ** 2).sum(1) / (a**2).sum(1)
            np.testing.assert_allclose(got[layer], share, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("method", METHODS)
def test_the_basis_of_the_range_spans_what_holds_the_energy(method):
    base, delta, _ = case()
    basis = range_basis(base, energy=0.9, method=method)
    part = delta - delta @ basis @ basis.mT
    for layer in range(L):
        _, values, right = np.linalg.svd(np.asarray(base[layer], float))
        count = int(np.searchsorted(np.cumsum(values**2) / np.sum(values**2), 0.9)) + 1
        kept = right[:count]
        assert (np.abs(basis[layer]).max(0) > 0).sum() == count
        np.testing.assert_allclose(basis[layer] @ basis[layer].T, kept.T @ kept, rtol=1e-3, atol=1e-6)
    whole = spaces((5, 8))["output"][0.9]
    share = np.sum(part**2, axis=(1, 2)) / np.sum(delta**2, axis=(1, 2))
    np.testing.assert_allclose(share, whole.total_null_energy, rtol=1e-3)


def test_a_range_that_the_gram_matrix_does_not_resolve_is_nan():
    matrix = f32(np.diag([1.0, 1e-3, 1e-3]))[None]
    basis = range_basis(matrix, energy=1.0, method="gram")
    assert np.isnan(basis).all()


def test_squares_of_the_projections_add_up_to_the_gain():
    got = measured(*case())["input"]
    np.testing.assert_allclose(np.sum(got.projections**2, axis=-1), got.gain**2, rtol=RTOL)


def test_the_strongest_input_has_the_largest_value_as_its_gain():
    base, delta, _ = case()
    strongest = np.linalg.svd(np.asarray(delta, float))[0][:, None, :, 0]
    got = measured(base, delta, f32(np.repeat(7 * strongest, B, axis=1)))["input"]
    np.testing.assert_allclose(got.gain, 0.05, rtol=RTOL)
    np.testing.assert_allclose(got.projections, [[[0.05, 0, 0, 0, 0]] * B] * L, atol=ATOL * 0.05)


def test_a_rank_keeps_the_leading_projections():
    base, delta, inputs = case()
    few = input_space(base, delta, inputs=inputs, rank=2)
    every = measured(base, delta, inputs)["input"]
    np.testing.assert_allclose(np.abs(few.projections), every.projections[..., :2], rtol=SAME, atol=1e-7)
    np.testing.assert_allclose(few.gain, every.gain, rtol=RTOL)


def test_an_input_of_zero_has_no_direction():
    base, delta, inputs = case()
    inputs[:, 2] = 0
    got = measured(base, delta, inputs)["input"]
    for name in NAMES:
        undefined = np.isnan(getattr(got, name))
        assert undefined[:, 2].all() and undefined.sum() == undefined[:, 2].size


def test_an_update_along_the_base_scales_it():
    base, _, inputs = case()
    got = measured(base, np.float32(1e-3) * base, inputs)
    np.testing.assert_allclose(got["input"].ratio, 1e-3, rtol=RTOL)
    np.testing.assert_allclose(got["changed"], 1e-3, rtol=RTOL)


def test_changed_norm_matches_numpy():
    base, delta, _ = case()
    expected = [
        np.linalg.norm(np.asarray(delta, float)[i]) / np.linalg.norm(np.asarray(base, float)[i]) for i in range(L)
    ]
    np.testing.assert_allclose(changed_norm(base, delta), expected, rtol=RTOL)


# Transformations


def close(left, right):
    np.testing.assert_allclose(left, right, rtol=SAME, atol=SAME)


def test_vmapped_is_looped():
    lanes = [case(seed=seed) for seed in range(3)]
    batched = measured_lanes(*(np.stack(arrays) for arrays in zip(*lanes, strict=True)))
    for lane, given in enumerate(lanes):
        jax.tree.map(close, tree.lane(batched, lane), measured(*given))


def test_a_dead_lane_is_nan_and_leaves_the_others_alone():
    given, other = case(), case(seed=1)
    dead = [np.full_like(array, np.nan) for array in given]
    batched = measured_lanes(*(np.stack(arrays) for arrays in zip(given, dead, other, strict=True)))
    output = batched["output"]
    np.testing.assert_array_equal([output.rank_base[1], output.rank_delta[1]], -1)
    for leaf in jax.tree.leaves(batched):
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or np.isnan(leaf[1]).all()
    for lane, alive in ((0, given), (2, other)):
        jax.tree.map(close, tree.lane(batched, lane), measured(*alive))


def test_statistics_are_at_least_float32():
    def dtypes(dtype):
        given = [jax.ShapeDtypeStruct(array.shape, dtype) for array in case()]
        found = {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(measure, *given))}
        return found - {jnp.dtype("int32")}

    assert dtypes(jnp.bfloat16) == dtypes(jnp.float32) == {jnp.dtype("float32")}
    with jax.enable_x64(True):
        assert dtypes(jnp.float64) == {jnp.dtype("float64")}


# Errors


def test_values_that_are_not_finite_are_named():
    base, delta, inputs = concrete(*case())
    bad = [np.array(array) for array in (base, delta, inputs)]
    bad[0][0, 0, 0], bad[1][2, 0, 0], bad[2][0, 0, 0] = np.inf, np.nan, np.nan
    bad_base, bad_delta, bad_inputs = concrete(*bad)
    for function in (update_spaces.output_space, update_spaces.changed_norm):
        with pytest.raises(ValueError, match=r"^delta holds values that are not finite"):
            function(base, bad_delta)
        with pytest.raises(ValueError, match=r"^base holds values that are not finite"):
            function(bad_base, delta)
    with pytest.raises(ValueError, match=r"^inputs holds values that are not finite"):
        update_spaces.input_space(base, delta, inputs=bad_inputs)


def test_shapes_must_fit(unchecked):
    base, delta, inputs = case()
    turned, narrow = concrete(delta.mT, inputs[..., :4])
    base, delta = concrete(base, delta)
    for function in (update_spaces.output_space, update_spaces.changed_norm):
        with pytest.raises(
            ValueError, match=r"delta is float32\[3, 8, 5\], expected Float\[l m n\] beside base float32"
        ):
            function(base, turned)
    with pytest.raises(ValueError, match=r"inputs is float32\[3, 6, 4\], expected Float\[l b m\] beside base"):
        update_spaces.input_space(base, delta, inputs=narrow)


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.5, float("nan")])
def test_energy_out_of_range(energy):
    base, delta, _ = case()
    with pytest.raises(ValueError, match=r"energy: got .*, expected a share in \(0, 1\]"):
        output_space(base, delta, energy=energy)


@pytest.mark.parametrize("rank", [0, 6])
def test_rank_out_of_range(rank):
    base, delta, inputs = case()
    with pytest.raises(ValueError, match=f"rank: got {rank}, expected from 1 to 5"):
        input_space(base, delta, inputs=inputs, rank=rank)


def test_unknown_method(unchecked):
    base, delta, _ = case()
    with pytest.raises(ValueError, match="unknown method 'randomized': expected one of full, gram"):
        update_spaces.output_space(*concrete(base, delta), method="randomized")
