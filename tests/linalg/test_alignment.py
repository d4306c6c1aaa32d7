"""Alignment of updates against NumPy in float64, closed forms and chance; DPO's slope."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import tree
from jaxsafety.linalg import alignment
from jaxsafety.methods import dpo as dpo_loss
from jaxsafety.models import gpt
from jaxsafety.types import Batch, PreferenceBatch
from tests.methods.bound import bound

# float32 SVDs and sums against float64.
RTOL, ATOL = 1e-5, 1e-5
LAYERS, INPUTS, OUTPUTS, RANK = 2, 8, 20, 3
UP = "blocks/mlp/up"


def one_program(function, **options):
    """The function as one program, where eager calls would compile one for every operation; results in NumPy."""
    compiled = jax.jit(function, **options)
    return lambda *args, **kwargs: jax.device_get(compiled(*args, **kwargs))


align = one_program(alignment.align, static_argnames=("rank", "pattern"))
tree_cosine = one_program(alignment.tree_cosine)
overlap = one_program(alignment.overlap)


def update(seed, m=INPUTS, n=OUTPUTS):
    rng = np.random.default_rng(seed)
    mlp = {"up": rng.normal(size=(LAYERS, m, n)), "down": rng.normal(size=(LAYERS, n, m))}
    mlp |= {"up_bias": rng.normal(size=(LAYERS, n))}
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), {"blocks": {"mlp": mlp}, "norm": np.ones(m)})


@pytest.fixture
def pair():
    return update(0), update(1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_cosine(a, b):
    """Two trees or arrays as one long vector each."""
    a, b = (np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(x)]) for x in (a, b))
    return a @ b / np.sqrt((a @ a) * (b @ b))


def plain_angles(a, b, rank, side):
    """Angles from the eigenvalues of P Q P, by projectors: no basis is compared with a basis."""
    projectors = []
    for matrix in (np.asarray(x, np.float64) for x in (a, b)):
        gram = matrix @ matrix.T if side == "inputs" else matrix.T @ matrix
        vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :rank]
        projectors.append(vectors @ vectors.T)
    p, q = projectors
    squares = np.linalg.eigvalsh(p @ q @ p)[::-1][:rank]
    return np.arccos(np.sqrt(np.clip(squares, 0, 1)))


def test_cosines_match_numpy(pair):
    got = align(*pair, rank=RANK)
    np.testing.assert_allclose(got.cosine, plain_cosine(*pair), rtol=RTOL)
    np.testing.assert_allclose(tree_cosine(*pair), plain_cosine(*pair), rtol=RTOL)
    for path, values in got.matrix_cosine.items():
        a, b = (tree.flatten(delta)[path] for delta in pair)
        expected = [plain_cosine(a[layer], b[layer]) for layer in range(LAYERS)]
        np.testing.assert_allclose(values, expected, atol=ATOL)


@pytest.mark.parametrize("rank", [1, RANK, INPUTS])
def test_angles_match_numpy(pair, rank):
    got = align(*pair, rank=rank)
    assert set(got.input_angles) == set(got.output_angles) == {UP, "blocks/mlp/down"}
    for path in got.input_angles:
        a, b = (tree.flatten(delta)[path] for delta in pair)
        for side, angles in (("inputs", got.input_angles[path]), ("outputs", got.output_angles[path])):
            expected = [plain_angles(a[layer], b[layer], rank, side) for layer in range(LAYERS)]
            # The oracle's arccosine loses half the digits of angles near 0.
            np.testing.assert_allclose(angles, expected, atol=1e-3 if rank == INPUTS else 1e-4)


def test_an_update_is_aligned_with_its_multiples_and_opposite_to_its_negative(pair):
    delta, _ = pair
    for factor in (3.0, -0.5):
        got = align(delta, jax.tree.map(lambda leaf, f=factor: np.float32(f) * leaf, delta), rank=RANK)
        np.testing.assert_allclose(got.cosine, np.sign(factor), rtol=RTOL)
        for path in got.input_angles:
            np.testing.assert_allclose(got.matrix_cosine[path], np.sign(factor), rtol=RTOL)
            # Spaces have no sign.
            for angles in (got.input_angles[path], got.output_angles[path]):
                np.testing.assert_allclose(angles, 0, atol=ATOL)
                np.testing.assert_allclose(overlap(angles), 1, rtol=RTOL)


def test_updates_of_other_directions_are_orthogonal():
    """Matrices of rank one on coordinate axes: the same output, other inputs."""

    def axis(row, column):
        up = np.zeros((1, 4, 6), np.float32)
        up[0, row, column] = 2.0
        return {"blocks": {"mlp": {"up": up}}}

    got = align(axis(0, 1), axis(2, 1), rank=1)
    np.testing.assert_allclose([got.cosine, got.matrix_cosine[UP][0]], 0, atol=ATOL)
    np.testing.assert_allclose(got.input_angles[UP], np.pi / 2, atol=ATOL)
    np.testing.assert_allclose(got.output_angles[UP], 0, atol=ATOL)
    np.testing.assert_allclose([got.input_chance[UP][0], got.output_chance[UP][0]], [1 / 4, 1 / 6], rtol=RTOL)


def test_unrelated_updates_overlap_by_chance():
    """The mean over many pairs is k / m of the inputs and k / n of the outputs."""
    draws = 400
    a, b = ({"blocks": {"mlp": {"up": stack}}} for stack in normal(2, draws, INPUTS, OUTPUTS))
    got = align(a, b, rank=RANK)
    for angles, chance in ((got.input_angles, got.input_chance), (got.output_angles, got.output_chance)):
        shares = overlap(angles[UP])
        np.testing.assert_allclose(shares.mean(), chance[UP][0], atol=5 * np.std(shares) / np.sqrt(draws))
    np.testing.assert_allclose(got.input_chance[UP], RANK / INPUTS, rtol=RTOL)
    np.testing.assert_allclose(got.output_chance[UP], RANK / OUTPUTS, rtol=RTOL)


def test_updates_of_lower_rank_have_fewer_angles_and_their_own_chance():
    """A rank-one update against full ones: completions of its basis must not count."""
    draws = 400
    left, right = (normal(draws, size, 1, seed=seed) for seed, size in enumerate((INPUTS, OUTPUTS)))
    thin, full = left @ right.mT, normal(draws, INPUTS, OUTPUTS, seed=2)
    got = align(*({"blocks": {"mlp": {"up": stack}}} for stack in (thin, full)), rank=RANK)
    np.testing.assert_array_equal(np.isnan(got.input_angles[UP]), np.tile([False, True, True], (draws, 1)))
    np.testing.assert_allclose(got.input_chance[UP], RANK / INPUTS, rtol=RTOL)
    shares = overlap(got.input_angles[UP])
    np.testing.assert_allclose(shares.mean(), RANK / INPUTS, atol=5 * np.std(shares) / np.sqrt(draws))


def test_an_unchanged_matrix_has_no_direction(pair):
    delta, other = pair
    still = tree.label(delta, lambda path, leaf: np.stack([0 * leaf[0], leaf[1]]) if path == UP else leaf)
    got = align(still, other, rank=RANK)
    for values in (got.matrix_cosine, got.input_angles, got.output_angles, got.input_chance, got.output_chance):
        assert np.isnan(values[UP][0]).all() and np.isfinite(values[UP][1]).all()
    assert np.isnan(overlap(got.input_angles[UP])[0])
    zero = jax.tree.map(np.zeros_like, delta)
    assert np.isnan(tree_cosine(zero, other)) and np.isnan(tree_cosine(other, zero))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cosines_do_not_depend_on_the_scale(pair, scale):
    """Squares of a saturated loss's gradients underflow in float32."""
    scaled = jax.tree.map(lambda leaf: np.float32(scale) * leaf, pair[0])
    np.testing.assert_allclose(tree_cosine(scaled, pair[1]), plain_cosine(*pair), rtol=RTOL)


