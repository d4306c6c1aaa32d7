"""Parts and multiples of an update, against eigendecompositions in float64, closed forms and sampling."""

import inspect
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import tree
from jaxsafety.edits import layer_part, rank_part, scaled, space_part, transferred
from jaxsafety.models import gpt

# float32 SVDs and products of entries of order 1 against float64: some tens of roundings of 6e-8.
ATOL = 1e-5
LAYERS, WIDTH, WIDER = 3, 4, 6
ENERGY = 0.8
STATIC = {"part", "space", "pattern", "keep", "energy", "method"}
KEPT = ("only", "all_but")


def one_program(function):
    """The function as one program, where eager calls would compile one for every operation."""
    return jax.jit(function, static_argnames=tuple(STATIC & set(inspect.signature(function).parameters)))


def splits_of(split):
    names = {"null": "null_space", "range": "range", "random": "random"}
    return {name: partial(split, space=space, key=jax.random.key(5)) for name, space in names.items()}


EAGER = splits_of(space_part.space_part)


def every_split(base, delta, pattern, energy=ENERGY):
    """All parts of an update and all but them, ``[name][keep]``: one program takes less to compile than six."""
    given = {"pattern": pattern, "energy": energy}
    return {name: {keep: split(base, delta, keep=keep, **given) for keep in KEPT} for name, split in EAGER.items()}


compiled = SimpleNamespace(
    scaled=one_program(scaled.scaled),
    part_delta=one_program(scaled.part_delta),
    tree_part=one_program(scaled.tree_part),
    transferred=one_program(transferred.transferred),
    rank_part=one_program(rank_part.rank_part),
    layer_part=one_program(layer_part.layer_part),
    space_part=one_program(space_part.space_part),
    every_split=one_program(every_split),
)
SPLITS = splits_of(compiled.space_part)
DRAWS = 2000
UP, DOWN, Q = "blocks/mlp/up", "blocks/mlp/down", "blocks/attn/q"


def draw(seed):
    """A small tree with every kind of leaf, its matrices' spectra far from flat."""
    rng = np.random.default_rng(seed)

    def matrices(m, n):
        decay = 0.6 ** np.arange(min(m, n))
        left, right = (np.linalg.qr(rng.normal(size=(LAYERS, side, min(m, n))))[0] for side in (m, n))
        return left * decay @ np.swapaxes(right, 1, 2)

    mlp = {"up": matrices(WIDTH, WIDER), "down": matrices(WIDER, WIDTH)}
    mlp |= {"up_bias": rng.normal(size=(LAYERS, WIDER)), "down_bias": rng.normal(size=(LAYERS, WIDTH))}
    attn = {"q": matrices(WIDTH, WIDTH), "q_bias": rng.normal(size=(LAYERS, WIDTH)), "k": matrices(WIDTH, 3)}
    blocks = {"mlp": mlp, "attn": attn, "norm_attn": {"scale": rng.normal(size=(LAYERS, WIDTH))}}
    params = {"embed": rng.normal(size=(5, WIDTH)), "blocks": blocks, "norm": {"scale": rng.normal(size=WIDTH)}}
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


@pytest.fixture(scope="module")
def base():
    return draw(0)


@pytest.fixture(scope="module")
def delta():
    return draw(1)


@pytest.fixture(scope="module")
def splits(base, delta):
    """Of the MLPs' matrices."""
    return jax.device_get(compiled.every_split(base, delta, tree.MLP_MATRICES))


def concrete(params):
    """What public functions want where no program hides the arrays."""
    return jax.tree.map(jnp.asarray, params)


def with_leaf(params, path, leaf):
    return tree.label(params, lambda name, old: leaf if name == path else old)


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def close(left, right, atol=ATOL):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, leaf in tree.flatten(left).items():
        np.testing.assert_allclose(leaf, tree.flatten(right)[path], atol=atol, err_msg=path)


def equal(left, right):
    close(left, right, atol=0)


def moved(params):
    """The paths of the leaves that are not zero."""
    return {path for path, leaf in tree.flatten(params).items() if np.any(np.asarray(leaf))}


def plain_projectors(matrices, energy):
    """Projectors on the leading output directions, from the eigenvectors of the Gram matrix; and their ranks."""
    projectors, ranks = [], []
    for matrix in np.asarray(matrices, np.float64):
        values, vectors = np.linalg.eigh(matrix.T @ matrix)
        values, vectors = values[::-1], vectors[:, ::-1]
        rank = next(k for k in range(len(values) + 1) if values[:k].sum() >= energy * values.sum())
        projectors.append(vectors[:, :rank] @ vectors[:, :rank].T)
        ranks.append(rank)
    return np.stack(projectors), ranks


