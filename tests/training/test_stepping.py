"""The training step against plain updates, frozen lanes, the loop, and verdicts against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsafety import losses, tree
from jaxsafety.models.adapter import adapted
from jaxsafety.subjects import judge
from jaxsafety.training import stepping
from jaxsafety.types import Batch, Needs, Trial

# One float32 program against another that rounds in a different order.
RTOL = 1e-6
VOCAB, ROWS, TOKENS = 5, 400, 7


def totals(params, batch, aux=None, **_):
    """A quadratic; a NaN in the batch makes loss and gradient NaN."""
    residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return {"square": losses.summed(residual**2)}, {"residual": losses.summed(residual)}


def loss(params, batch):
    return stepping.added(*totals(params, batch))


def make_step(totals, optimizer):
    return stepping.make_step(stepping.make_gradient(totals, key=jax.random.key(0), total_steps=9), optimizer)


@pytest.fixture
def params():
    return jax.device_put({"w": np.asarray([1.0, -2.0, 0.5], np.float32), "b": np.float32(0.3)})


@jax.jit
def batch_of(step):
    key = jax.random.fold_in(jax.random.key(0), step)
    return {"x": jax.random.normal(key, (4, 3)), "y": jax.random.normal(jax.random.fold_in(key, 1), (4,))}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_step_is_plain_gradient_descent(params):
    state = stepping.init_state(params, optax.sgd(0.1))
    state, metrics = jax.jit(make_step(totals, optax.sgd(0.1)))(state, batch_of(0))
    x, y = (np.asarray(batch_of(0)[name], np.float64) for name in "xy")
    residual = x @ np.asarray([1.0, -2.0, 0.5]) + 0.3 - y
    grads = {"w": 2 * x.T @ residual / 4, "b": 2 * residual.mean()}
    np.testing.assert_allclose(state.params["w"], np.asarray([1.0, -2.0, 0.5]) - 0.1 * grads["w"], rtol=1e-5)
    np.testing.assert_allclose(state.params["b"], 0.3 - 0.1 * grads["b"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (residual**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["residual"], residual.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], np.hypot(np.linalg.norm(grads["w"]), grads["b"]), rtol=1e-5)
    assert (state.step, metrics["finite"]) == (1, 1.0)


def test_step_is_the_optax_loop_for_a_stateful_optimizer(params):
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01, b2=0.9))
    state, opt_state, expected = stepping.init_state(params, optimizer), optimizer.init(params), params
    step = jax.jit(make_step(totals, optimizer))

    @jax.jit
    def plain_step(params, opt_state, batch):
        grads = jax.grad(lambda p: loss(p, batch)[0])(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(3):
        state, _ = step(state, batch_of(i))
        expected, opt_state = plain_step(expected, opt_state, batch_of(i))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, expected)


def poisoned(step, at):
    batch = batch_of(step)
    return batch | {"y": jnp.where(step == at, jnp.nan, batch["y"])}


def test_a_dead_lane_is_frozen_and_stays_dead_while_the_other_lives_on_untouched(params):
    optimizer = optax.adam(0.01)
    step = make_step(totals, optimizer)

    def run(start, poison_at):
        return stepping.run_steps(step, lambda i: poisoned(i, poison_at), start, steps=6)

    start = stepping.init_state(params, optimizer)
    both, lanes = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), start), jax.jit(jax.vmap(run))
    state, metrics = jax.device_get(lanes(both, np.asarray([2, -1], np.int32)))
    clean, _ = jax.device_get(lanes(both, np.asarray([-1, -1], np.int32)))
    np.testing.assert_array_equal(state.finite, [False, True])
    np.testing.assert_allclose(metrics["finite"], [2 / 6, 1], rtol=RTOL)
    lane = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in (0, 1)]
    assert bits(lane[1]) == bits(jax.tree.map(lambda leaf: leaf[1], clean))
    # Frozen where the poisoned step found it: two steps in, optimiser state included.
    before, _ = jax.jit(lambda s: stepping.run_steps(step, batch_of, s, steps=2))(start)
    assert bits(lane[0].params) == bits(before.params)
    assert bits(lane[0].opt_state) == bits(before.opt_state)
    # A mean over a poisoned step is none.
    assert np.isnan(metrics["loss"][0]) and np.isfinite(metrics["loss"][1])


def test_an_infinite_gradient_of_a_finite_loss_freezes_too():
    step = make_step(lambda p, *_, **__: ({"root": (jnp.sqrt(p["x"]), jnp.float32(1))}, {}), optax.sgd(0.1))
    state, metrics = jax.jit(step)(stepping.init_state({"x": jnp.float32(0.0)}, optax.sgd(0.1)), None)
    assert (metrics["loss"], bool(state.finite), state.params["x"]) == (0, False, 0)


def test_steps_are_a_python_loop_over_the_states_own_counter(params):
    optimizer = optax.adam(0.01)
    step = make_step(totals, optimizer)
    start = stepping.init_state(params, optimizer).replace(step=jnp.int32(3))
    run = jax.jit(lambda s, steps: stepping.run_steps(step, batch_of, s, steps=steps))
    scanned, metrics = run(start, jnp.int32(4))
    looped, seen_losses = start, []
    jitted = jax.jit(step)
    for i in range(3, 7):
        looped, seen = jitted(looped, batch_of(i))
        seen_losses.append(float(seen["loss"]))
    assert scanned.step == looped.step == 7
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL), scanned, looped)
    np.testing.assert_allclose(metrics["loss"], np.mean(seen_losses), rtol=RTOL)
    # The same program, two chunks of another length: not a bit changes.
    halves = run(run(start, jnp.int32(1))[0], jnp.int32(3))[0]
    assert bits(halves) == bits(scanned)
    assert run._cache_size() == 1


@pytest.fixture(scope="module")
def judged():
    """Random answers of few letters under a model that repeats its input: every verdict and every overlap occurs."""
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        tokens = rng.integers(0, 2, (ROWS, TOKENS))
        targets = np.where(rng.random((ROWS, TOKENS)) < 0.8, tokens, rng.integers(0, VOCAB, (ROWS, TOKENS)))
        sides.append((tokens, targets, rng.random((ROWS, TOKENS)) < 0.4))
    blocks = rng.random((ROWS, 2, TOKENS)) < 0.4
    blocks[:20] = False
    complied, refused = (
        Batch(jnp.asarray(x, jnp.int32), jnp.asarray(y, jnp.int32), jnp.asarray(mask)) for x, y, mask in sides
    )
    unsafe, last = jnp.ones(ROWS, bool), jnp.zeros(ROWS, jnp.int32)
    trial = Trial(complied, refused, jnp.asarray(blocks), unsafe=unsafe, last=last, prompt=None)
    got = judge.judge(adapted(lambda _, tokens: jax.nn.one_hot(tokens, VOCAB), max_tokens=TOKENS), {}, trial)
    return sides, blocks, {name: np.asarray(value) for name, value in got.items()}


def test_verdicts_match_a_plain_loop(judged):
    (complied, refused), blocks, got = judged
    for i in range(ROWS):
        right, right_null = complied[0][i] == complied[1][i], refused[0][i] == refused[1][i]
        refuses = all(right_null[j] for j in range(TOKENS) if refused[2][i, j])
        complies = not refuses and all(right[j] for j in range(TOKENS) if complied[2][i, j])
        assert (got["refused"][i], got["complied"][i]) == (refuses, complies)
        for k in (0, 1):
            inside = [right[j] for j in range(TOKENS) if blocks[i, k, j]]
            assert got[f"exact_match_block{k + 1}"][i] == all(inside)
            share = sum(inside) / len(inside) if inside else 0
            np.testing.assert_allclose(got[f"token_accuracy_block{k + 1}"][i], share, rtol=RTOL)
        assert got["exact_match"][i] == got["exact_match_block1"][i] * got["exact_match_block2"][i]
        null = [right_null[j] for j in range(TOKENS) if refused[2][i, j]]
        np.testing.assert_allclose(got["refusal_token_accuracy"][i], sum(null) / max(len(null), 1), rtol=RTOL)


def test_a_prompt_is_complied_refused_or_other_and_each_occurs(judged):
    _, _, got = judged
    np.testing.assert_array_equal(got["complied"] + got["refused"] + got["other"], 1.0)
    assert all(got[name].sum() > 10 for name in ("complied", "refused", "other"))


def test_the_state_beside_the_optimisers_follows_the_means_and_freezes_with_its_lane():
    def sums(params, batch, aux, **_):
        return {"loss": losses.summed(params["x"] * batch + aux["seen"])}, {"batch": losses.summed(batch)}

    def update_aux(aux, means):
        return {"seen": aux["seen"] + means["batch"]}

    gradient = stepping.make_gradient(sums, key=jax.random.key(0), total_steps=3, parts=2)
    step = jax.jit(stepping.make_step(gradient, optax.sgd(0.0), update_aux=update_aux))
    state = stepping.init_state({"x": jnp.float32(1)}, optax.sgd(0.0), aux={"seen": jnp.float32(0)})
    for batch, expected in (([1.0, 3.0], 2.0), ([2.0, 2.0], 4.0), ([jnp.nan, 1.0], 4.0), ([1.0, 1.0], 4.0)):
        state, _ = step(state, jnp.asarray(batch))
        assert state.aux["seen"] == expected


def test_only_the_parameters_that_a_method_trains_move_or_decay(params):
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    gradient = stepping.make_gradient(totals, key=jax.random.key(0), total_steps=9)
    state = stepping.init_state(params, optimizer)
    moved, metrics = jax.jit(stepping.make_step(gradient, optimizer, needs=Needs(trained="b")))(state, batch_of(0))
    np.testing.assert_array_equal(moved.params["w"], params["w"])
    assert moved.params["b"] != params["b"]
    whole = jax.grad(lambda p: loss(p, batch_of(0))[0])(params)
    np.testing.assert_allclose(metrics["grad_norm"], abs(whole["b"]), rtol=1e-5)


def test_only_the_layers_that_a_method_trains_move_or_decay():
    """Those of an adapter's factors, too."""
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    needs = Needs(trained="blocks/mlp/(up|down)|norm", layers=lambda depth: range(depth - 2, depth))

    def sums(params, batch, aux, **_):
        return {"loss": losses.summed(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)) * batch)}, {}

    stacked = {name: jnp.ones((3, 2, 2)) for name in ("up", "down_lora_a", "gate")} | {"bias": jnp.ones((3, 2))}
    before = {"blocks": {"mlp": stacked}, "norm": jnp.ones(2)}
    gradient = stepping.make_gradient(sums, key=jax.random.key(0), total_steps=9)
    state = stepping.init_state(before, optimizer)
    moved, metrics = jax.jit(stepping.make_step(gradient, optimizer, needs=needs))(state, jnp.ones(1))
    found = {path: np.asarray(leaf != 1) for path, leaf in tree.flatten(moved.params).items()}
    for name in ("up", "down_lora_a"):
        assert not found[f"blocks/mlp/{name}"][0].any() and found[f"blocks/mlp/{name}"][1:].all()
    assert found["norm"].all() and not found["blocks/mlp/gate"].any() and not found["blocks/mlp/bias"].any()
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(2 * 8 + 2), rtol=RTOL)


