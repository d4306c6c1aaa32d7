"""Soft tokens: layouts against Python lists, steps against NumPy, and what the attack does to a GPT."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import losses, tree, world
from jaxsafety.attacks import soft_tokens
from jaxsafety.models import gpt

# float32 against float64 over a few steps, or another order of summation.
RTOL, ATOL = 2e-5, 1e-6
# A norm after scaling to the radius is off by some units in the last place.
NORM_RTOL = 1e-6
ROWS, WINDOW, PLACES = 5, 9, 4
STEPS = 6


def plain_insert(rows, inserted, at, count):
    """The definition, row by row, as lists."""
    joined = [[*row[:i], *new[:count], *row[i:]] for row, new, i in zip(rows, inserted, at, strict=True)]
    return np.asarray([row[: rows.shape[1]] for row in joined])


def plain_scored(mask, at, count):
    """Which inputs are still followed by the token that they were followed by, and where that is scored."""
    scored = np.zeros_like(mask)
    for row, i in enumerate(at):
        ids = list(range(mask.shape[1] + 1))
        attacked = [*ids[:i], *[None] * count, *ids[i:]]
        for place in range(mask.shape[1]):
            now, following = attacked[place : place + 2]
            scored[row, place] = now is not None and following == now + 1 and mask[row, now]
    return scored


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def at():
    return jnp.asarray([0, 1, 4, 7, 8], jnp.int32)


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
@pytest.mark.parametrize("count", range(PLACES + 1))
def test_insertion_matches_lists(rng, at, count, trailing):
    rows = jnp.asarray(rng.normal(size=(ROWS, WINDOW, *trailing)), jnp.float32)
    new = jnp.asarray(rng.normal(size=(ROWS, PLACES, *trailing)), jnp.float32)
    got = soft_tokens.insert(rows, new, at=at, count=count)
    np.testing.assert_array_equal(got, plain_insert(np.asarray(rows), np.asarray(new), at, count))


def test_one_program_inserts_any_number(rng, at):
    rows = jnp.asarray(rng.integers(0, 99, (ROWS, WINDOW)), jnp.int32)
    new = jnp.asarray(rng.integers(100, 199, (ROWS, PLACES)), jnp.int32)
    counts = jnp.arange(PLACES + 1)
    mapped = jax.jit(lambda n: jax.lax.map(lambda c: soft_tokens.insert(rows, new, at=at, count=c), n))(counts)
    batched = jax.vmap(lambda c: soft_tokens.insert(rows, new, at=at, count=c))(counts)
    for count in range(PLACES + 1):
        expected = plain_insert(np.asarray(rows), np.asarray(new), at, count)
        np.testing.assert_array_equal(mapped[count], expected)
        np.testing.assert_array_equal(batched[count], expected)


def test_gradients_reach_what_stays_in_the_window_and_nothing_else(rng, at):
    rows = jnp.asarray(rng.normal(size=(ROWS, WINDOW, 2)), jnp.float32)
    new = jnp.asarray(rng.normal(size=(ROWS, PLACES, 2)), jnp.float32)
    weights = rng.normal(size=(ROWS, WINDOW, 2)).astype(np.float32)

    def weighted(rows, new):
        return jnp.sum(weights * soft_tokens.insert(rows, new, at=at, count=2))

    expected = np.zeros((ROWS, WINDOW, 2), np.float32), np.zeros((ROWS, PLACES, 2), np.float32)
    ids = np.tile(np.arange(WINDOW), (ROWS, 1))
    for row, places in enumerate(plain_insert(ids, np.full((ROWS, 2), [-1, -2]), at, 2)):
        for place, source in enumerate(places):
            side, index = (expected[0], source) if source >= 0 else (expected[1], -1 - source)
            side[row, index] += weights[row, place]
    got = jax.grad(weighted, argnums=(0, 1))(rows, new)
    for gradient, plain in zip(got, expected, strict=True):
        np.testing.assert_array_equal(gradient, plain)


def test_a_traced_count_of_more_than_there_are_gives_nan(at):
    rows, new = jnp.zeros((ROWS, WINDOW, 1)), jnp.ones((ROWS, 2, 1))
    got = jax.jit(lambda c: soft_tokens.insert(rows, new, at=at, count=c))(3)
    np.testing.assert_array_equal(np.isnan(got).sum((1, 2)), [1, 1, 1, 0, 0])


@pytest.mark.parametrize("count", range(PLACES + 1))
def test_tokens_targets_and_marks_move_together(rng, at, count):
    sequence = rng.integers(0, 99, (ROWS, WINDOW + 1))
    mask = rng.random((ROWS, WINDOW)) < 0.7
    tokens, targets = (jnp.asarray(part, jnp.int32) for part in (sequence[:, :-1], sequence[:, 1:]))
    moved = [soft_tokens.shifted(part, at=at, count=count, fill=-1) for part in (tokens, targets)]
    scored = np.asarray(soft_tokens.shifted_mask(jnp.asarray(mask), at=at, count=count))
    gap = np.full((ROWS, count), -1)
    np.testing.assert_array_equal(moved[0], plain_insert(np.asarray(tokens), gap, at, count))
    np.testing.assert_array_equal(moved[1], plain_insert(np.asarray(targets), gap, at, count))
    np.testing.assert_array_equal(scored, plain_scored(mask, at, count))
    following = np.concatenate([moved[0][:, 1:], moved[1][:, -1:]], axis=1)
    np.testing.assert_array_equal(np.asarray(moved[1])[scored], following[scored])


def test_nothing_inserted_changes_nothing(rng, at):
    mask = jnp.asarray(rng.random((ROWS, WINDOW)) < 0.5)
    embeddings = jnp.asarray(rng.normal(size=(ROWS, WINDOW, 2)), jnp.float32)
    soft = jnp.ones((ROWS, PLACES, 2))
    np.testing.assert_array_equal(soft_tokens.shifted_mask(mask, at=at, count=0), mask)
    np.testing.assert_array_equal(soft_tokens.shifted(mask, at=at, count=0, fill=True), mask)
    np.testing.assert_array_equal(soft_tokens.insert(embeddings, soft, at=at, count=0), embeddings)
    assert soft_tokens.fits(mask, at=at, count=0).all()


@pytest.mark.parametrize("count", range(PLACES + 1))
def test_a_prompt_fits_while_no_scored_target_is_lost(rng, at, count):
    mask = rng.random((ROWS, WINDOW)) < 0.3
    expected = plain_scored(mask, at, count).sum(1) == mask.sum(1)
    np.testing.assert_array_equal(soft_tokens.fits(jnp.asarray(mask), at=at, count=count), expected)


@pytest.fixture(scope="module")
def trial(tiny_world):
    draw = partial(world.batch_at, tiny_world, "unsafe", step=0, batch_size=4)
    return jax.jit(lambda key: draw(key=key))(jax.random.key(3))


@pytest.fixture(scope="module")
def last(trial):
    """Index of the end-of-text token: BOS, four tasks, SOT and the text stand before it."""
    return trial.prompt.length + 6


def test_the_prompts_of_a_world_fit_as_long_as_their_answer_does(tiny_world, trial, last):
    eot = tiny_world.special["eot"]
    assert (np.take_along_axis(np.asarray(trial.complied.tokens), np.asarray(last)[:, None], 1) == eot).all()
    window = trial.complied.tokens.shape[1]
    end = [np.flatnonzero(row)[-1] for row in np.asarray(trial.complied.mask)]
    for count in (0, 1, 8, 12):
        expected = [place + count < window for place in end]
        np.testing.assert_array_equal(soft_tokens.fits(trial.complied.mask, at=last, count=count), expected)


def lively(params):
    """Matrices ten times as large: as initialised, a prompt moves the answer's likelihood by float32's rounding."""
    return tree.label(params, lambda path, leaf: leaf if "norm" in path else 10 * leaf)


@pytest.fixture(scope="module")
def params(tiny_gpt):
    return lively(tiny_gpt)


@pytest.fixture(scope="module")
def embeddings(tiny_config, params, trial):
    return gpt.embed(params, trial.complied.tokens)


@pytest.fixture(scope="module")
def radius(params):
    return jnp.mean(jnp.linalg.norm(params["embed"], axis=1))


def stations(*given, record, **options):
    """The attack after each of these numbers of steps, ``soft [c, b, n, d]``, with the loss of the longest."""
    every = [soft_tokens.optimise(*given, taken=taken, **options) for taken in record]
    return every[int(np.argmax(record))].replace(soft=jnp.stack([found.soft for found in every]))


@pytest.fixture(scope="module")
def run(tiny_config, embeddings, trial, last, radius):
    """The attack on the tiny GPT as one compiled program of (parameters, count, key)."""

    def attack(params, count, key):
        return stations(
            lambda inputs: gpt.apply(params, inputs, config=tiny_config).logits, embeddings,
            targets=trial.complied.targets, mask=trial.complied.mask, at=last, count=count, max_count=PLACES,
            radius=radius, steps=STEPS, record=(STEPS, 0, 2), key=key,
        )  # fmt: skip

    return jax.jit(attack)


@pytest.fixture(scope="module")
def found(run, params):
    return run(params, jnp.int32(3), jax.random.key(0))


@pytest.fixture(scope="module")
def plain_loss(tiny_config, params, embeddings, trial, last):
    """Mean NLL per prompt of the attacked answer, laid out by lists: ``(soft, count) -> [b]``."""
    forward = jax.jit(lambda inputs: gpt.apply(params, inputs, config=tiny_config).logits)

    def nll(soft, count):
        window = trial.complied.tokens.shape[1]
        rows = []
        for row, i in enumerate(np.asarray(last)):
            rows.append(jnp.concatenate([embeddings[row, :i], soft[row, :count], embeddings[row, i:]])[:window])
        logprobs = jax.nn.log_softmax(forward(jnp.stack(rows)))
        values = []
        for row in range(len(rows)):
            places = np.flatnonzero(trial.complied.mask[row])
            places = places[places + count < window]
            values.append(-logprobs[row, places + count, trial.complied.targets[row, places]].mean())
        return jnp.stack(values)

    return nll


def test_the_attack_makes_compliance_likelier(found, plain_loss):
    curve = np.asarray(found.loss)
    assert curve.shape == (STEPS,)
    assert (np.diff(curve) < 0).all()
    np.testing.assert_allclose(curve[0], plain_loss(found.soft[1], 3).mean(), rtol=RTOL)
    np.testing.assert_allclose(curve[2], plain_loss(found.soft[2], 3).mean(), rtol=RTOL)
    assert (plain_loss(found.soft[0], 3) < plain_loss(found.soft[1], 3)).all()


def test_soft_tokens_stay_in_the_ball_and_reach_its_edge(found, radius):
    norms = np.linalg.norm(np.asarray(found.soft, np.float64), axis=-1)
    assert (norms <= radius * (1 + NORM_RTOL)).all()
    # Steps that add up to the diameter get there.
    np.testing.assert_allclose(norms[0, :, :3].max(), radius, rtol=NORM_RTOL)


def test_soft_tokens_beyond_the_count_stay_untouched(found, run, params):
    for kept in found.soft:
        np.testing.assert_array_equal(kept[:, 3:], found.soft[1, :, 3:])
    assert (found.soft[0] != found.soft[1])[:, :3].all()
    # The starting point is the same for every count.
    np.testing.assert_array_equal(run(params, jnp.int32(1), jax.random.key(0)).soft[1], found.soft[1])


def test_soft_tokens_beyond_the_count_never_reach_the_model(tiny_config, params, embeddings, last, found):
    soft = found.soft[0]
    other = soft.at[:, 3:].set(1e3)
    both = [soft_tokens.insert(embeddings, given, at=last, count=3) for given in (soft, other)]
    logits = [gpt.apply(params, given, config=tiny_config).logits for given in both]
    np.testing.assert_array_equal(*logits)


def test_an_attack_without_tokens_is_the_model_alone(run, tiny_config, params, trial):
    nothing = run(params, jnp.int32(0), jax.random.key(0))
    np.testing.assert_array_equal(nothing.soft, np.broadcast_to(nothing.soft[1], nothing.soft.shape))
    logits = gpt.apply(params, trial.complied.tokens, config=tiny_config).logits
    logprobs = losses.token_logprobs(logits, trial.complied.targets)
    nll = -losses.sequence_logprobs(logprobs, trial.complied.mask, reduction="mean").mean()
    np.testing.assert_allclose(nothing.loss, np.full(STEPS, nll), rtol=RTOL)


def test_two_steps_match_numpy_given_the_gradients(found, plain_loss, radius):
    edge = float(radius)
    soft = np.asarray(found.soft[1], np.float64)
    gradient_of = jax.grad(lambda soft: plain_loss(soft, 3).sum())
    for _ in range(2):
        gradient = np.asarray(gradient_of(jnp.asarray(soft, jnp.float32)), np.float64)
        for row in range(len(soft)):
            for token in range(3):
                g = gradient[row, token]
                moved = soft[row, token] - 2 * edge / STEPS * g / np.sqrt(g @ g)
                soft[row, token] = moved * min(1.0, edge / np.sqrt(moved @ moved))
    np.testing.assert_allclose(found.soft[2], soft, rtol=RTOL, atol=ATOL)


def test_one_program_attacks_every_seed_with_every_count(run, tiny_config, params):
    models = [params, lively(gpt.init(tiny_config, key=jax.random.key(9)))]
    keys, counts = jax.random.split(jax.random.key(2)), [0, 1, 4]

    def sweep(params, key):
        return jax.lax.map(lambda count: run(params, count, key), jnp.asarray(counts, jnp.int32))

    found = jax.jit(jax.vmap(sweep))(tree.stack(models), keys)
    for seed, model in enumerate(models):
        for i, count in enumerate(counts):
            alone = run(model, jnp.int32(count), keys[seed])
            np.testing.assert_allclose(found.soft[seed, i], alone.soft, rtol=RTOL, atol=ATOL)
            np.testing.assert_allclose(found.loss[seed, i], alone.loss, rtol=RTOL)


def total(weights, scale=1.0):
    """A causal linear model: logits are those of the sum of all embeddings so far."""
    return lambda embeddings: scale * (jnp.cumsum(embeddings, axis=1) @ weights)


def eager_total(weights, scale, embeddings, **arguments):
    return stations(total(weights, scale), embeddings, **arguments)


# One program, where eager steps would compile one for every operation.
compiled_total = jax.jit(eager_total, static_argnames=("max_count", "steps", "record"))


def attack_total(weights, *, batch=2, mask=None, scale=1.0, run=compiled_total, **changed):
    mask = jnp.ones((batch, 4), bool).at[:, :2].set(False) if mask is None else mask
    arguments = {
        "targets": jnp.zeros((batch, 4), jnp.int32), "mask": mask, "at": jnp.ones(batch, jnp.int32), "count": 1,
        "max_count": 2, "radius": 0.5, "steps": 4, "record": (0, 1, 4), "key": jax.random.key(0),
    }  # fmt: skip
    zeros = changed.pop("embeddings", jnp.zeros((batch, 4, weights.shape[0])))
    return run(weights, scale, zeros, **(arguments | changed))


WEIGHTS = jnp.asarray([[3.0, 0.0], [0.0, 4.0]])


def test_two_tokens_of_a_linear_model_have_a_closed_form():
    """With two words the gradient always points along the difference of their weights: the edge is reached there."""
    direction = np.asarray([3.0, -4.0]) / 5
    found = attack_total(WEIGHTS)
    np.testing.assert_allclose(found.soft[1, :, 0], found.soft[0, :, 0] + 0.25 * direction[None], rtol=RTOL)
    # The starting point's share across the direction shrinks by every projection but is still there.
    np.testing.assert_allclose(found.soft[2, :, 0], np.tile(0.5 * direction, (2, 1)), atol=0.02)
    centred = attack_total(WEIGHTS, steps=60, record=(60,)).soft[0, :, 0]
    np.testing.assert_allclose(centred @ direction, 0.5, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1.0])
def test_a_step_has_the_same_length_however_flat_the_loss(scale):
    """Squares of a saturated model's gradients underflow in float32."""
    soft = attack_total(WEIGHTS, scale=scale).soft
    np.testing.assert_allclose(jnp.linalg.norm(soft[1, :, 0] - soft[0, :, 0], axis=-1), 0.25, rtol=RTOL)


