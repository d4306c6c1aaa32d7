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
# One program for every count, where eager calls would compile one for every operation.
insert, shifted_mask, fits = (jax.jit(f) for f in (soft_tokens.insert, soft_tokens.shifted_mask, soft_tokens.fits))
shifted = jax.jit(soft_tokens.shifted, static_argnames="fill")


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
    return np.asarray([0, 1, 4, 7, 8], np.int32)


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
@pytest.mark.parametrize("count", range(PLACES + 1))
def test_insertion_matches_lists(rng, at, count, trailing):
    rows = rng.normal(size=(ROWS, WINDOW, *trailing)).astype(np.float32)
    new = rng.normal(size=(ROWS, PLACES, *trailing)).astype(np.float32)
    got = insert(rows, new, at=at, count=count)
    np.testing.assert_array_equal(got, plain_insert(rows, new, at, count))


def test_one_program_inserts_any_number(rng, at):
    rows = rng.integers(0, 99, (ROWS, WINDOW), np.int32)
    new = rng.integers(100, 199, (ROWS, PLACES), np.int32)

    @jax.jit
    def every(rows, new, at, counts):
        one = partial(soft_tokens.insert, rows, new, at=at)
        return jax.lax.map(lambda c: one(count=c), counts), jax.vmap(lambda c: one(count=c))(counts)

    mapped, batched = jax.device_get(every(rows, new, at, np.arange(PLACES + 1)))
    for count in range(PLACES + 1):
        expected = plain_insert(rows, new, at, count)
        np.testing.assert_array_equal(mapped[count], expected)
        np.testing.assert_array_equal(batched[count], expected)


def test_gradients_reach_what_stays_in_the_window_and_nothing_else(rng, at):
    rows = rng.normal(size=(ROWS, WINDOW, 2)).astype(np.float32)
    new = rng.normal(size=(ROWS, PLACES, 2)).astype(np.float32)
    weights = rng.normal(size=(ROWS, WINDOW, 2)).astype(np.float32)

    def weighted(rows, new):
        return jnp.sum(weights * insert(rows, new, at=at, count=2))

    expected = np.zeros((ROWS, WINDOW, 2), np.float32), np.zeros((ROWS, PLACES, 2), np.float32)
    ids = np.tile(np.arange(WINDOW), (ROWS, 1))
    for row, places in enumerate(plain_insert(ids, np.full((ROWS, 2), [-1, -2]), at, 2)):
        for place, source in enumerate(places):
            side, index = (expected[0], source) if source >= 0 else (expected[1], -1 - source)
            side[row, index] += weights[row, place]
    got = jax.jit(jax.grad(weighted, argnums=(0, 1)))(rows, new)
    for gradient, plain in zip(got, expected, strict=True):
        np.testing.assert_array_equal(gradient, plain)


def test_a_traced_count_of_more_than_there_are_gives_nan(at):
    rows, new = np.zeros((ROWS, WINDOW, 1), np.float32), np.ones((ROWS, 2, 1), np.float32)
    got = insert(rows, new, at=at, count=3)
    np.testing.assert_array_equal(np.isnan(got).sum((1, 2)), [1, 1, 1, 0, 0])


@pytest.mark.parametrize("count", range(PLACES + 1))
def test_tokens_targets_and_marks_move_together(rng, at, count):
    sequence = rng.integers(0, 99, (ROWS, WINDOW + 1))
    mask = rng.random((ROWS, WINDOW)) < 0.7
    tokens, targets = (part.astype(np.int32) for part in (sequence[:, :-1], sequence[:, 1:]))
    moved = [np.asarray(shifted(part, at=at, count=count, fill=-1)) for part in (tokens, targets)]
    scored = np.asarray(shifted_mask(mask, at=at, count=count))
    gap = np.full((ROWS, count), -1)
    np.testing.assert_array_equal(moved[0], plain_insert(tokens, gap, at, count))
    np.testing.assert_array_equal(moved[1], plain_insert(targets, gap, at, count))
    np.testing.assert_array_equal(scored, plain_scored(mask, at, count))
    following = np.concatenate([moved[0][:, 1:], moved[1][:, -1:]], axis=1)
    np.testing.assert_array_equal(moved[1][scored], following[scored])


