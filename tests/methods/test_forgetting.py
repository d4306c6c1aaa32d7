"""NPO, SimNPO and gradient difference against lists of tokens in float64, and what each of them keeps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsafety import keys, losses, methods
from jaxsafety.methods import graddiff, npo, simnpo
from jaxsafety.training import objective, stepping
from jaxsafety.types import Batch, PreferenceBatch
from tests.methods.bound import bound
from tests.methods.lists import (
    MODEL,
    OTHER,
    PARAMS,
    PROMPTS,
    REFERENCE,
    REFUSALS,
    REPLIES,
    SAFE,
    STATES,
    TABLE,
    logprob,
    of_answer,
    pairs,
    traced,
    unscored,
)

# float32 sums in another order; of gradients, whose terms cancel.
RTOL, ATOL = 5e-6, 1e-6
UNSAFE = [True, False, True, False, True]
BATCH = pairs(unsafe=UNSAFE)
WEIGHTS = {"weight_forget": 0.6, "weight_retain": 0.3}
OPTIONS = {
    "npo": WEIGHTS | {"beta": 0.4},
    "simnpo": WEIGHTS | {"beta": 2.0, "gamma": 0.5},
    "graddiff": WEIGHTS | {"ascent_bound": 2.5},
}
NAMES = pytest.mark.parametrize("name", OPTIONS)
HARMFUL = [(PROMPTS[row], REPLIES[row]) for row, unsafe in enumerate(UNSAFE) if unsafe]


def loss(name, params=PARAMS, batch=BATCH, reference=REFERENCE, **options):
    return bound(name, MODEL, reference=reference, **(OPTIONS[name] | options))(params, batch)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def forgotten(name):
    """Of every harmful answer in lists, unweighted."""
    if name == "graddiff":
        return [-np.mean(np.minimum(of_answer(*one), 2.5)) for one in HARMFUL]
    if name == "npo":
        moved = np.array([logprob(*one) - logprob(*one, OTHER) for one in HARMFUL])
        return -2 / 0.4 * log_sigmoid(-0.4 * moved)
    means = np.array([logprob(*one) / len(one[1]) for one in HARMFUL])
    return -2 / 2.0 * log_sigmoid(-2.0 * means - 0.5)


def preferred(*, safe_only):
    for row, unsafe in enumerate(UNSAFE):
        if not (unsafe and safe_only):
            yield PROMPTS[row], (REFUSALS if unsafe else SAFE)[row]


def divergences():
    """Of every token of safe answers, from the reference's distribution to the policy's."""
    for prompt, answer in preferred(safe_only=True):
        for i in range(len(answer)):
            state = sum(place * token for place, token in enumerate(prompt + answer[:i], 1)) % STATES
            said = [table[state] - np.log(np.exp(table[state]).sum()) for table in (OTHER, TABLE)]
            yield np.sum(np.exp(said[0]) * (said[0] - said[1]))


@NAMES
@pytest.mark.parametrize("retain", ["nll", "kl", "none"])
def test_both_terms_match_lists(name, retain):
    forget = 0.6 * np.mean(forgotten(name))
    kept = {
        "nll": [value for one in preferred(safe_only=False) for value in of_answer(*one)],
        "kl": list(divergences()),
        "none": [0.0],
    }[retain]
    value, metrics = loss(name, retain=retain)
    np.testing.assert_allclose(value, forget + 0.3 * np.mean(kept), rtol=RTOL)
    if retain != "none":
        np.testing.assert_allclose(metrics["loss/forget"], forget, rtol=RTOL)
        np.testing.assert_allclose(metrics["loss/retain"], 0.3 * np.mean(kept), rtol=RTOL)


def test_sums_and_means_of_harmful_answers():
    moved = np.array([(logprob(*one) - logprob(*one, OTHER)) / len(one[1]) for one in HARMFUL])
    value, metrics = loss("npo", retain="none", reduction="mean")
    np.testing.assert_allclose(value, 0.6 * np.mean(-2 / 0.4 * log_sigmoid(-0.4 * moved)), rtol=RTOL)
    np.testing.assert_allclose(metrics["rewards/rejected"], 0.4 * moved.mean(), rtol=RTOL)
    value, _ = loss("graddiff", retain="none", reduction="sum", ascent_bound=np.inf)
    np.testing.assert_allclose(value, 0.6 * np.mean([logprob(*one) for one in HARMFUL]), rtol=RTOL)


def test_npo_is_ascent_at_the_reference_and_fades_far_below_it():
    slope = jax.grad(lambda margin: jnp.sum(npo.npo(margin, beta=0.5)))(jnp.asarray([-100.0, 0.0, 100.0]))
    np.testing.assert_allclose(slope, [0.0, 1.0, 2.0], atol=ATOL)
    np.testing.assert_allclose(npo.npo(jnp.zeros(1), beta=0.5), 4 * np.log(2), rtol=RTOL)
    given = {"retain": "none", "weight_forget": 1.0}
    at_reference = jax.grad(lambda params: loss("npo", params, reference=PARAMS, **given)[0])(PARAMS)
    unbounded = {"ascent_bound": np.inf, "reduction": "sum"}
    ascent = jax.grad(lambda params: loss("graddiff", params, **given, **unbounded)[0])(PARAMS)
    np.testing.assert_allclose(at_reference["table"], ascent["table"], rtol=RTOL, atol=ATOL)


def test_simnpo_is_npo_of_the_mean_against_a_reference_that_says_everything():
    means = jnp.asarray([-0.1, -3.0, -1e4])
    np.testing.assert_array_equal(simnpo.simnpo(means, beta=2.0, gamma=0.0), npo.npo(means, beta=2.0))
    assert np.isfinite(simnpo.simnpo(means, beta=4.5, gamma=0.125)).all()


def test_a_token_beyond_the_bound_is_pushed_no_further():
    run = partial(graddiff.ascent, mask=jnp.ones((1, 2), bool), bound=2.0, reduction="sum")
    slope = jax.grad(lambda logprobs: run(logprobs)[0])(jnp.asarray([[-1.0, -3.0]]))
    np.testing.assert_array_equal(slope, [[1.0, 0.0]])


def test_a_divergence_from_itself_is_nothing_and_has_no_gradient():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4)), jnp.float32).at[:, 0].set(-jnp.inf)
    said = jax.nn.log_softmax(logits, axis=-1)
    value, slope = jax.value_and_grad(lambda x: losses.divergence(x, said, jnp.ones(3, bool))[0])(logits)
    np.testing.assert_allclose(value, 0, atol=ATOL)
    np.testing.assert_allclose(slope, 0, atol=ATOL)


@NAMES
def test_kept_by_divergence_the_reference_stays_where_it_is(name):
    given = {"retain": "kl", "weight_forget": 0.0, "reference": PARAMS}
    slope = jax.grad(lambda params: loss(name, params, **given)[0])(PARAMS)["table"]
    np.testing.assert_allclose(slope, 0, atol=ATOL)


@NAMES
def test_safe_prompts_have_nothing_to_forget(name):
    """Whatever their dispreferred answers are, which are refusals."""
    wild = jnp.where(BATCH.unsafe[:, None], BATCH.rejected.targets, 99)
    other = BATCH.replace(rejected=BATCH.rejected.replace(targets=wild))
    run = jax.jit(jax.value_and_grad(lambda params, batch: loss(name, params, batch)[0]))
    jax.tree.map(np.testing.assert_array_equal, run(PARAMS, other), run(PARAMS, BATCH))
    value, metrics = loss(name, batch=pairs(unsafe=[False] * len(PROMPTS)))
    assert metrics["loss/forget"] == 0 and np.isfinite(value)


@NAMES
@pytest.mark.parametrize("retain", ["nll", "kl"])
def test_what_is_not_scored_and_padding_change_nothing(name, retain):
    run = jax.jit(jax.value_and_grad(lambda params, batch: loss(name, params, batch, retain=retain)[0]))
    expected = run(PARAMS, BATCH)
    jax.tree.map(np.testing.assert_array_equal, run(PARAMS, unscored(BATCH)), expected)
    longer = loss(name, batch=pairs(unsafe=UNSAFE, length=40), retain=retain)[0]
    np.testing.assert_allclose(longer, expected[0], rtol=RTOL)


@pytest.mark.parametrize(("name", "retain"), [("npo", "kl"), ("simnpo", "nll"), ("graddiff", "kl")])
def test_gradients_are_finite_differences_and_none_is_of_the_reference(name, retain):
    value = jax.jit(lambda params: loss(name, params, retain=retain)[0])
    check_grads(value, (PARAMS,), order=1, modes=("rev",), atol=2e-3, rtol=2e-2, eps=1e-2)
    assert not np.any(jax.grad(lambda q: loss(name, reference=q, retain=retain)[0])(REFERENCE)["table"])


@NAMES
def test_hyper_parameters_are_a_lanes_own(name):
    lanes = {field: jnp.asarray([value, 0.5 * value]) for field, value in OPTIONS[name].items()}
    found = jax.jit(jax.vmap(lambda scalars: traced(name, BATCH, reference=REFERENCE, **scalars)))(lanes)
    for lane, factor in enumerate((1.0, 0.5)):
        alone, _ = loss(name, **{field: factor * value for field, value in OPTIONS[name].items()})
        np.testing.assert_allclose(found[lane], alone, rtol=RTOL)


def stemmed(side: Batch, *, stem: int) -> Batch:
    return side.replace(mask=side.mask & (jnp.arange(side.mask.shape[1]) >= stem)[None], stem=stem)


@NAMES
def test_a_shared_beginning_is_read_once_also_where_the_sides_have_it_of_another_length(name):
    """What the reference says is of the preferred side's own."""
    sides = [stemmed(side, stem=stem) for side, stem in ((BATCH.chosen, 2), (BATCH.rejected, 1))]
    batch = PreferenceBatch(*sides, BATCH.unsafe)
    whole = batch.replace(chosen=sides[0].replace(stem=0), rejected=sides[1].replace(stem=0))
    run = jax.jit(jax.value_and_grad(lambda params, batch: loss(name, params, batch, retain="kl")[0]))
    (got, slope), (expected, wanted) = run(PARAMS, batch), run(PARAMS, whole)
    np.testing.assert_allclose(got, expected, rtol=RTOL)
    np.testing.assert_allclose(slope["table"], wanted["table"], rtol=RTOL, atol=ATOL)