def test_a_prompt_whose_answer_is_pushed_out_is_left_alone_and_not_averaged():
    mask = jnp.asarray([[False, False, True, False], [False, False, False, True]])
    found, alone = attack_total(WEIGHTS, mask=mask), attack_total(WEIGHTS, mask=mask.at[1].set(False))
    np.testing.assert_array_equal(found.soft[2, 1], found.soft[0, 1])
    np.testing.assert_array_equal(found.loss, alone.loss)
    assert np.isfinite(found.loss).all() and (found.loss > 0).all()
    assert np.isnan(attack_total(WEIGHTS, mask=jnp.zeros((2, 4), bool)).loss).all()


def test_prompts_do_not_influence_each_other():
    embeddings = jax.random.normal(jax.random.key(1), (2, 4, 3))
    weights = jax.random.normal(jax.random.key(2), (3, 5))
    found = attack_total(weights, embeddings=embeddings)
    other = attack_total(weights, embeddings=embeddings.at[1].multiply(-2.0))
    np.testing.assert_array_equal(found.soft[:, 0], other.soft[:, 0])
    assert (found.soft[2, 1, 0] != other.soft[2, 1, 0]).any()


def test_steps_that_are_not_made_have_no_loss():
    found = attack_total(WEIGHTS, record=(2,))
    assert np.isfinite(found.loss[:2]).all() and np.isnan(found.loss[2:]).all()


