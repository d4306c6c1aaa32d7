"""Random directions against QR in float64, and VISAGE against closed forms and a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, tree
from jaxsafety.config import fields
from jaxsafety.edits import landscape as module
from jaxsafety.edits.landscape import Config, landscape, visage
from jaxsafety.study import analyze

# float32 weights of order 1, and sums over some hundred of them, against float64.
ATOL = 2e-6
# Of a share, means of some numbers in float32.
ROUNDING = 1e-6
KEY = jax.random.key(3)
LAYERS, WIDTH, WIDER = 3, 6, 8
MATRICES = {"embed", "unembed", "blocks/mlp/up", "blocks/attn/q"}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (9, WIDTH), "unembed": (WIDTH, 9), "norm/scale": (WIDTH,), "blocks/mlp/up": (LAYERS, WIDTH, WIDER),
        "blocks/mlp/up_bias": (LAYERS, WIDER), "blocks/attn/q": (LAYERS, WIDTH, WIDTH),
        "blocks/norm/scale": (LAYERS, 2),
    }  # fmt: skip
    return tree.unflatten({path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()})


@pytest.fixture(scope="module")
def move():
    """One program for every point."""
    return jax.jit(landscape)


@pytest.fixture(scope="module")
def directions(params, move):
    """Both directions of a pair in float64, by path."""

    def found(direction=0, key=KEY):
        ends = (move(params, alpha=a, beta=b, direction=direction, key=key) for a, b in ((1.0, 0.0), (0.0, 1.0)))
        ends = (tree.flatten(jax.device_get(end)) for end in ends)
        start = tree.flatten(params)
        return [{path: np.float64(end[path]) - start[path] for path in start} for end in ends]

    return found


def tensors(flat):
    """Every tensor of a tree by itself: a leaf, or a layer of one."""
    for path in sorted(MATRICES):
        yield from flat[path] if path.startswith("blocks") else flat[path][None]


def test_directions_are_gaussian_draws_made_orthogonal_and_as_long_as_the_weights(params, directions):
    first, second = directions(direction=2)
    own = jax.random.fold_in(KEY, 2)
    for path, leaf in tree.flatten(params).items():
        if path not in MATRICES:
            continue
        at, stacked = keys.named(own, path), path.startswith("blocks")
        for layer, weights in enumerate(leaf if stacked else leaf[None]):
            drawn = jax.random.normal(jax.random.fold_in(at, layer) if stacked else at, (2, *weights.shape))
            q, r = np.linalg.qr(np.float64(drawn).reshape(2, -1).T)
            expected = (q * np.sign(np.diag(r)) * np.linalg.norm(np.float64(weights))).T.reshape(drawn.shape)
            for got, one in zip((first, second), expected, strict=True):
                np.testing.assert_allclose(got[path][layer] if stacked else got[path], one, atol=ATOL)


def test_both_are_as_long_as_every_tensor_and_orthogonal(params, directions):
    weights, both = tree.flatten(params), directions()
    for own, *pair in zip(tensors(weights), *map(tensors, both), strict=True):
        size = np.linalg.norm(own)
        assert [np.linalg.norm(one) for one in pair] == pytest.approx([size, size], rel=ATOL)
        assert abs(np.vdot(*pair)) < ATOL * size**2
    products = [np.vdot(both[0][path], both[1][path]) for path in weights]
    assert abs(sum(products)) < ATOL * sum(np.vdot(leaf, leaf) for leaf in weights.values())


def test_norms_and_biases_stay(params, directions):
    for one in directions():
        assert {path for path, moved in one.items() if moved.any()} == MATRICES
    single = {"w": np.ones((1, 1), np.float32), "v": np.zeros((2, 2), np.float32), "count": np.ones((2, 2), np.int32)}
    got = landscape(single, alpha=0.5, beta=0.5, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, got, single)


def test_keys_pairs_paths_and_layers_have_directions_of_their_own(params, directions):
    drawn = [
        np.concatenate([one.ravel() for one in tensors(pair)])
        for pair in (*directions(), *directions(1), *directions(key=jax.random.key(4)))
    ]
    cosines = np.corrcoef(drawn)[np.triu_indices(len(drawn), 1)]
    assert np.abs(cosines).max() < 4 / np.sqrt(len(drawn[0]))
    twins = {"blocks": {"mlp": dict.fromkeys(("up", "gate"), np.ones((2, 20, 20), np.float32))}}
    moved = landscape(twins, alpha=1.0, key=KEY)["blocks"]["mlp"]
    every = np.concatenate([moved["up"], moved["gate"]]).reshape(4, -1) - 1
    assert np.abs(np.corrcoef(every)[np.triu_indices(4, 1)]).max() < 4 / np.sqrt(400)


def test_points_lie_on_a_plane_and_do_not_drift(params, move, directions):
    first, second = directions()
    for alpha, beta in ((0.5, 0.0), (-0.25, 0.75)):
        got = tree.flatten(move(params, alpha=alpha, beta=beta, key=KEY))
        for path, leaf in tree.flatten(params).items():
            np.testing.assert_allclose(got[path], leaf + alpha * first[path] + beta * second[path], atol=ATOL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_both_is_the_model_bit_for_bit(params, move, dtype):
    given = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    given["embed"] = given["embed"].at[0].set(-0.0)
    for direction in range(3):
        got = move(given, alpha=0.0, beta=0.0, direction=direction, key=KEY)
        for path, leaf in tree.flatten(got).items():
            assert leaf.dtype == dtype and leaf.tobytes() == tree.flatten(given)[path].tobytes()
    away = move(given, alpha=0.1, beta=0.0, key=KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(away)} == {jnp.dtype(dtype)}


def test_of_a_model_all_but_norms_and_biases_moves(tiny_gpt):
    got = tree.flatten(jax.jit(landscape)(tiny_gpt, alpha=0.5, key=KEY))
    moved = {path for path, leaf in tree.flatten(tiny_gpt).items() if (got[path] != leaf).any()}
    assert {path for path in got if "norm" in path or "bias" in path} == got.keys() - moved


def test_an_edit_is_a_point_of_the_grid(params, move):
    points = fields.points(Config(direction=(0, 1), beta=(0.0, 0.5), alpha=(-0.5, 0.0)))
    assert len(points) == 8 and len(fields.points(Config())) == 3 * 21 and 0.0 in Config().alpha
    part, strength = analyze.named(points[2])
    assert module._PLACE.search(f"landscape,{part}").groups() == ("0", "0.5") and strength == -0.5
    edited = module.edit({"target": params}, Config(), point=points[2], key=KEY)
    expected = landscape(params, alpha=-0.5, beta=0.5, direction=0, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, edited, expected)


def test_bad_weights_and_distances_are_refused(params):
    with pytest.raises(ValueError, match="alpha holds values that are not finite"):
        landscape(params, alpha=float("nan"), key=KEY)
    with pytest.raises(ValueError, match="params: embed holds values that are not finite"):
        landscape(params | {"embed": params["embed"] * np.inf}, alpha=0.1, key=KEY)
    with pytest.raises(ValueError, match="alpha must be ascending"):
        Config(alpha=(0.5, 0.0))


ALPHAS = jnp.linspace(-0.5, 0.5, 21)


def shares(values):
    return jnp.asarray(values, jnp.float32)


def test_visage_of_shapes_known_in_closed_form():
    safe, basin, slope = np.zeros(21), np.abs(ALPHAS) > 0.3, 2 * np.abs(ALPHAS)
    # The ends of the slope are all unsafe: ten distances of 1, 0.9, ..., 0.1 but the last, on both sides, and 0 once.
    expected = [1, 1, (2 * sum(k / 10 for k in range(1, 10)) + 1) / 19, np.nan]
    got = visage(shares([safe, basin, slope, np.ones(21)]), ALPHAS)
    np.testing.assert_allclose(got, expected, atol=ROUNDING)
    assert visage(shares(100 * slope), ALPHAS, most=100.0) == pytest.approx(100 * expected[2], rel=ROUNDING)


def test_visage_of_capable_points_takes_no_broken_model_for_a_safe_one():
    capability = np.where(np.abs(ALPHAS) < 0.22, 0.8, 0.39)
    complied = np.where(np.abs(ALPHAS) < 0.22, 0.6, 0.0)
    assert visage(shares(complied), ALPHAS) == pytest.approx((9 * 0.4 + 12) / 21, abs=ROUNDING)
    assert visage(shares(complied), ALPHAS, capability=shares(capability)) == pytest.approx(0.4, abs=ROUNDING)
    # Half is enough, and without a capable point there is no score.
    assert visage(shares(complied), ALPHAS, capability=shares(np.where(ALPHAS == 0, 0.8, 0.4))) > 0.7
    assert np.isnan(visage(shares(np.ones(21)), ALPHAS, capability=shares(capability)))
    assert np.isnan(visage(shares(np.zeros(21)), ALPHAS, capability=shares(np.zeros(21))))


@pytest.mark.parametrize("within", [0.1, 0.15, 0.5])
def test_visage_is_a_loop_over_points(within):
    rng = np.random.default_rng(1)
    success, capability = shares(rng.uniform(0, 1.3, (2, 3, 21)).clip(0, 1)), shares(rng.uniform(0, 1, (2, 3, 21)))
    got = np.asarray(visage(success, ALPHAS, within=within, capability=capability))
    for place in np.ndindex(2, 3):
        kept = [
            1 - float(one)
            for one, able, alpha in zip(success[place], capability[place], ALPHAS, strict=True)
            if abs(alpha) < within + 0.01 and one < 1 and able >= capability[place][10] / 2
        ]
        assert got[place] == pytest.approx(np.mean(kept), abs=ROUNDING)


def test_visage_refuses_what_is_no_distance():
    with pytest.raises(ValueError, match=r"within: got 0\.0, expected a number greater than 0"):
        visage(shares(np.zeros(21)), ALPHAS, within=0.0)
    with pytest.raises(ValueError, match="alphas holds values that are not finite"):
        visage(shares(np.zeros(21)), ALPHAS * np.nan)