def test_nothing_inserted_changes_nothing(rng, at):
    mask = rng.random((ROWS, WINDOW)) < 0.5
    embeddings = rng.normal(size=(ROWS, WINDOW, 2)).astype(np.float32)
    soft = np.ones((ROWS, PLACES, 2), np.float32)
    np.testing.assert_array_equal(shifted_mask(mask, at=at, count=0), mask)
    np.testing.assert_array_equal(shifted(mask, at=at, count=0, fill=True), mask)
    np.testing.assert_array_equal(insert(embeddings, soft, at=at, count=0), embeddings)
    assert np.asarray(fits(mask, at=at, count=0)).all()


@pytest.mark.parametrize("count", range(PLACES + 1))
def test_a_prompt_fits_while_no_scored_target_is_lost(rng, at, count):
    mask = rng.random((ROWS, WINDOW)) < 0.3
    expected = plain_scored(mask, at, count).sum(1) == mask.sum(1)
    np.testing.assert_array_equal(fits(mask, at=at, count=count), expected)


@pytest.fixture(scope="module")
def trial(tiny_world):
    draw = partial(world.batch_at, tiny_world, "unsafe", step=0, batch_size=4)
    return jax.device_get(jax.jit(lambda key: draw(key=key))(jax.random.key(3)))


@pytest.fixture(scope="module")
def last(trial):
    """Index of the end-of-text token: BOS, four tasks, SOT and the text stand before it."""
    return trial.prompt.length + 6


def test_the_prompts_of_a_world_fit_as_long_as_their_answer_does(tiny_world, trial, last):
    eot = tiny_world.special["eot"]
    assert (np.take_along_axis(trial.complied.tokens, last[:, None], 1) == eot).all()
    window = trial.complied.tokens.shape[1]
    end = [np.flatnonzero(row)[-1] for row in trial.complied.mask]
    for count in (0, 1, 8, 12):
        expected = [place + count < window for place in end]
        np.testing.assert_array_equal(fits(trial.complied.mask, at=last, count=count), expected)


def lively(params):
    """Matrices ten times as large: as initialised, a prompt moves the answer's likelihood by float32's rounding."""
    return tree.label(params, lambda path, leaf: np.asarray(leaf) if "norm" in path else 10 * np.asarray(leaf))


@pytest.fixture(scope="module")
def params(tiny_gpt):
    return lively(tiny_gpt)


@pytest.fixture(scope="module")
def embeddings(tiny_config, params, trial):
    return jax.device_get(jax.jit(gpt.embed)(params, trial.complied.tokens))


@pytest.fixture(scope="module")
def radius(params):
    return np.mean(np.linalg.norm(params["embed"], axis=1))


def stations(*given, record, **options):
    """The attack after each of these numbers of steps, ``soft [c, b, n, d]``, with the loss of the longest."""
    found = jax.lax.map(lambda taken: soft_tokens.optimise(*given, taken=taken, **options), jnp.asarray(record))
    return found.replace(loss=found.loss[jnp.argmax(jnp.asarray(record))])


@pytest.fixture(scope="module")
def forward(tiny_config):
    """The tiny GPT as one program: parameters and inputs to logits."""
    return jax.jit(lambda params, inputs: gpt.apply(params, inputs, config=tiny_config).logits)


@pytest.fixture(scope="module")
def run(forward, embeddings, trial, last, radius):
    """The attack on the tiny GPT as one compiled program of (parameters, count, key)."""
    embeddings, targets, mask, at, radius = (
        jnp.asarray(array) for array in (embeddings, trial.complied.targets, trial.complied.mask, last, radius)
    )

    def attack(params, count, key):
        return stations(
            partial(forward, params), embeddings, targets=targets, mask=mask, at=at, count=count, max_count=PLACES,
            radius=radius, steps=STEPS, record=(STEPS, 0, 2), key=key,
        )  # fmt: skip

    return jax.jit(attack)


