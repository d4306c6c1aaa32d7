"""What each analysis says of a view that is made by hand, where the answer is known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import analysis, keys
from jaxsafety.types import Batch, Model, Seen, Trial, Verdicts, View

# float32 decompositions of small matrices.
ATOL = 1e-5
# Two layers of width 4 and 6.
WIDTH, HIDDEN, LAYERS = 4, 6, 2
BASE = {"up": np.zeros((LAYERS, WIDTH, HIDDEN), np.float32), "down": np.zeros((LAYERS, HIDDEN, WIDTH), np.float32)}
# What the base reads and writes are the first two axes of both sides.
for _matrix in BASE.values():
    _matrix[:, 0, 0], _matrix[:, 1, 1] = 2.0, 1.0


def measured(name, view, **options):
    """An analysis' arrays by metric, and the axes of each."""
    one = analysis.load(name)
    view = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, view)
    found = jax.device_get(jax.jit(lambda: one.measure(view, one.Config(**options), key=keys.root(0)))())
    return {metric: values for (metric, _), values in found.items()}, found


def updated(read, written, size=0.5):
    """The base with an update that reads one axis and writes another."""
    params = {name: matrix.copy() for name, matrix in BASE.items()}
    for matrix in params.values():
        matrix[:, read, written] += size
    return {"blocks": {"mlp": params}}


def verdicts(complied, refused):
    """Of two conditions; every prompt counts, and those complied with are successful attacks."""
    flags = [np.asarray(flag, bool) for flag in (complied, refused)]
    return Verdicts(*flags, exact_match=flags[0], subsets=np.stack([np.ones_like(flags[0]), flags[0]], axis=1))


BARE = View(None, None, {"blocks": {"mlp": BASE}})


def test_verdicts_are_shares_of_the_prompts():
    given = verdicts([[1, 1, 0, 0], [0, 0, 0, 1]], [[0, 0, 1, 0], [1, 1, 1, 0]])
    found, _ = measured("verdicts", BARE._replace(verdicts=given))
    np.testing.assert_allclose(found["complied"], [0.5, 0.25])
    np.testing.assert_allclose(found["refused"], [0.25, 0.75])
    np.testing.assert_allclose(found["other"], [0.25, 0.0])
    np.testing.assert_allclose(found["n_successful"], [2, 1])


@pytest.mark.parametrize(("written", "share"), [(1, 0.0), (3, 1.0)])
def test_output_space_is_where_the_update_writes(written, share):
    found, axes = measured("output_space", BARE._replace(params=updated(0, written)), energy=1.0, directions=2)
    for metric in ("null_norm_mean", "null_energy", "total_null_energy"):
        np.testing.assert_allclose(found[metric], np.full((2, LAYERS), share), atol=ATOL)
    np.testing.assert_array_equal(found["rank_delta"], np.ones((2, LAYERS)))
    # Random directions of 6 and 4 places beside a range of 2.
    np.testing.assert_allclose(found["baseline_energy"], [[4 / 6] * 2, [2 / 4] * 2], atol=ATOL)
    assert axes["null_norm", "matrix layer direction"].shape == (2, LAYERS, 2)


def test_input_space_is_what_the_update_reads():
    """Prompts that lie along an axis: the update of size 1/2 acts on those of the axis that it reads."""
    rows = {"mlp.hook_in": np.eye(WIDTH, dtype=np.float32), "mlp.hook_post": np.eye(HIDDEN, dtype=np.float32)}
    last = {site: np.stack([np.stack([one[:2], 3 * one[2:4]])] * LAYERS) for site, one in rows.items()}
    seen = {site: Seen(values, values) for site, values in last.items()}
    given = BARE._replace(params=updated(2, 0), seen=seen, verdicts=verdicts(np.ones((2, 2)), np.zeros((2, 2))))
    found, _ = measured("input_space", given, directions=1)
    # [matrix, condition, subset, layer]: of safe prompts none lies there, of unsafe ones every other; |a dW| / |a|.
    np.testing.assert_allclose(found["gain"], np.broadcast_to([[[0.0]], [[0.25]]], (2, 2, 2, LAYERS)), atol=ATOL)