def test_cosines_of_bfloat16_trees_are_float32(pair):
    half = [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), delta) for delta in pair]
    got = tree_cosine(*half)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, plain_cosine(*half), rtol=RTOL)


def test_seeds_in_one_program_are_aligned_as_alone():
    lanes = [(update(seed), update(seed + 10)) for seed in range(3)]
    sides = (jax.tree.map(lambda *leaves: np.stack(leaves), *side) for side in zip(*lanes, strict=True))
    batched = one_program(jax.vmap(partial(alignment.align, rank=RANK)))(*sides)
    for i, pair in enumerate(lanes):
        alone = align(*pair, rank=RANK)
        assert jax.tree.structure(alone) == jax.tree.structure(batched)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=RTOL, atol=ATOL), tree.lane(batched, i), alone)


def test_the_slope_is_what_the_loss_hands_to_the_margins():
    margins = np.asarray([0.0, 2.0, -3.0, 200.0, -200.0])
    wide = margins.astype(np.float32)
    got = one_program(dpo_loss.slope)(wide)
    handed = one_program(jax.grad(lambda m: -jax.nn.log_sigmoid(m).sum()))(wide)
    np.testing.assert_allclose(got, -handed, rtol=RTOL)
    np.testing.assert_allclose(got, np.exp(-np.logaddexp(0, margins)), rtol=RTOL, atol=ATOL)


