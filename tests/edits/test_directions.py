"""The update cut to a few output directions, against NumPy in float64, and what of a study's models it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import tree
from jaxsafety.edits import directions
from jaxsafety.linalg.directions import INPUTS
from jaxsafety.recipe.schema import Recipe

ATOL = 1e-4
LAYERS, WIDTH, HIDDEN, ROWS = 2, 4, 6, 30


@pytest.fixture(scope="module")
def delta():
    rng = np.random.default_rng(0)
    mlp = {"up": rng.normal(size=(LAYERS, WIDTH, HIDDEN)), "down": rng.normal(size=(LAYERS, HIDDEN, WIDTH))}
    mlp |= {"up_bias": rng.normal(size=(LAYERS, HIDDEN)), "down_bias": rng.normal(size=(LAYERS, WIDTH))}
    attn = {"q": rng.normal(size=(LAYERS, WIDTH, WIDTH))}
    return {"embed": rng.normal(size=(5, WIDTH)), "blocks": {"attn": attn, "mlp": mlp}}


def single(params):
    return jax.tree.map(jnp.float32, params)


def cut(matrix, rows, rank):
    """The matrix of a rank that is nearest on the rows."""
    right = np.linalg.svd(rows @ matrix)[2][:rank].T
    return matrix @ right @ right.T


@pytest.mark.parametrize("choice", ["singular", "activations"])
def test_mlp_matrices_are_cut_and_everything_else_stays(delta, choice):
    rng = np.random.default_rng(1)
    rows = {site: rng.normal(size=(LAYERS, ROWS, {"up": WIDTH, "down": HIDDEN}[name])) for name, site in INPUTS.items()}
    moments = {site: jnp.float32(np.einsum("lrm,lrn->lmn", one, one)) for site, one in rows.items()}
    run = jax.jit(lambda rank: directions.directions_part(single(delta), choice, rank=rank, moments=moments))
    for rank in (0, 1, 3):
        found = tree.flatten(run(jnp.int32(rank)))
        for path, leaf in tree.flatten(delta).items():
            name = path.rpartition("/")[2]
            if name not in INPUTS:
                np.testing.assert_array_equal(found[path], np.float32(leaf), err_msg=path)
                continue
            given = rows[INPUTS[name]] if choice == "activations" else [np.eye(leaf.shape[1])] * LAYERS
            expected = [cut(matrix, one, rank) for matrix, one in zip(leaf, given, strict=True)]
            np.testing.assert_allclose(found[path], expected, atol=ATOL, err_msg=path)


@pytest.mark.parametrize("choice", ["singular", "random"])
def test_all_directions_are_the_whole_update(delta, choice):
    found = directions.directions_part(single(delta), choice, rank=WIDTH, key=jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), found, single(delta))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 5}, "rank: got 5, expected from 0 to 4"),
        ({"rank": -1}, "rank: got -1, expected from 0 to 4"),
        ({"rank": 1, "choice": "activations"}, "choice 'activations' got no moments"),
    ],
)
def test_bad_arguments_are_one_sentence(delta, given, message, unchecked):
    with pytest.raises(ValueError, match=message):
        directions.directions_part(single(delta), **{"choice": "singular"} | given)


def test_it_is_no_model_of_its_own(mini_recipe):
    models = dict(mini_recipe.models) | {"few": {"from": "sft", "edit": "directions", "rank": [1]}}
    with pytest.raises(ValueError, match=r"models\.few\.edit: directions may look at activations, expected it among"):
        Recipe(name="mini", subject={"world": "tiny"}, models=models)


@pytest.mark.parametrize("field", ["method", "choice"])
def test_what_there_is_not_is_refused_before_anything_runs(mini_recipe, field, unchecked):
    edit = {"few": {"edit": "directions", field: "randomized"}}
    with pytest.raises(ValueError, match=f"edits.few: unknown {field} 'randomized': expected one of"):
        Recipe(name="mini", subject={"world": "tiny"}, models=dict(mini_recipe.models), edits=edit)