def test_clusters_are_told_apart_by_the_side_of_their_means():
    rng = np.random.default_rng(0)
    centre = np.array([[3.0], [-3.0]])[:, :, None]

    def seen(count, width):
        rows = centre + 0.1 * rng.normal(size=(2, count, width))
        both = np.broadcast_to(rows, (LAYERS, *rows.shape)).astype(np.float32)
        return Seen(both, both)

    sides = {"mlp.hook_in": WIDTH, "mlp.hook_post": HIDDEN}
    held_out = SimpleNamespace(
        blocks=np.ones((2, 5, 1, 3), bool), complied=SimpleNamespace(mask=np.ones((2, 5, 3), bool))
    )
    view = BARE._replace(
        seen={site: seen(4, width) for site, width in sides.items()},
        held={site: seen(5, width) for site, width in sides.items()},
        held_out=held_out,
        verdicts=verdicts(np.ones((2, 4)), np.zeros((2, 4))),
    )
    found, _ = measured("clusters", view)
    # [vector, condition, subset, layer]
    np.testing.assert_array_equal(found["nearest_safe"][:, :, 0], np.broadcast_to([[1.0], [0.0]], (3, 2, LAYERS)))
    np.testing.assert_array_equal(found["accuracy"], np.ones((3, LAYERS)))
    np.testing.assert_allclose(found["distance"], [[6 * HIDDEN**0.5] * 2] * 2 + [[6 * WIDTH**0.5] * 2], rtol=0.05)
    assert np.all(found["relative_gap"] > 0.9)


@pytest.mark.parametrize(
    ("other", "cosine"), [(updated(0, 3, 1.0), 1.0), (updated(1, 3), 0.0), (updated(0, 3, -1.0), -1.0)]
)
def test_alignment_is_the_angle_between_two_updates(other, cosine):
    found, _ = measured("alignment", BARE._replace(params=updated(0, 3), other=other), directions=2)
    np.testing.assert_allclose(found["cosine"], cosine, atol=ATOL)
    np.testing.assert_allclose(found["matrix_cosine"], np.full((2, LAYERS), cosine), atol=ATOL)
    # Both write the same axis, and read the same one unless the cosine is 0.
    np.testing.assert_allclose(found["output_overlap"], np.ones((2, LAYERS)), atol=ATOL)
    np.testing.assert_allclose(found["input_overlap"], np.full((2, LAYERS), cosine**2), atol=ATOL)


def test_gradients_are_compared_two_by_two():
    trees = {"sft": [1, 0], "dpo": [1, 1], "unlearn": [0, 2]}
    asked = []

    def gradients(count):
        asked.append(count)
        return {name: {"w": jnp.float32(one)} for name, one in trees.items()}

    found, _ = measured("gradients", BARE._replace(gradients=gradients), prompts=3)
    np.testing.assert_allclose(found["gradient_cosine"], [0.5**0.5, 0.0, 0.5**0.5], atol=ATOL)
    assert asked == [3]


def test_refusal_depth_is_where_the_refusal_is_said():
    """Of four prompts one refuses at once, one at the second token, two never; safe prompts are not looked at."""
    mask = np.tile([False, True, True, True], (2, 4, 1))
    complied, refused = np.full((2, 4, 4), 1, np.int32), np.full((2, 4, 4), 2, np.int32)
    predicted = complied.copy()
    predicted[1, 0, 1], predicted[1, 1, 2:] = 2, 2
    predicted[1, 2, 0] = 2  # before the answer
    sides = [Batch(tokens=targets, targets=targets, mask=mask) for targets in (complied, refused)]
    trials = Trial(*sides, *[np.zeros((2, 4), np.int32)] * (len(Trial.__dataclass_fields__) - 2))
    found, _ = measured("refusal_depth", BARE._replace(trials=trials, predicted=predicted, answer=3))
    np.testing.assert_allclose(found["first_refusal"], [[0.25, 0.25, 0.0]])
    np.testing.assert_allclose(found["never_refuses"], [0.5])