@pytest.mark.slow
def test_at_the_reference_dpo_follows_unlearning_at_half_the_slope(key):
    """What the gradient cosine at the start says of these two methods, whatever the model."""
    config = gpt.GPTConfig(vocab_size=5, max_tokens=6, layers=1, heads=2, width=8)
    params, model = one_program(partial(gpt.init, config))(key=key), gpt.model(config)

    tokens = np.random.default_rng(0).integers(0, 5, (2, 4, 7), np.int32)
    sides = [Batch(tokens=s[:, :-1], targets=s[:, 1:], mask=np.ones((4, 6), bool)) for s in tokens]
    weights = {"weight_chosen": 1.0, "weight_rejected": 0.1, "reduction": "mean"}
    methods = (
        bound("dpo", model, reference=params, **weights),
        bound("unlearn", model, **weights),
        bound("sft", model),
    )
    batch = PreferenceBatch(*sides, unsafe=np.ones(4, bool))
    gradients = one_program(jax.jacrev(lambda p, b: jnp.stack([loss(p, b)[0] for loss in methods])))(params, batch)
    dpo, unlearn, sft = (tree.lane(gradients, i) for i in range(3))
    np.testing.assert_allclose(tree_cosine(dpo, unlearn), 1, rtol=RTOL)
    slope = one_program(dpo_loss.slope)(np.zeros(1, np.float32))[0]
    assert slope == 0.5
    halved = jax.tree.map(lambda leaf: slope * leaf, unlearn)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), dpo, halved)
    assert abs(tree_cosine(dpo, sft)) < 0.999


def test_bad_arguments_are_named(pair):
    pair, wider = jax.tree.map(jnp.asarray, (pair, update(2, n=OUTPUTS + 1)))
    for rank in (0, INPUTS + 1):
        with pytest.raises(ValueError, match=f"rank: got {rank}, expected from 1 to {INPUTS}, the smallest side"):
            alignment.align(*pair, rank=rank)
    with pytest.raises(ValueError, match=r"up_bias of shape \(2, 20\), expected matrices"):
        alignment.align(*pair, rank=1, pattern="blocks/mlp/.*")
    with pytest.raises(ValueError, match="no parameter path matches"):
        alignment.align(*pair, rank=1, pattern="blocks/attn/.*")
    with pytest.raises(ValueError, match=r"shape delta_a \(2, 20, 8\) and delta_b \(2, 21, 8\): expected the same"):
        alignment.align(pair[0], wider, rank=1)
    with pytest.raises(ValueError, match="norm is in a but not in b"):
        alignment.tree_cosine(pair[0], {"blocks": pair[1]["blocks"]})