def test_a_small_ball_holds_the_starting_point_too():
    soft = np.asarray(attack_total(WEIGHTS, batch=64, radius=1e-3).soft)
    assert (np.linalg.norm(soft, axis=-1) <= 1e-3 * (1 + NORM_RTOL)).all()
    # Projecting again what lies on the edge would move some of these by a rounding.
    np.testing.assert_array_equal(soft[2, :, 1], soft[0, :, 1])
    np.testing.assert_array_equal(attack_total(WEIGHTS, radius=0.0).soft, 0)


def test_soft_tokens_of_a_bfloat16_model_are_float32():
    embeddings = jnp.zeros((2, 4, 2), jnp.bfloat16)
    found = attack_total(WEIGHTS.astype(jnp.bfloat16), embeddings=embeddings)
    assert soft_tokens.insert(embeddings, found.soft[0], at=jnp.ones(2, jnp.int32), count=1).dtype == jnp.bfloat16
    assert found.soft.dtype == found.loss.dtype == jnp.float32
    assert found.loss[-1] < found.loss[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_count": 0, "count": 0}, "max_count: got 0, expected at least 1"),
        ({"steps": 0, "record": (0,)}, "steps: got 0, expected at least 1"),
        ({"count": 3}, "count: got 3, expected from 0 to 2"),
        ({"count": -1}, "count: got -1, expected from 0 to 2"),
        ({"record": (0, 5)}, "taken: got 5, expected from 0 to 4, the steps of the attack"),
        ({"record": (-1,)}, "taken: got -1, expected from 0 to 4"),
        ({"radius": -0.5}, "radius: got -0.5, expected at least 0"),
        ({"radius": jnp.nan}, "radius: got nan, expected at least 0"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        attack_total(WEIGHTS, run=eager_total, **changed)


def test_bad_counts_are_named():
    rows, at = jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="count: got 3, expected from 0 to 2, the soft tokens there are"):
        soft_tokens.insert(rows, jnp.zeros((1, 2)), at=at, count=jnp.int32(3))
    for shift in (soft_tokens.shifted_mask, soft_tokens.fits, partial(soft_tokens.shifted, fill=0)):
        with pytest.raises(ValueError, match="count: got -1, expected at least 0"):
            shift(rows.astype(bool), at=at, count=-1)
