"""Sensitivities against Jacobians written down in NumPy float64, against whole Jacobians of a GPT, and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, tree
from jaxsafety.linalg import sensitivity
from jaxsafety.models import gpt

# float32 derivatives against float64, through a few layers.
RTOL = 2e-5
# The value errs by the squared residual over the gap; iterations to 1e-3 leave less than this.
NORM = 1e-4
# The same float32 program in another order.
SAME = 2e-5
B, T, D, V, H = 3, 5, 4, 7, 6
POSITION, PROMPT = np.array([1, 4, 3]), np.arange(T) < np.array([[1], [3], [4]])


def f32(values):
    return np.asarray(values, np.float32)


def concrete(given):
    """What public functions want where no program hides the arrays."""
    return jax.tree.map(jnp.asarray, given)


def one_program(function):
    """The function as one program, where eager calls would compile one for every operation; results in NumPy."""
    compiled = jax.jit(function)
    return lambda *args, **kwargs: jax.device_get(compiled(*args, **kwargs))


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {"mixed": rng.normal(size=(D, H)), "own": rng.normal(size=(D, H)), "out": rng.normal(size=(H, V))}


def drawn(seed=0):
    return np.random.default_rng(seed + 50).normal(size=(B, T, D)).astype(np.float32)


def causal(params, embeddings):
    """A small causal model: the mean of what came so far, and the token itself."""
    count = jnp.arange(1, embeddings.shape[1] + 1, dtype=embeddings.dtype)[None, :, None]
    hidden = (jnp.cumsum(embeddings, axis=1) / count) @ params["mixed"] + embeddings @ params["own"]
    return jnp.tanh(hidden) @ params["out"]


def plain_jacobian(params, embeddings, position, prompt):
    """Of one sample, ``[v, t, d]``, differentiated by hand."""
    so_far = embeddings[: position + 1].astype(float)
    hidden = np.tanh(so_far.mean(0) @ params["mixed"] + so_far[-1] @ params["own"])
    jacobian = np.zeros((V, T, D))
    for u in np.flatnonzero(prompt[: position + 1]):
        inner = params["mixed"] / (position + 1) + (params["own"] if u == position else 0)
        jacobian[:, u] = (inner * (1 - hidden**2) @ params["out"]).T
    return jacobian, hidden @ params["out"]


def norms(params, embeddings, position, prompt, key, **options):
    """Both measurements of the small model."""
    forward = partial(causal, params)
    places = {"position": position, "prompt": prompt}
    gradient = sensitivity.gradient_norm(forward, embeddings, **places)
    return gradient, sensitivity.jacobian_norm(forward, embeddings, **places, key=key, **options)


def case(seed=0):
    return (
        jax.tree.map(f32, weights(seed)),
        f32(drawn(seed)),
        POSITION,
        PROMPT,
        keys.root(seed),
    )


precise = one_program(partial(norms, tolerance=1e-3))
precise_lanes = one_program(jax.vmap(partial(norms, tolerance=1e-3)))


def both_norms(forward):
    """Both measurements of any model as one program."""

    def measure(embeddings, *, key, **places):
        gradient = sensitivity.gradient_norm(forward, embeddings, **places)
        return gradient, sensitivity.jacobian_norm(forward, embeddings, **places, key=key, tolerance=1e-3)

    return one_program(measure)


@pytest.mark.parametrize("seed", [0, 1])
def test_both_norms_match_numpy(seed):
    gradient, found = precise(*case(seed))
    assert found.converged.all() and found.value.shape == (B,)
    for row in range(B):
        jacobian, logits = plain_jacobian(weights(seed), drawn(seed)[row], POSITION[row], PROMPT[row])
        flat = jacobian.reshape(V, -1)
        np.testing.assert_allclose(gradient[row], np.linalg.norm(flat[logits.argmax()]), rtol=RTOL)
        np.testing.assert_allclose(found.value[row], np.linalg.svd(flat, compute_uv=False)[0], rtol=NORM)


def test_a_linear_map_in_closed_form():
    # Only the position itself is varied: the map is the matrix.
    values = f32([3.0, 2.0, 0.5, 0.1])

    def forward(embeddings):
        return embeddings * values[None, None]

    places = {"position": np.asarray([2, 0]), "prompt": np.arange(T)[None] == np.asarray([[2], [0]])}
    gradient, found = both_norms(forward)(f32(np.ones((2, T, D))), **places, key=keys.root(0))
    np.testing.assert_allclose(gradient, 3.0, rtol=RTOL)
    np.testing.assert_allclose(found.value, 3.0, rtol=NORM)


def test_what_the_position_does_not_see_has_no_effect():
    params, embeddings, position, _, key = case()
    behind = np.arange(T)[None] > np.asarray([[1], [3], [3]])
    gradient, found = precise(params, embeddings, np.asarray([1, 3, 3]), behind, key)
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(found.value, 0)
    assert found.converged.all()
    # A prompt that goes on behind the position is the same prompt.
    longer = PROMPT | (np.arange(T)[None] > position[:, None])
    np.testing.assert_allclose(precise(params, embeddings, position, longer, key)[0], precise(*case())[0], rtol=SAME)


def test_of_tied_logits_the_first_counts():
    columns = f32([[1.0, 2.0, 2.0], [0.0, 1.0, -1.0]])
    places = {"position": np.asarray([0]), "prompt": np.ones((1, 1), bool)}
    gradient_norm = one_program(partial(sensitivity.gradient_norm, lambda e: e @ columns))
    got = gradient_norm(f32([[[1.0, 0.0]]]), **places)
    # The mean of the tied gradients is (2, 0), shorter than either.
    np.testing.assert_allclose(got, np.sqrt(5), rtol=RTOL)


def test_rows_do_not_influence_each_other():
    params, embeddings, position, prompt, key = case()
    gradient, found = precise(params, embeddings, position, prompt, key)
    for row in range(B):
        one = (array[row : row + 1] for array in (embeddings, position, prompt))
        alone, single = precise(params, *one, key)
        np.testing.assert_allclose(alone[0], gradient[row], rtol=SAME)
        np.testing.assert_allclose(single.value[0], found.value[row], rtol=NORM)


def test_the_model_is_run_once_for_the_whole_batch():
    params, embeddings, position, prompt, key = concrete(case())
    seen = []

    def counted(embeddings):
        seen.append(embeddings.shape)
        return causal(params, embeddings)

    places = {"position": position, "prompt": prompt}
    jax.make_jaxpr(lambda e: sensitivity.gradient_norm(counted, e, **places))(embeddings)
    assert seen == [(B, T, D)]
    seen.clear()
    jax.make_jaxpr(lambda e: sensitivity.jacobian_norm(counted, e, **places, key=key))(embeddings)
    # Linearised once, whatever the number of samples and iterations.
    assert len(seen) == 1


def test_an_iteration_that_is_cut_short_says_so():
    full, cut = (precise(*case())[1], one_program(partial(norms, iterations=1))(*case())[1])
    assert not cut.converged.any() and (cut.iterations == 1).all()
    assert (cut.value < full.value * (1 + NORM)).all() and (cut.residual > 1e-2).all()


# The decoder


@pytest.fixture(scope="module")
def decoder(tiny_gpt, tiny_config):
    """Matrices tripled, for at initialisation attention is nearly uniform; three prompts of different lengths."""
    params = concrete(jax.tree.map(lambda leaf: np.asarray(leaf) * (3 if leaf.ndim > 1 else 1), tiny_gpt))
    tokens = jax.random.randint(keys.root(2), (3, 9), 0, tiny_config.vocab_size)
    embeddings = one_program(gpt.embed)(params, tokens)
    position = np.asarray([3, 8, 5])
    prompt = np.arange(9)[None] < position[:, None]
    forward = jax.jit(lambda inputs: gpt.apply(params, inputs, config=tiny_config).logits)
    return forward, embeddings, position, prompt


@pytest.fixture(scope="module")
def decoder_norms(decoder):
    forward, embeddings, position, prompt = decoder
    return both_norms(forward)(embeddings, position=position, prompt=prompt, key=keys.root(3))


def whole_jacobians(forward, embeddings, position, prompt):
    """One column at a time, in forward mode, sample by sample: ``[b, v, t d]``."""

    @jax.jit
    def one(row, at):
        return jax.jacfwd(lambda e: forward(e[None])[0, at])(row)

    found = [np.asarray(one(row, at), float) for row, at in zip(embeddings, position, strict=True)]
    return [np.where(p[:, None], j, 0).reshape(len(j), -1) for j, p in zip(found, prompt, strict=True)]


@pytest.mark.slow
def test_a_gpt_has_the_norms_of_its_whole_jacobian(decoder, decoder_norms):
    forward, embeddings, position, _ = decoder
    gradient, found = decoder_norms
    top = np.argmax(np.take_along_axis(np.asarray(forward(embeddings)), position[:, None, None], 1), -1)[:, 0]
    for row, jacobian in enumerate(whole_jacobians(*decoder)):
        spectrum = np.linalg.svd(jacobian, compute_uv=False)
        np.testing.assert_allclose(gradient[row], np.linalg.norm(jacobian[top[row]]), rtol=1e-4)
        np.testing.assert_allclose(found.value[row], spectrum[0], rtol=1e-3)
        assert 0 < gradient[row] < found.value[row] * (1 + NORM)
    assert found.converged.all()


def test_the_gradient_norm_of_a_gpt_is_its_steepest_slope(decoder, decoder_norms):
    forward, embeddings, position, prompt = decoder
    norm, _ = decoder_norms

    def top(embeddings):
        values = jnp.max(jnp.take_along_axis(forward(embeddings), position[:, None, None], axis=1)[:, 0], axis=-1)
        return jnp.sum(values), values

    climbed = one_program(jax.value_and_grad(top, has_aux=True))
    gradient = np.where(prompt[..., None], climbed(embeddings)[1], 0)
    step = 1e-2 * np.std(embeddings) * gradient / norm[:, None, None]
    length = np.linalg.norm(step.reshape(3, -1), axis=1)
    above, below = (climbed(place)[0][1] for place in (embeddings + step, embeddings - step))
    # Central differences of a float32 model.
    np.testing.assert_allclose((above - below) / (2 * length), norm, rtol=2e-2)


# Transformations


def test_vmapped_is_looped():
    lanes = [case(seed) for seed in range(3)]
    gradients, found = precise_lanes(*tree.stack(lanes))
    for lane, given in enumerate(lanes):
        gradient, one = precise(*given)
        np.testing.assert_allclose(gradients[lane], gradient, rtol=SAME)
        np.testing.assert_allclose(found.value[lane], one.value, rtol=NORM)


def test_a_dead_lane_is_nan_and_leaves_the_others_alone():
    given, other = case(), case(1)
    dead = (jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), given[0]), *given[1:])
    gradients, found = precise_lanes(*tree.stack([given, dead, other]))
    assert np.isnan(gradients[1]).all() and np.isnan(found.value[1]).all() and not found.converged[1].any()
    for lane, alive in ((0, given), (2, other)):
        gradient, one = precise(*alive)
        np.testing.assert_allclose(gradients[lane], gradient, rtol=SAME)
        np.testing.assert_allclose(found.value[lane], one.value, rtol=NORM)


def test_statistics_are_at_least_float32():
    params, embeddings, position, prompt, key = case()
    gradient, found = jax.eval_shape(norms, params, embeddings.astype(jnp.bfloat16), position, prompt, key)
    assert gradient.dtype == found.value.dtype == found.residual.dtype == jnp.float32


# What is undefined


def test_a_traced_sample_without_prompt_or_position_is_nan():
    params, embeddings, _, prompt, key = case()
    for position, prompt_ in (([1, -1, T], prompt), ([1, 4, 3], prompt & [[True], [False], [False]])):
        gradient, found = precise(params, embeddings, np.asarray(position), prompt_, key)
        np.testing.assert_array_equal(np.isnan(gradient), [False, True, True])
        np.testing.assert_array_equal(np.isnan(found.value), [False, True, True])
        np.testing.assert_array_equal(found.converged, [True, False, False])


@pytest.mark.parametrize("measure", ["gradient_norm", "jacobian_norm"])
def test_bad_samples_are_named(measure):
    params, embeddings, position, prompt, key = case()
    forward = partial(causal, concrete(params))
    options = {"key": key} if measure == "jacobian_norm" else {}

    def run(embeddings=embeddings, position=position, prompt=prompt):
        given, places = concrete((embeddings, {"position": position, "prompt": prompt}))
        getattr(sensitivity, measure)(forward, given, **places, **options)

    broken = embeddings.copy()
    broken[1, 0, 0] = np.inf
    with pytest.raises(ValueError, match="embeddings hold 0 prompts, expected at least 1"):
        run(embeddings[:0], position[:0], prompt[:0])
    with pytest.raises(ValueError, match="embeddings holds values that are not finite"):
        run(broken)
    for outside in (-1, T):
        with pytest.raises(ValueError, match=f"position: got {outside}, expected from 0 to {T - 1}"):
            run(position=np.where(np.arange(B) == 1, outside, position))
    with pytest.raises(ValueError, match="prompt 2 of the batch is empty"):
        run(prompt=prompt & (np.arange(B)[:, None] != 2))


@pytest.mark.parametrize("options", [{"iterations": 0}, {"tolerance": 0.0}, {"tolerance": -1.0}], ids=str)
def test_bad_iterations_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got"):
        norms(*concrete(case()), **options)