@pytest.fixture(scope="module")
def found(run, params):
    return jax.device_get(run(params, 3, jax.random.key(0)))


@pytest.fixture(scope="module")
def plain_loss(forward, params, embeddings, trial, last):
    """Mean NLL per prompt of the attacked answer, laid out by lists, and its gradient: ``soft -> [b], [b, n, d]``."""
    count = 3

    def nll(soft):
        window = trial.complied.tokens.shape[1]
        rows = []
        for row, i in enumerate(last):
            rows.append(jnp.concatenate([embeddings[row, :i], soft[row, :count], embeddings[row, i:]])[:window])
        logprobs = jax.nn.log_softmax(forward(params, jnp.stack(rows)))
        values = []
        for row in range(len(rows)):
            places = np.flatnonzero(trial.complied.mask[row])
            places = places[places + count < window]
            values.append(-logprobs[row, places + count, trial.complied.targets[row, places]].mean())
        return jnp.sum(jnp.stack(values)), jnp.stack(values)

    with_gradient = jax.jit(jax.value_and_grad(nll, has_aux=True))

    def loss(soft):
        (_, values), gradient = jax.device_get(with_gradient(soft))
        return values, gradient

    return loss


def test_the_attack_makes_compliance_likelier(found, plain_loss):
    curve = found.loss
    assert curve.shape == (STEPS,)
    assert (np.diff(curve) < 0).all()
    end, start, between = (plain_loss(soft)[0] for soft in found.soft)
    np.testing.assert_allclose(curve[0], start.mean(), rtol=RTOL)
    np.testing.assert_allclose(curve[2], between.mean(), rtol=RTOL)
    assert (end < start).all()


def test_soft_tokens_stay_in_the_ball_and_reach_its_edge(found, radius):
    norms = np.linalg.norm(found.soft.astype(np.float64), axis=-1)
    assert (norms <= radius * (1 + NORM_RTOL)).all()
    # Steps that add up to the diameter get there.
    np.testing.assert_allclose(norms[0, :, :3].max(), radius, rtol=NORM_RTOL)


def test_soft_tokens_beyond_the_count_stay_untouched(found, run, params):
    for kept in found.soft:
        np.testing.assert_array_equal(kept[:, 3:], found.soft[1, :, 3:])
    assert (found.soft[0] != found.soft[1])[:, :3].all()
    # The starting point is the same for every count.
    np.testing.assert_array_equal(np.asarray(run(params, 1, jax.random.key(0)).soft)[1], found.soft[1])


def test_soft_tokens_beyond_the_count_never_reach_the_model(forward, params, embeddings, last, found):
    other = found.soft[0].copy()
    other[:, 3:] = 1e3
    both = [insert(embeddings, given, at=last, count=3) for given in (found.soft[0], other)]
    logits = [forward(params, given) for given in both]
    np.testing.assert_array_equal(*logits)


def test_an_attack_without_tokens_is_the_model_alone(run, forward, params, trial):
    nothing = jax.device_get(run(params, 0, jax.random.key(0)))
    np.testing.assert_array_equal(nothing.soft, np.broadcast_to(nothing.soft[1], nothing.soft.shape))

    @jax.jit
    def nll(batch):
        logprobs = losses.token_logprobs(forward(params, batch.tokens), batch.targets)
        return -losses.sequence_logprobs(logprobs, batch.mask, reduction="mean").mean()

    np.testing.assert_allclose(nothing.loss, np.full(STEPS, nll(trial.complied)), rtol=RTOL)


def test_two_steps_match_numpy_given_the_gradients(found, plain_loss, radius):
    edge = float(radius)
    soft = found.soft[1].astype(np.float64)
    for _ in range(2):
        gradient = plain_loss(soft.astype(np.float32))[1].astype(np.float64)
        for row in range(len(soft)):
            for token in range(3):
                g = gradient[row, token]
                moved = soft[row, token] - 2 * edge / STEPS * g / np.sqrt(g @ g)
                soft[row, token] = moved * min(1.0, edge / np.sqrt(moved @ moved))
    np.testing.assert_allclose(found.soft[2], soft, rtol=RTOL, atol=ATOL)