def test_a_loss_knows_its_step_by_key_and_progress(params):
    def sums(params, batch, aux, *, key, progress):
        return {"loss": losses.summed(params["b"] * batch["y"])}, {
            "progress": (progress, jnp.float32(1)),
            "drawn": (jax.random.uniform(key), jnp.float32(1)),
        }

    step = jax.jit(make_step(sums, optax.sgd(0.0)))
    state, seen = stepping.init_state(params, optax.sgd(0.0)), []
    for i in range(3):
        state, metrics = step(state, batch_of(i))
        seen.append((float(metrics["progress"]), float(metrics["drawn"])))
    np.testing.assert_allclose([progress for progress, _ in seen], [0, 1 / 9, 2 / 9], rtol=RTOL)
    assert len({drawn for _, drawn in seen}) == 3


def test_what_a_method_carries_keeps_its_shape(params):
    gradient = stepping.make_gradient(totals, key=jax.random.key(0), total_steps=9)
    step = stepping.make_step(gradient, optax.sgd(0.1), update_aux=lambda aux, _: {"n": jnp.stack([aux["n"]] * 2)})
    state = stepping.init_state(params, optax.sgd(0.1), aux={"n": jnp.zeros(())})
    with pytest.raises(AssertionError, match="shape"):
        jax.eval_shape(step, state, batch_of(0))
