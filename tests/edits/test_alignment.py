"""Edits by what alignment changed, extrapolated at a low rank or projected onto: against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import tree
from jaxsafety.edits import lox, safe_projection

# Decompositions and products in float32 of numbers of order one.
ATOL = 1e-5
LAYERS, WIDTH, HIDDEN = 2, 4, 6
UP, Q = "blocks/mlp/up", "blocks/attn/q"


def draw(seed):
    rng = np.random.default_rng(seed)
    mlp = {"up": rng.normal(size=(LAYERS, WIDTH, HIDDEN)), "up_bias": rng.normal(size=(LAYERS, HIDDEN))}
    blocks = {"attn": {"q": rng.normal(size=(LAYERS, WIDTH, WIDTH))}, "mlp": mlp}
    return jax.tree.map(jnp.float32, {"embed": rng.normal(size=(5, WIDTH)), "blocks": blocks})


BASE, ALIGNED, TUNED = (draw(seed) for seed in range(3))


def wide(params):
    return {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def extrapolate():
    return jax.jit(lambda rank, alpha: lox.extrapolated(ALIGNED, BASE, rank=rank, alpha=alpha))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("alpha", [1.25, -0.5])
def test_leading_directions_are_taken_further(extrapolate, rank, alpha):
    found, before, after = wide(extrapolate(rank, alpha)), wide(BASE), wide(ALIGNED)
    for path, leaf in after.items():
        if path not in (UP, Q):
            np.testing.assert_array_equal(found[path], leaf, err_msg=path)
            continue
        for layer in range(LAYERS):
            inputs, values, outputs = np.linalg.svd(leaf[layer] - before[path][layer], full_matrices=False)
            part = inputs[:, :rank] * values[:rank] @ outputs[:rank]
            np.testing.assert_allclose(found[path][layer], leaf[layer] + alpha * part, atol=ATOL)


def test_nothing_further_is_the_aligned_model_and_all_directions_are_its_whole_update(extrapolate):
    equal(extrapolate(3, 0.0), ALIGNED)
    equal(extrapolate(0, 2.0), ALIGNED)
    found, before, after = wide(extrapolate(WIDTH, 1.0)), wide(BASE), wide(ALIGNED)
    for path in (UP, Q):
        np.testing.assert_allclose(found[path], 2 * after[path] - before[path], atol=ATOL)


def test_equal_weights_have_nothing_to_extrapolate():
    equal(lox.extrapolated(ALIGNED, ALIGNED, rank=2, alpha=3.0), ALIGNED)


def by_hand(update, alignment):
    """The paper's matrices, which are those of ours turned over."""
    square = alignment.T @ alignment / np.linalg.norm(alignment)
    kept = (square @ update.T).T
    return kept, (kept * update).sum() / np.linalg.norm(kept) / np.linalg.norm(update)


def test_updates_below_the_threshold_are_projected_and_no_others():
    before, middle, after = wide(BASE), wide(ALIGNED), wide(TUNED)
    cosines = sorted(
        by_hand(after[path][layer] - middle[path][layer], middle[path][layer] - before[path][layer])[1]
        for path in (UP, Q)
        for layer in range(LAYERS)
    )
    threshold = np.mean(cosines[1:3])
    run = jax.jit(lambda threshold: safe_projection.projected(TUNED, ALIGNED, BASE, threshold=threshold))
    found = wide(run(threshold))
    for path, leaf in after.items():
        if path not in (UP, Q):
            np.testing.assert_array_equal(found[path], leaf, err_msg=path)
            continue
        for layer in range(LAYERS):
            start = middle[path][layer]
            kept, cosine = by_hand(leaf[layer] - start, start - before[path][layer])
            expected = start + kept if cosine < threshold else leaf[layer]
            np.testing.assert_allclose(found[path][layer], expected, atol=ATOL)
    equal(run(0.0), TUNED)


def test_it_has_the_unit_of_the_alignment():
    update, alignment = TUNED["blocks"]["mlp"]["up"], ALIGNED["blocks"]["mlp"]["up"]
    once, thrice = (safe_projection.onto_alignment(update, scale * alignment) for scale in (1, 3))
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-5, atol=ATOL)
    # What the threshold is about has none.
    one, other = (safe_projection.similarity(update, scale * alignment) for scale in (1, 3))
    np.testing.assert_allclose(one, other, atol=ATOL)


def test_of_one_direction_it_is_a_projector_times_its_length():
    rng = np.random.default_rng(5)
    inputs, outputs, update = rng.normal(size=3), rng.normal(size=4), rng.normal(size=(3, 4))
    outputs /= np.linalg.norm(outputs)
    found = safe_projection.onto_alignment(jnp.float32(update)[None], jnp.float32(np.outer(inputs, outputs))[None])
    np.testing.assert_allclose(found[0], np.linalg.norm(inputs) * update @ np.outer(outputs, outputs), atol=ATOL)


def test_where_alignment_changed_nothing_tuning_is_kept():
    equal(safe_projection.projected(TUNED, ALIGNED, ALIGNED, threshold=0.9), TUNED)
    equal(safe_projection.projected(ALIGNED, ALIGNED, BASE, threshold=0.9), ALIGNED)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lox.extrapolated(ALIGNED, BASE, rank=-1, alpha=1.0), "rank: got -1, expected at least 0"),
        (lambda: lox.extrapolated(ALIGNED, BASE, rank=1, alpha=float("nan")), "alpha holds values that are not finite"),
        (lambda: lox.extrapolated(ALIGNED, {"embed": 1}, rank=1, alpha=1.0), "is in aligned but not in base"),
        (
            lambda: safe_projection.projected(TUNED, ALIGNED, BASE, threshold=float("inf")),
            "threshold holds values that are not finite",
        ),
    ],
)
def test_bad_arguments_are_one_sentence(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
