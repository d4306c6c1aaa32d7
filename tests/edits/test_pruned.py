"""Safety-critical weights and directions removed: against sorts and decompositions in NumPy, and a study's moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, tree
from jaxsafety.edits import pruned, pruned_ranks
from jaxsafety.linalg.directions import INPUTS
from jaxsafety.recipe.nodes import EditConfig
from jaxsafety.recipe.schema import Recipe
from jaxsafety.study import judged, lanes
from jaxsafety.study.view import Prompts, answer_moments
from jaxsafety.world import batch_at

# Products and decompositions in float32 against float64.
ATOL = 1e-4
LAYERS, WIDTH, HIDDEN, ROWS = 2, 4, 6, 30
SIZES = {"up": WIDTH, "down": HIDDEN}


def draw(seed):
    rng = np.random.default_rng(seed)
    mlp = {"up": rng.normal(size=(LAYERS, WIDTH, HIDDEN)), "down": rng.normal(size=(LAYERS, HIDDEN, WIDTH))}
    return {
        "embed": rng.normal(size=(5, WIDTH)),
        "blocks": {"mlp": mlp | {"up_bias": rng.normal(size=(LAYERS, HIDDEN))}},
    }


PARAMS = draw(0)
# Inputs of unlike sizes, or all weights' scores would be their own.
INSIDE = {
    name: {
        INPUTS[matrix]: np.random.default_rng(seed).normal(size=(LAYERS, ROWS, size))
        * np.geomspace(0.2, 5, size)[::way]
        for matrix, size in SIZES.items()
    }
    for name, seed, way in (("safe", 1, 1), ("unsafe", 2, -1))
}
MOMENTS = jax.tree.map(lambda rows: jnp.float32(np.einsum("lrm,lrn->lmn", rows, rows)), INSIDE)
SINGLE = jax.tree.map(jnp.float32, PARAMS)


def others_stay(found):
    for path, leaf in tree.flatten(SINGLE).items():
        if path.rpartition("/")[2] not in SIZES:
            np.testing.assert_array_equal(tree.flatten(found)[path], leaf, err_msg=path)


@pytest.fixture(scope="module")
def prune():
    return jax.jit(lambda safety, utility: pruned.pruned(SINGLE, MOMENTS, safety=safety, utility=utility))


@pytest.mark.parametrize(("safety", "utility"), [(0.25, 0.0), (0.5, 0.25), (1.0, 0.5)])
def test_the_top_of_one_score_goes_but_for_the_top_of_the_other(prune, safety, utility):
    found = prune(safety, utility)
    others_stay(found)
    removed = 0
    for name in SIZES:
        for layer in range(LAYERS):
            weights = PARAMS["blocks"]["mlp"][name][layer]
            top = []
            for kind, share in (("unsafe", safety), ("safe", utility)):
                norms = np.linalg.norm(INSIDE[kind][INPUTS[name]][layer], axis=0)
                scores = np.abs(weights) * norms[:, None]
                top.append(set(np.argsort(-scores.ravel())[: round(share * scores.size)]))
            expected = weights.ravel().astype(np.float32)
            expected[list(top[0] - top[1])] = 0
            removed += len(top[0] - top[1])
            np.testing.assert_array_equal(found["blocks"]["mlp"][name][layer].ravel(), expected)
    assert removed


def test_no_share_and_what_answering_needs_whole_remove_nothing(prune):
    for given in ((0.0, 0.0), (0.0, 0.3), (0.6, 1.0)):
        jax.tree.map(np.testing.assert_array_equal, prune(*given), SINGLE)


@pytest.fixture(scope="module")
def remove():
    return jax.jit(lambda safety, utility: pruned_ranks.ranks_removed(SINGLE, MOMENTS, safety=safety, utility=utility))


@pytest.mark.parametrize(("safety", "utility"), [(1, 0), (2, 1), (3, 2)])
def test_directions_go_but_for_what_they_share_with_the_others(remove, safety, utility):
    found = remove(safety, utility)
    others_stay(found)
    for name in SIZES:
        for layer in range(LAYERS):
            weights, projectors = PARAMS["blocks"]["mlp"][name][layer], []
            for kind, rank in (("unsafe", safety), ("safe", utility)):
                # As the paper writes it, with weights turned over.
                basis = np.linalg.svd(weights.T @ INSIDE[kind][INPUTS[name]][layer].T)[0][:, :rank]
                projectors.append(basis @ basis.T)
            expected = weights.T - (np.eye(len(projectors[0])) - projectors[1]) @ projectors[0] @ weights.T
            np.testing.assert_allclose(found["blocks"]["mlp"][name][layer], expected.T, atol=ATOL)


def test_no_direction_removes_nothing_and_all_of_them_leave_what_is_spared(remove):
    jax.tree.map(np.testing.assert_array_equal, remove(0, 2), SINGLE)
    for leaf in (remove(WIDTH, 0)["blocks"]["mlp"][name] for name in SIZES):
        np.testing.assert_allclose(leaf, 0, atol=ATOL)
    for name in SIZES:
        kept, whole = (tree_["blocks"]["mlp"][name] for tree_ in (remove(WIDTH, WIDTH), SINGLE))
        np.testing.assert_allclose(kept, whole, atol=ATOL)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pruned.pruned(SINGLE, MOMENTS, safety=1.5, utility=0.0), "safety: got 1.5, expected from 0 to 1"),
        (lambda: pruned_ranks.ranks_removed(SINGLE, MOMENTS, safety=1, utility=-1), "utility: got -1, expected at lea"),
        (lambda: pruned.pruned({"a": jnp.ones(2)}, MOMENTS, safety=0.1, utility=0.0), "no parameter path matches"),
    ],
)
def test_bad_arguments_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("edit", ["pruned", "pruned_ranks"])
def test_they_are_no_models_of_their_own(mini_recipe, edit):
    models = dict(mini_recipe.models) | {"few": {"from": "sft", "edit": edit, "safety": [1]}}
    with pytest.raises(ValueError, match=rf"models\.few\.edit: {edit} may look at activations, expected it among"):
        Recipe(name="mini", subject={"world": "tiny"}, models=models)


@pytest.mark.slow
def test_a_study_tells_them_what_is_inside_where_prompts_are_answered_and_refused(
    mini_recipe, mini_subject, tiny_world
):
    model, sites = mini_subject.analysed, tuple(INPUTS.values())
    node, point = EditConfig("pruned"), {"safety": jnp.float32(0.1), "utility": jnp.float32(0.05)}

    @jax.jit
    def run(key):
        drawn = [batch_at(tiny_world, name, key=key, step=0, batch_size=4) for name in ("safe", "unsafe")]
        trials, params = tree.stack(drawn), lanes.init_params(mini_subject, key=key)
        prompts = Prompts(trials=trials, held_out=trials)
        moments = answer_moments(mini_recipe, model, params, prompts, sites=sites)
        sides = {"safe": drawn[0].complied, "unsafe": drawn[1].refused}
        seen = {name: model.apply(params, side.tokens, sites=sites).activations for name, side in sides.items()}
        edited = judged.edited_lane(mini_recipe, mini_subject, node, {"target": params}, (key, prompts), None, point)
        return moments, seen, {name: side.mask for name, side in sides.items()}, params, edited

    moments, seen, masks, params, edited = jax.device_get(run(keys.root(0)))
    for name, found in moments.items():
        for site, values in found.items():
            rows = seen[name][site][:, masks[name]].astype(np.float64)
            np.testing.assert_allclose(values, np.einsum("lrm,lrn->lmn", rows, rows), rtol=1e-3, atol=1e-3)
    changed = {path for path, leaf in tree.flatten(edited).items() if np.any(leaf != tree.flatten(params)[path])}
    assert changed == {"blocks/mlp/up", "blocks/mlp/down"}
    assert 0 < np.mean(edited["blocks"]["mlp"]["up"] == 0) <= 0.1