PARTS = {
    "whole": {"embed", "norm/scale", "blocks/norm_attn/scale", UP, DOWN, f"{UP}_bias", f"{DOWN}_bias", Q, f"{Q}_bias"}
    | {"blocks/attn/k"},
    "mlp": {UP, DOWN, f"{UP}_bias", f"{DOWN}_bias"},
    "up": {UP, f"{UP}_bias"},
    "down": {DOWN, f"{DOWN}_bias"},
    "attention": {Q, f"{Q}_bias", "blocks/attn/k"},
}


@pytest.mark.parametrize("part", list(PARTS))
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_only_the_part_moves_and_by_alpha(base, delta, part, alpha):
    got = tree.flatten(compiled.scaled(base, delta, alpha=alpha, part=part))
    for path, leaf in tree.flatten(base).items():
        step = alpha * np.asarray(tree.flatten(delta)[path]) if path in PARTS[part] else 0
        np.testing.assert_allclose(got[path], leaf + step, rtol=1e-6, err_msg=path)
    assert moved(compiled.part_delta(delta, part)) == PARTS[part]


def test_alpha_one_of_everything_is_the_tuned_model_and_may_be_traced(base, delta):
    tuned = jax.tree.map(np.add, base, delta)
    equal(compiled.scaled(base, delta, alpha=1.0), tuned)
    alphas = np.linspace(0, 2, 5, dtype=np.float32)
    walk = jax.jit(jax.vmap(partial(scaled.scaled, part="mlp"), in_axes=(None, None)))
    path = jax.device_get(walk(base, delta, alpha=alphas))
    for i, alpha in enumerate(alphas):
        close(tree.lane(path, i), compiled.scaled(base, delta, alpha=float(alpha), part="mlp"))


def test_parts_of_a_gpt_cover_its_blocks(tiny_gpt):
    delta = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), tiny_gpt)
    names = {part: moved(compiled.part_delta(delta, part)) for part in ("mlp", "up", "down", "attention")}
    assert names["up"] | names["down"] == names["mlp"] and not names["up"] & names["down"]
    norms = {path for path in tree.flatten(delta) if path.startswith("blocks/norm")}
    assert names["mlp"] | names["attention"] | norms == {path for path in tree.flatten(delta) if "blocks" in path}


def test_any_pattern_is_a_part(delta):
    assert moved(compiled.tree_part(delta, "norm/.*|.*_bias")) == {
        "norm/scale", f"{UP}_bias", f"{DOWN}_bias", f"{Q}_bias"
    }  # fmt: skip


def test_a_transfer_adds_the_other_update(base, delta):
    got = compiled.transferred(base, delta, alpha=0.5)
    close(got, jax.tree.map(lambda t, d: t + 0.5 * d, base, delta))


def test_null_and_range_parts_match_eigenvectors_in_float64(base, delta, splits):
    null, within = (tree.flatten(splits[name]["only"]) for name in ("null", "range"))
    for path in (UP, DOWN):
        projectors, ranks = plain_projectors(tree.flatten(base)[path], ENERGY)
        assert all(0 < rank < projectors.shape[-1] for rank in ranks)
        update = np.asarray(tree.flatten(delta)[path], np.float64)
        np.testing.assert_allclose(within[path], update @ projectors, atol=ATOL)
        np.testing.assert_allclose(null[path], update @ (np.eye(update.shape[-1]) - projectors), atol=ATOL)


@pytest.mark.parametrize("name", list(SPLITS))
@pytest.mark.parametrize(
    "pattern", [tree.MATRICES, *(pytest.param(p, marks=pytest.mark.slow) for p in (tree.MLP_MATRICES, UP))]
)
def test_a_part_and_all_but_it_are_the_whole_update(base, delta, name, pattern):
    parts = jax.device_get(compiled.every_split(base, delta, pattern)[name])
    only, rest = parts["only"], parts["all_but"]
    close(jax.tree.map(np.add, only, rest), delta)
    assert moved(only) == set(tree.select(delta, pattern))
    for path in set(tree.flatten(delta)) - moved(only):
        np.testing.assert_array_equal(tree.flatten(rest)[path], tree.flatten(delta)[path])
    assert all(np.abs(tree.flatten(rest)[path] - tree.flatten(delta)[path]).max() > 1e-3 for path in moved(only))