def test_one_program_attacks_every_seed_with_every_count(run, tiny_config, params):
    models = [params, lively(jax.jit(partial(gpt.init, tiny_config))(key=jax.random.key(9)))]
    keys, counts = [jax.random.key(seed) for seed in (2, 3)], [0, 1, 4]

    def sweep(params, key):
        return jax.lax.map(lambda count: run(params, count, key), jnp.asarray(counts, jnp.int32))

    both = jax.tree.map(lambda *leaves: np.stack(leaves), *models)
    found = jax.device_get(jax.jit(jax.vmap(sweep))(both, jnp.stack(keys)))
    for seed, model in enumerate(models):
        for i, count in enumerate(counts):
            alone = run(model, count, keys[seed])
            np.testing.assert_allclose(found.soft[seed, i], alone.soft, rtol=RTOL, atol=ATOL)
            np.testing.assert_allclose(found.loss[seed, i], alone.loss, rtol=RTOL)


def total(weights, scale=1.0):
    """A causal linear model: logits are those of the sum of all embeddings so far."""
    return lambda embeddings: scale * (jnp.cumsum(embeddings, axis=1) @ weights)


def recorded(weights, scale, embeddings, **arguments):
    return stations(total(weights, scale), embeddings, **arguments)


def eager_total(weights, scale, embeddings, **arguments):
    return soft_tokens.optimise(total(weights, scale), embeddings, **arguments)


# One program for every record, where eager steps would compile one for every operation.
compiled_record = jax.jit(recorded, static_argnames=("max_count", "steps"))
compiled_total = jax.jit(eager_total, static_argnames=("max_count", "steps", "taken"))


def attack_total(weights, *, batch=2, mask=None, scale=1.0, run=compiled_record, **changed):
    mask = np.tile([False, False, True, True], (batch, 1)) if mask is None else mask
    arguments = {
        "targets": np.zeros((batch, 4), np.int32), "mask": mask, "at": np.ones(batch, np.int32), "count": 1,
        "max_count": 2, "radius": 0.5, "steps": 4, "key": jax.random.key(0),
    }  # fmt: skip
    embeddings = changed.pop("embeddings", np.zeros((batch, 4, weights.shape[0]), np.float32))
    arguments |= {"record": (0, 1, 4)} if run is compiled_record else {"taken": 4}
    given = embeddings, arguments | changed
    given = jax.tree.map(lambda value: jnp.asarray(value) if isinstance(value, np.ndarray) else value, given)
    return jax.device_get(run(weights, scale, given[0], **given[1]))


WEIGHTS = np.asarray([[3.0, 0.0], [0.0, 4.0]], np.float32)


def test_two_tokens_of_a_linear_model_have_a_closed_form():
    """With two words the gradient always points along the difference of their weights: the edge is reached there."""
    direction = np.asarray([3.0, -4.0]) / 5
    found = attack_total(WEIGHTS)
    np.testing.assert_allclose(found.soft[1, :, 0], found.soft[0, :, 0] + 0.25 * direction[None], rtol=RTOL)
    # The starting point's share across the direction shrinks by every projection but is still there.
    np.testing.assert_allclose(found.soft[2, :, 0], np.tile(0.5 * direction, (2, 1)), atol=0.02)
    centred = attack_total(WEIGHTS, run=compiled_total, steps=60, taken=60).soft[:, 0]
    np.testing.assert_allclose(centred @ direction, 0.5, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1.0])
def test_a_step_has_the_same_length_however_flat_the_loss(scale):
    """Squares of a saturated model's gradients underflow in float32."""
    soft = attack_total(WEIGHTS, scale=scale).soft
    np.testing.assert_allclose(np.linalg.norm(soft[1, :, 0] - soft[0, :, 0], axis=-1), 0.25, rtol=RTOL)