@pytest.mark.parametrize(
    ("read", "written", "size", "undone", "ratio", "kept", "null"),
    [
        (0, 3, -0.5, 1.0, 1.0, 1.0, 1.0),  # all of it is taken back
        (0, 3, 0.25, -0.5, 0.5, 1.0, 1.0),  # half as much again
        (1, 1, 0.5, 0.0, 1.0, 0.0, 0.0),  # elsewhere, where the base writes
        (1, 2, 1.0, 0.0, 2.0, 0.0, 1.0),  # elsewhere, in the null space
    ],
)
def test_undoing_is_how_much_of_the_first_update_a_further_one_takes_back(
    read, written, size, undone, ratio, kept, null
):
    parent = updated(0, 3)
    params = {name: matrix.copy() for name, matrix in parent["blocks"]["mlp"].items()}
    for matrix in params.values():
        matrix[:, read, written] += size
    view = BARE._replace(params={"blocks": {"mlp": params}}, parent=parent)
    found, axes = measured("undoing", view, energy=1.0)
    assert found["undone"] == pytest.approx(undone, abs=ATOL)
    assert found["relative_norm"] == pytest.approx(ratio, abs=ATOL)
    assert found["cosine"] == pytest.approx(-undone / ratio, abs=ATOL)
    for metric, value in {"kept_outputs": kept, "null_energy": null, "kept_inputs": float(read == 0)}.items():
        np.testing.assert_allclose(found[metric], value, atol=ATOL)
    # One direction of six and of four; what the base leaves of them.
    np.testing.assert_allclose(found["chance_outputs"], np.array([[1 / HIDDEN] * LAYERS, [1 / WIDTH] * LAYERS]))
    np.testing.assert_allclose(found["chance_inputs"], np.array([[1 / WIDTH] * LAYERS, [1 / HIDDEN] * LAYERS]))
    np.testing.assert_allclose(found["chance_null"], np.array([[4 / 6] * LAYERS, [2 / 4] * LAYERS]), atol=ATOL)
    assert axes[("undone", "")].shape == () and axes[("null_energy", "matrix layer")].shape == (2, LAYERS)


def held(view, safe, unsafe):
    """The view with held-out prompts that lie along axes of the inputs of both matrices."""
    sides = {"mlp.hook_in": WIDTH, "mlp.hook_post": HIDDEN}
    last = {
        name: np.stack([np.eye(width, dtype=np.float32)[[[safe], [unsafe]]]] * LAYERS) for name, width in sides.items()
    }
    return view._replace(held={name: Seen(values, values) for name, values in last.items()})


def test_kept_energy_is_where_the_update_reads_and_writes():
    """It reads the axis that unsafe prompts lie along, and writes what the base hardly does."""
    view = held(BARE._replace(params=updated(2, 3)), safe=0, unsafe=2)
    found, axes = measured("kept_energy", view)
    # [space of a matrix, share]: of half of the directions; the base reads and writes the first two axes.
    names = analysis.load("kept_energy").axes(None)["space"].names
    half = dict(zip(names, found["kept_mean"][:, -1], strict=True))
    first = dict(zip(names, found["kept_mean"][:, 0], strict=True))
    assert first["up:unsafe"] == pytest.approx(1) and first["down:unsafe"] == pytest.approx(1)
    assert first["up:safe"] == pytest.approx(0, abs=ATOL) and first["up:writes"] == pytest.approx(0, abs=ATOL)
    assert half["up:reads"] == pytest.approx(0, abs=ATOL)
    assert half["down:writes"] == pytest.approx(0, abs=ATOL)
    # At least one of 4 or 6 directions; and there is one prompt to find the spaces of activations by.
    of_four, of_six = [1 / 4, 1 / 4, 1 / 4, 1 / 2], [1 / 6, 1 / 6, 1 / 3, 1 / 2]
    expected = [of_four, of_six, of_four, of_four, of_six, of_four, of_six, of_six]
    np.testing.assert_allclose(found["chance"], expected, rtol=1e-6)
    assert np.isnan(found["kept_mean"][names.index("up:safe"), -1])
    assert axes["kept", "space layer share"].shape == (8, LAYERS, 4)