def test_null_and_range_parts_are_the_matrices_and_orthogonal(delta, splits):
    null, within = (splits[name]["only"] for name in ("null", "range"))
    matrices = compiled.tree_part(delta, tree.MLP_MATRICES)
    close(jax.tree.map(np.add, null, within), matrices)
    for path in (UP, DOWN):
        products = tree.flatten(null)[path] @ np.swapaxes(tree.flatten(within)[path], 1, 2)
        np.testing.assert_allclose(products, 0, atol=ATOL)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.79, 1), (0.81, 2), (0.99, 3), (1.0, 3)])
def test_the_energy_decides_how_much_is_range(energy, rank):
    """Singular values 4, 2, 0.5, 0: shares of the energy 0.79, 0.20 and 0.01."""
    matrix = np.diag(np.asarray([4.0, 2.0, 0.5, 0.0], np.float32))[None]
    base, delta = ({"blocks": {"mlp": {"up": leaf}}} for leaf in (matrix, np.ones((1, 4, 4), np.float32)))
    got = SPLITS["null"](base, delta, energy=energy, keep="only")["blocks"]["mlp"]["up"]
    np.testing.assert_allclose(np.asarray(got)[0], np.tile(np.arange(4) >= rank, (4, 1)), atol=ATOL)


def test_a_base_that_does_nothing_has_no_range(delta):
    zero = jax.tree.map(np.zeros_like, delta)
    matrices = compiled.tree_part(delta, tree.MLP_MATRICES)
    parts = compiled.every_split(zero, delta, tree.MLP_MATRICES)
    for name in ("null", "random"):
        equal(parts[name]["only"], matrices)
    equal(parts["range"]["only"], zero)


def test_a_tiny_null_part_is_not_drowned_by_rounding(base):
    """An update in the base's own range but for 1e-4 of it."""
    projectors, _ = plain_projectors(base["blocks"]["mlp"]["up"], ENERGY)
    rng = np.random.default_rng(2)
    update = rng.normal(size=(LAYERS, WIDTH, WIDER)) @ (projectors + 1e-4 * (np.eye(WIDER) - projectors))
    delta = with_leaf(base, UP, np.asarray(update, np.float32))
    got = np.asarray(compiled.every_split(base, delta, UP)["null"]["only"]["blocks"]["mlp"]["up"])
    expected = update @ (np.eye(WIDER) - projectors)
    assert np.abs(got - expected).max() < 1e-2 * np.abs(expected).max()


@pytest.fixture(scope="module")
def projectors(base):
    """Random parts of the identity, which are the projectors themselves: ``[draws, l, n, n]``, and the base's ranks."""
    query = base["blocks"]["attn"]["q"]
    eye = np.broadcast_to(np.eye(WIDTH, dtype=np.float32), query.shape)
    trees = [{"blocks": {"attn": {"q": leaf}}} for leaf in (query, eye)]

    def one(key, base, delta):
        return compiled.space_part(base, delta, space="random", energy=ENERGY, pattern=Q, keep="only", key=key)

    drawn = jax.jit(jax.vmap(one, in_axes=(0, None, None)))(jax.random.split(jax.random.key(0), DRAWS), *trees)
    return np.asarray(drawn["blocks"]["attn"]["q"]), np.asarray(plain_projectors(query, ENERGY)[1])


def test_the_random_subspace_has_the_null_space_dimension(projectors):
    drawn, ranks = projectors
    np.testing.assert_allclose(drawn, np.swapaxes(drawn, 2, 3), atol=ATOL)
    np.testing.assert_allclose(drawn @ drawn, drawn, atol=ATOL)
    dimensions = np.trace(drawn, axis1=2, axis2=3)
    np.testing.assert_allclose(dimensions, np.tile(WIDTH - ranks, (DRAWS, 1)), atol=ATOL)


def test_the_random_subspace_is_uniform_and_each_layer_draws_its_own(projectors):
    """The mean projector over many draws is (1 - k / n) I."""
    drawn, ranks = projectors
    # Entries of a projector have a standard deviation of at most 1/2: five standard errors.
    atol = 5 * 0.5 / np.sqrt(DRAWS)
    expected = (1 - ranks / WIDTH)[:, None, None] * np.eye(WIDTH)
    np.testing.assert_allclose(drawn.mean(0), expected, atol=atol)
    correlation = np.corrcoef(drawn[:, :, 0, 1].T)
    assert np.abs(correlation[np.triu_indices(LAYERS, 1)]).max() < 5 / np.sqrt(DRAWS)