@NAMES
def test_nothing_is_asked_of_a_reference_that_is_not_needed(name):
    method, key = methods.load(name), keys.root(0)
    given = {"reference": REFERENCE, "key": key}
    plain, kept = (
        objective.prepared(method, MODEL, BATCH, method.Config(retain=kind), **given).reference
        for kind in ("nll", "kl")
    )
    assert set(kept) - set(plain or {}) == {"kept"} and (plain is None) == (name != "npo")
    if name != "npo":
        assert np.isfinite(loss(name, reference=None)[0])
        with pytest.raises(ValueError, match="reference: got None, expected the parameters"):
            loss(name, reference=None, retain="kl")


@pytest.mark.parametrize(
    "name", ["npo", *(pytest.param(one, marks=pytest.mark.slow) for one in ("simnpo", "graddiff"))]
)
def test_a_batch_in_parts_of_which_one_has_no_unsafe_prompt_is_the_whole(name):
    batch = pairs(unsafe=[True, False, True, False, False])
    rows = jnp.asarray([0, 2, 1, 3])
    batch = jax.tree.map(lambda leaf: leaf[rows], batch)
    method = methods.load(name)
    config = method.Config(retain="kl", **OPTIONS[name])
    expected = loss(name, batch=batch, retain="kl")[0]
    batch = batch.replace(reference=method.reference(MODEL, REFERENCE, batch, config))
    totals = lambda p, b, aux, **given: method.totals(MODEL, p, b, config, aux, **given)  # noqa: E731
    gradient = stepping.make_gradient(totals, key=jax.random.key(0), total_steps=1, parts=2)
    state = stepping.TrainState(step=jnp.int32(0), params=PARAMS, opt_state=(), finite=True)
    np.testing.assert_allclose(jax.jit(gradient)(state, batch)[0], expected, rtol=RTOL)