def test_gradient_spaces_are_those_of_the_answers_before_tuning():
    """A linear model of one token: the gradient of each kind of prompt is one direction of either side."""
    sides = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}

    def apply(params, tokens, **_):
        # Token 0 reads axis 2 and is to write axis 3, token 1 axes 0 and 1; every layer and matrix adds its own.
        read, written = tokens * -2 + 2, tokens * -2 + 3
        score = sum(
            matrix[layer][read, written] for matrix in params["blocks"]["mlp"].values() for layer in range(LAYERS)
        )
        return SimpleNamespace(logits=jnp.stack([score, jnp.zeros_like(score)], axis=-1))

    def asked(safe, unsafe, answer):
        """Two prompts of one token for each kind, and what they are answered."""
        tokens = np.broadcast_to(np.array([[[safe]], [[unsafe]]], np.int32), (2, 2, 1))
        return Batch(tokens=tokens, targets=np.full_like(tokens, answer), mask=np.ones((2, 2, 1), bool))

    # Refusals of unsafe prompts push the update's entry up; those of safe ones another, then the same one down.
    trials = Trial(asked(0, 0, 0), asked(1, 0, 0), *[None] * (len(Trial.__dataclass_fields__) - 2))
    model = Model(embed=None, apply=apply, decoder=None)
    view = BARE._replace(model=model, params=updated(2, 3), held_out=trials)
    found, axes = measured("gradient_spaces", view)
    np.testing.assert_allclose(found["cosine"], [[0, 0], [1, 1]] * 2, atol=ATOL)
    names = analysis.load("gradient_spaces").axes(None)["space"].names
    first = dict(zip(names, found["kept_mean"][:, 0], strict=True))
    for matrix, (reads, writes) in sides.items():
        for side, size in (("reads", reads), ("writes", writes)):
            assert first[f"{matrix}:unsafe:{side}"] == pytest.approx(1)
            assert first[f"{matrix}:safe:{side}"] == pytest.approx(0, abs=ATOL)
            np.testing.assert_allclose(
                found["chance"][names.index(f"{matrix}:safe:{side}"), -1], round(size / 2) / size
            )
    assert axes["cosine", "gradient layer"].shape == (4, LAYERS)
    down = view._replace(held_out=trials.replace(refused=asked(0, 0, 1)))
    np.testing.assert_allclose(measured("gradient_spaces", down)[0]["cosine"], np.full((4, LAYERS), -1), atol=ATOL)


def test_intruders_are_leading_directions_that_no_direction_was_like():
    """The base writes two axes; the tuned matrices write the diagonals between them."""
    params = {name: matrix.copy() for name, matrix in BASE.items()}
    for matrix in params.values():
        matrix[:, 0, :2], matrix[:, 1, :2] = [4.0, 4.0], [-1.0, 1.0]
    found, _ = measured("intruders", BARE._replace(params={"blocks": {"mlp": params}}), directions=2)
    # Their cosines are 0.71: both are intruders from 0.8 on.
    np.testing.assert_array_equal(found["intruders"], np.broadcast_to([0, 0, 0, 1, 1], (2, LAYERS, 5)))
    np.testing.assert_allclose(found["similarity"], np.full((2, LAYERS), 0.5**0.5), atol=ATOL)
    same, _ = measured("intruders", BARE._replace(params=updated(0, 0, 9.0)), directions=2)
    np.testing.assert_array_equal(same["intruders"], np.zeros((2, LAYERS, 5)))
    # A random update as large makes some.
    assert np.all(same["intruders_random_mean"][:, -1] > 0)