def test_matrices_draw_their_own_random_subspaces(base):
    twins = {"blocks": {"attn": {name: base["blocks"]["attn"]["q"] for name in "qv"}}}
    given = {"pattern": tree.MATRICES, "energy": ENERGY, "keep": "only"}
    got = jax.device_get(
        compiled.space_part(twins, twins, space="random", key=jax.random.key(0), **given)["blocks"]["attn"]
    )
    assert np.abs(got["q"] - got["v"]).max() > 0.01


@pytest.mark.parametrize("rank", range(1, WIDTH + 1))
def test_a_rank_part_is_the_best_approximation_of_that_rank(delta, rank):
    got = tree.flatten(jax.device_get(compiled.rank_part(delta, rank=rank)))
    for path, leaf in tree.flatten(delta).items():
        if leaf.ndim < 3:
            np.testing.assert_array_equal(got[path], leaf)
            continue
        for matrix, part in zip(np.asarray(leaf, np.float64), got[path], strict=True):
            u, s, v = np.linalg.svd(matrix)
            kept = min(rank, len(s))
            np.testing.assert_allclose(part, u[:, :kept] * s[:kept] @ v[:kept], atol=ATOL)


def test_one_program_cuts_to_any_rank_and_only_what_matches(delta):
    cut = jax.jit(lambda delta, ranks: jax.lax.map(lambda r: compiled.rank_part(delta, rank=r, pattern=UP), ranks))
    got = jax.device_get(cut(delta, np.arange(1, WIDTH + 1)))
    for i in range(WIDTH):
        close(tree.lane(got, i), compiled.rank_part(delta, rank=i + 1, pattern=UP))
        np.testing.assert_array_equal(got["blocks"]["mlp"]["down"][i], delta["blocks"]["mlp"]["down"])


def test_layer_parts_add_up_to_the_blocks(delta):
    parts = [jax.device_get(compiled.layer_part(delta, layer=layer)) for layer in range(LAYERS)]
    equal(jax.tree.map(lambda *leaves: sum(leaves), *parts), compiled.tree_part(delta, "blocks/.*"))
    for layer, part in enumerate(parts):
        for path, leaf in tree.flatten(part).items():
            if "blocks" in path:
                np.testing.assert_array_equal(leaf[layer], tree.flatten(delta)[path][layer])
                assert not np.any(np.delete(leaf, layer, axis=0))
    mapped = jax.jit(jax.vmap(lambda delta, layer: compiled.layer_part(delta, layer=layer), in_axes=(None, 0)))
    equal(mapped(delta, np.arange(LAYERS)), stacked(parts))


@pytest.fixture(scope="module")
def seeds():
    """The parts of three seeds in one program, and those of each alone."""
    lanes = [(draw(seed), draw(seed + 10)) for seed in range(3)]
    # A flat spectrum: all directions are needed.
    eye = np.eye(WIDTH, WIDER, dtype=np.float32)
    lanes[2] = (with_leaf(lanes[2][0], UP, np.broadcast_to(eye, (LAYERS, WIDTH, WIDER))), lanes[2][1])
    every = jax.jit(jax.vmap(partial(every_split, pattern=tree.MLP_MATRICES)))
    batched = every(stacked([b for b, _ in lanes]), stacked([d for _, d in lanes]))
    return jax.device_get((batched, [compiled.every_split(*lane, tree.MLP_MATRICES) for lane in lanes]))


@pytest.mark.parametrize("name", list(SPLITS))
@pytest.mark.parametrize("keep", KEPT)
def test_seeds_in_one_program_are_split_as_alone(seeds, name, keep):
    """Whose bases need not have ranges of the same dimension."""
    batched, every_alone = seeds
    for i, alone in enumerate(every_alone):
        close(tree.lane(batched[name][keep], i), alone[name][keep])