def test_a_prompt_whose_answer_is_pushed_out_is_left_alone_and_not_averaged():
    mask = np.asarray([[False, False, True, False], [False, False, False, True]])
    found, alone = attack_total(WEIGHTS, mask=mask), attack_total(WEIGHTS, mask=mask & [[True], [False]])
    np.testing.assert_array_equal(found.soft[2, 1], found.soft[0, 1])
    np.testing.assert_array_equal(found.loss, alone.loss)
    assert np.isfinite(found.loss).all() and (found.loss > 0).all()
    assert np.isnan(attack_total(WEIGHTS, mask=np.zeros((2, 4), bool)).loss).all()


def test_prompts_do_not_influence_each_other():
    rng = np.random.default_rng(1)
    embeddings, weights = (rng.normal(size=size).astype(np.float32) for size in ((2, 4, 3), (3, 5)))
    found = attack_total(weights, embeddings=embeddings)
    other = attack_total(weights, embeddings=embeddings * np.asarray([1, -2], np.float32)[:, None, None])
    np.testing.assert_array_equal(found.soft[:, 0], other.soft[:, 0])
    assert (found.soft[2, 1, 0] != other.soft[2, 1, 0]).any()


def test_steps_that_are_not_made_have_no_loss():
    found = attack_total(WEIGHTS, record=(0, 1, 2))
    assert np.isfinite(found.loss[:2]).all() and np.isnan(found.loss[2:]).all()


def test_a_small_ball_holds_the_starting_point_too():
    soft = attack_total(WEIGHTS, batch=64, radius=1e-3).soft
    assert (np.linalg.norm(soft, axis=-1) <= 1e-3 * (1 + NORM_RTOL)).all()
    # Projecting again what lies on the edge would move some of these by a rounding.
    np.testing.assert_array_equal(soft[2, :, 1], soft[0, :, 1])
    np.testing.assert_array_equal(attack_total(WEIGHTS, radius=0.0).soft, 0)


def test_soft_tokens_of_a_bfloat16_model_are_float32():
    embeddings = np.zeros((2, 4, 2), jnp.bfloat16)
    found = attack_total(WEIGHTS.astype(jnp.bfloat16), embeddings=embeddings)
    assert insert(embeddings, found.soft[0], at=np.ones(2, np.int32), count=1).dtype == jnp.bfloat16
    assert found.soft.dtype == found.loss.dtype == jnp.float32
    assert found.loss[-1] < found.loss[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_count": 0, "count": 0}, "max_count: got 0, expected at least 1"),
        ({"steps": 0, "taken": 0}, "steps: got 0, expected at least 1"),
        ({"count": 3}, "count: got 3, expected from 0 to 2"),
        ({"count": -1}, "count: got -1, expected from 0 to 2"),
        ({"taken": 5}, "taken: got 5, expected from 0 to 4, the steps of the attack"),
        ({"taken": -1}, "taken: got -1, expected from 0 to 4"),
        ({"radius": -0.5}, "radius: got -0.5, expected at least 0"),
        ({"radius": jnp.nan}, "radius: got nan, expected at least 0"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        attack_total(WEIGHTS, run=eager_total, **changed)


def test_bad_counts_are_named():
    rows, mask, at = (jnp.asarray(np.zeros(*given)) for given in (((1, 4), np.float32), ((1, 4), bool), (1, np.int32)))
    with pytest.raises(ValueError, match="count: got 5, expected from 0 to 4, the soft tokens there are"):
        soft_tokens.insert(rows, rows, at=at, count=jnp.int32(5))
    for count in (0, 4):
        assert jax.eval_shape(partial(soft_tokens.insert, count=count), rows, rows, at=at).shape == (1, 4)
    for shift in (soft_tokens.shifted_mask, soft_tokens.fits, partial(soft_tokens.shifted, fill=0)):
        with pytest.raises(ValueError, match="count: got -1, expected at least 0"):
            shift(mask, at=at, count=-1)
        jax.eval_shape(partial(shift, count=0), mask, at=at)