@pytest.fixture(scope="module")
def halves(base, delta):
    """The parts of an update in bfloat16, and of the same one in float32."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), delta)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), half)
    return [jax.device_get(compiled.every_split(base, update, tree.MLP_MATRICES)) for update in (half, wide)]


@pytest.mark.parametrize("name", list(SPLITS))
def test_parts_of_a_bfloat16_update_are_computed_in_float32(halves, name):
    for keep in KEPT:
        got, exact = (parts[name][keep] for parts in halves)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(got))
        equal(got, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact))


def test_a_tuned_gpt_minus_a_part_of_its_update_still_runs(tiny_config, tiny_gpt):
    other = jax.jit(partial(gpt.init, tiny_config))(key=jax.random.key(8))
    delta = jax.tree.map(lambda tuned, base: np.asarray(tuned) - np.asarray(base), other, tiny_gpt)
    tokens = jnp.asarray(np.arange(12, dtype=np.int32).reshape(2, 6))
    forward = jax.jit(lambda params: gpt.apply(params, tokens, config=tiny_config).logits)
    rest = compiled.every_split(tiny_gpt, delta, tree.MLP_MATRICES, energy=0.9)
    logits = [
        np.asarray(forward(compiled.scaled(tiny_gpt, part, alpha=1.0)))
        for part in (delta, *(rest[name]["all_but"] for name in SPLITS))
    ]
    assert all(np.isfinite(leaf).all() for leaf in logits)
    assert all(np.abs(leaf - logits[0]).max() > ATOL for leaf in logits[1:])


def test_bad_parts_are_named(base, delta, unchecked):
    base, delta = concrete((base, delta))
    with pytest.raises(ValueError, match=r"unknown part 'atention'.*did you mean 'attention'"):
        scaled.part_delta(delta, "atention")
    with pytest.raises(ValueError, match=r"unknown part 'Up'"):
        scaled.scaled(base, delta, alpha=1.0, part="Up")
    with pytest.raises(ValueError, match=r"unknown keep 'all'.*only, all_but"):
        SPLITS["null"](base, delta, keep="all")
    with pytest.raises(ValueError, match=r"no parameter path matches 'blocks/moe/.*'; the paths are blocks/attn/k, "):
        scaled.tree_part(delta, "blocks/moe/.*")
    with pytest.raises(ValueError, match=r"unknown space 'null': expected one of null_space, range, random"):
        space_part.space_part(base, delta, "null", keep="only")
    with pytest.raises(ValueError, match="space 'random' got no key"):
        space_part.space_part(base, delta, "random", keep="only")


@pytest.mark.parametrize("name", list(SPLITS))
def test_what_the_gram_matrix_does_not_resolve_is_nan(name):
    matrix = jnp.asarray(np.diag([1.0, 1e-3, 1e-3]), jnp.float32)[None]
    base, delta = ({"blocks": {"mlp": {"up": leaf}}} for leaf in (matrix, jnp.ones((1, 3, 3))))
    got = SPLITS[name](base, delta, energy=1.0, keep="only", method="gram")
    assert np.isnan(got["blocks"]["mlp"]["up"]).all()


@pytest.mark.parametrize("name", list(SPLITS))
def test_bad_splits_are_named(base, delta, name):
    for energy in (0.0, 1.1, jnp.nan):
        with pytest.raises(ValueError, match="energy"):
            SPLITS[name](base, delta, energy=energy, keep="only")
    with pytest.raises(
        ValueError, match=r"matches blocks/mlp/up_bias of shape \(3, 6\), expected matrices \[l, m, n\]"
    ):
        SPLITS[name](base, delta, pattern="blocks/mlp/up.*", keep="only")
    with pytest.raises(ValueError, match="no parameter path matches"):
        SPLITS[name](base, delta, pattern="mlp", keep="only")
    broken = base["blocks"]["mlp"]["up"].copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        EAGER[name](*concrete((with_leaf(base, UP, broken), delta)), keep="only")


@pytest.mark.parametrize("combine", [
    partial(scaled.scaled, alpha=1.0),
    partial(transferred.transferred, alpha=1.0),
    *(partial(split, keep="only") for split in SPLITS.values()),
])  # fmt: skip
def test_trees_that_differ_are_named(base, delta, combine):
    base, delta = concrete((base, delta))
    other = with_leaf(delta, UP, jnp.asarray(np.zeros((LAYERS, WIDTH, WIDER + 1), np.float32)))
    names = r"(base|tuned) \(3, 4, 6\) and (delta|other_delta) \(3, 4, 7\): expected the same"
    with pytest.raises(ValueError, match=rf"blocks/mlp/up has shape {names}"):
        combine(base, other)
    fewer = {name: branch for name, branch in delta.items() if name != "embed"}
    with pytest.raises(ValueError, match=r"embed is in (base|tuned) but not in (delta|other_delta)"):
        combine(base, fewer)


def test_ranks_and_layers_out_of_range_are_named(delta):
    delta = concrete(delta)
    for rank in (0, WIDTH + 1):
        with pytest.raises(ValueError, match=f"rank: got {rank}, expected from 1 to {WIDTH}"):
            rank_part.rank_part(delta, rank=rank)
    for layer in (-1, LAYERS):
        with pytest.raises(ValueError, match=f"layer: got {layer}, expected from 0 to {LAYERS - 1}"):
            layer_part.layer_part(delta, layer=layer)
    with pytest.raises(ValueError, match="no parameter path matches 'blocks"):
        layer_part.layer_part({"embed": delta["embed"]}, layer=0)
