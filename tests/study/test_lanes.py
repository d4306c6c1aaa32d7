"""A lane of a recipe: which stream each draw comes from, what a chunk does, what evaluation averages."""

import math
import re
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, methods, world
from jaxsafety.config import fields as fields_
from jaxsafety.models import gpt
from jaxsafety.recipe.models import Data
from jaxsafety.study import lanes
from jaxsafety.subjects import judge
from jaxsafety.training.optim import OptimConfig
from jaxsafety.types import HParams
from tests.methods.bound import bound

# Two float32 programs that average the same numbers in another order.
RTOL = 1e-5
# Conditions of the learning curves.
READ_OUT = ("safe", "unsafe")


class Drawn(Exception):
    """Carries the key of a draw out of a chunk that would otherwise go on."""


@pytest.fixture
def point():
    return point_of()


def point_of(**options):
    scalars = {name: jnp.float32(value) for name, value in options.items()}
    return HParams(jnp.float32(1e-3), scalars, {"p_unsafe": jnp.float32(0.5)})


def lane_of(recipe, stage, **training):
    """A lane of a stage that is trained like the recipe's, but for some fields."""
    first = next(lane for lane in recipe.lanes if lane.stage == stage)
    return replace(first, how=replace(first.training, **training))


@pytest.fixture(scope="module")
def init(mini_subject):
    return jax.jit(lambda key: lanes.init_params(mini_subject, key=key))


@pytest.fixture(scope="module")
def params(init):
    return init(keys.root(0))


@pytest.fixture(scope="module")
def draw_pairs(mini_recipe, tiny_world):
    """A stream's first batch of pairs, by a program of its own: the draw takes most of the time that compiling does."""
    count = mini_recipe.tuned[0].training.batch_size
    draw = partial(world.mixed_at, tiny_world, step=0, batch_size=count, p_unsafe=0.5, mix="prompt")
    return jax.jit(lambda key: world.preferences(draw(key=key)))


def bits(key):
    with jax.ensure_compile_time_eval():  # the key is a constant of the scan that draws with it
        return np.asarray(jax.random.key_data(key)).tolist()


def test_initial_parameters_come_from_the_init_stream(mini_recipe, tiny_world, key, params):
    config = mini_recipe.subject.options.model.build(tiny_world)
    assert (config.layers, config.heads, config.width, config.vocab_size) == (1, 2, 16, tiny_world.vocab_size)
    expected = jax.jit(lambda key: gpt.init(config, key=keys.stream(key, "init")))(key)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(("generation", "stage"), [(0, "pretrain"), (1, "tune"), (2, "tune"), (3, "tune")])
def test_training_draws_from_the_stream_of_its_stage_and_generation(
    mini_recipe, mini_subject, key, params, point, monkeypatch, generation, stage
):
    lane = lane_of(mini_recipe, stage)
    for _ in range(generation - 1):
        lane = replace(lane, parent=lane)
    assert len(lane.ancestors) == generation

    def draw(world, config, *, key, step, total_steps, batch_size):
        raise Drawn(config, bits(key), total_steps, batch_size)

    monkeypatch.setattr(type(lane.training.data), "load", lambda self: SimpleNamespace(draw=draw))
    chunk = lanes.train_chunk(lambda _: mini_subject, lane)
    with pytest.raises(Drawn) as drawn:
        state = lanes.init_state(lane.training, {"parent": params}, key=key, point=point)
        chunk(state, {}, lanes.seed(lane, key, jnp.int32(0)), point, jnp.int32(2))
    stream = keys.stream(key, stage)
    expected = stream if generation < 2 else keys.named(stream, f"generation {generation}")
    assert drawn.value.args[1:] == (bits(expected), 6, 4)
    if stage == "tune":
        assert drawn.value.args[0].p_unsafe is point.data["p_unsafe"]


@pytest.mark.slow
def test_two_worlds_make_another_model_of_one_seed_in_one_program(mini_recipe, key, params, point):
    """Seeds with one root key, hence the same initial model and order of draws, in the worlds of two places."""
    config = replace(mini_recipe.subject.options, worlds="per_seed")
    subject = mini_recipe.subject.load().open(config)
    of_seed = subject.of_seeds((3, 5))
    lane, traces = lane_of(mini_recipe, "pretrain"), []

    def found(place):
        traces.append(place)
        return of_seed(place)

    chunk = jax.jit(lanes.train_chunk(found, lane))
    state = lanes.init_state(lane.training, {"parent": params}, key=key, point=point)
    ends = [chunk(state, {}, lanes.seed(lane, key, jnp.int32(place)), point, jnp.int32(2)) for place in (0, 1, 0)]
    assert len(traces) == 1
    first, second, again = (jax.flatten_util.ravel_pytree(end.params)[0] for end, _ in ends)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second) and float(ends[0][1]["loss"]) != float(ends[1][1]["loss"])
    # They are judged on prompts of their own worlds, whose answers differ.
    one, other = (lanes.readout_prompts(of_seed(place), READ_OUT, count=8, key=key) for place in (0, 1))
    assert one.complied.tokens.shape == other.complied.tokens.shape
    assert not np.array_equal(one.complied.targets, other.complied.targets)


@pytest.mark.parametrize("prompts", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_number_of_prompts_comes_in_turn(mini_recipe, tiny_world, key, prompts):
    training = lane_of(mini_recipe, "tune", data=Data("explicit", prompts=prompts)).training
    scalars = {"p_unsafe": jnp.float32(1.0), "prompts": jnp.float32(prompts)}
    point = HParams(jnp.float32(1e-3), {}, scalars)
    draw = jax.jit(lambda step: lanes.examples(tiny_world, training, point, key=key, step=step))
    batches = [draw(step) for step in range(4)]
    rows = np.concatenate([batch.chosen.tokens for batch in batches])
    assert len({row.tobytes() for row in rows}) == prompts
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(row, rows[place % prompts])
    assert all(batch.unsafe.all() for batch in batches)
    # What complies is preferred, and refusing is not.
    plain = jax.jit(lambda: world.mixed_at(tiny_world, key=key, step=2, batch_size=1, p_unsafe=1.0, mix="prompt"))()
    for side, own in (("complied", batches[0].chosen), ("refused", batches[0].rejected)):
        np.testing.assert_array_equal(own.targets[2], getattr(plain, side).targets[0])


@pytest.mark.parametrize("name", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "unlearn"))])
def test_a_step_of_a_chunk_is_the_methods_own_with_the_lanes_scalars(
    mini_recipe, mini_subject, key, init, params, draw_pairs, name
):
    weights = {"weight_chosen": 0.3, "weight_rejected": 0.1, "reduction": "mean"} if name != "sft" else {}
    options = methods.load(name).Config(**weights)
    lane = lane_of(mini_recipe, "tune", method=name, options=options)
    scalars = {field: getattr(options, field) for field in fields_.traced_names(options)}
    point = point_of(**scalars | ({"weight_chosen": 0.7} if weights else {}))
    reference = init(keys.root(9))
    state = lanes.init_state(lane.training, {"parent": params}, key=key, point=point)
    chunk = jax.jit(lanes.train_chunk(lambda _: mini_subject, lane))
    _, metrics = chunk(state, {"reference": reference}, lanes.seed(lane, key, jnp.int32(0)), point, jnp.int32(1))
    options = weights | ({"weight_chosen": 0.7} if weights else {})
    options |= {"ascent_bound": 10.0} if name == "unlearn" else {}
    loss = bound(name, mini_subject.model, reference=reference, **options)
    value, expected = jax.jit(loss)(params, draw_pairs(keys.stream(key, "tune")))
    for metric, own in {**expected, "loss": value}.items():
        np.testing.assert_allclose(metrics[metric], own, rtol=RTOL, atol=1e-6, err_msg=metric)


@pytest.fixture(scope="module")
def half_subject(mini_recipe):
    """The subject of the miniature study, trained in bfloat16."""
    own = mini_recipe.subject.options
    half = replace(own, model=replace(own.model, compute_dtype="bfloat16"))
    return mini_recipe.subject.load().open(half)


@pytest.fixture(scope="module")
def traced(mini_recipe, mini_subject, half_subject, params):
    """Two steps of a chunk of pretraining, or of tuning by a method, each traced once for all that tests look at."""

    @cache
    def trace(name, *, algorithm, dtype):
        subject, key = {"bfloat16": half_subject, "float32": mini_subject}[dtype], keys.root(0)
        stage, optim = "pretrain" if name == "pretrain" else "tune", OptimConfig(algorithm=algorithm)
        options = methods.load(name).Config()
        lane = lane_of(mini_recipe, stage, method=name, options=options, optim=optim)
        point = point_of(**{field: getattr(options, field) for field in fields_.traced_names(options)})
        state = lanes.init_state(lane.training, {"parent": params}, key=key, point=point)
        given = {"reference": params}
        return jax.jit(lanes.train_chunk(lambda _: subject, lane)).trace(
            state, given, lanes.seed(lane, key, jnp.int32(0)), point, jnp.int32(2)
        )

    return trace


@pytest.mark.parametrize(
    ("name", "passes", "platform"),
    [("pretrain", 3, "cpu"), ("pretrain", 3, "cuda"), ("pretrain", 3, "tpu"), ("dpo", 4, "cpu"), ("unlearn", 3, "cpu")],
)
def test_every_product_of_a_bfloat16_step_is_of_bfloat16_factors_and_float32_sums(traced, name, passes, platform):
    text = traced(name, algorithm="adamw", dtype="bfloat16").lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"stablehlo.dot_general .*", text)
    # Of one layer and the logits: forwards once, backwards twice, and forwards for DPO's reference.
    assert len(found) == passes * 9
    algorithm = "lhs_precision_type = bf16, rhs_precision_type = bf16, accumulation_type = f32"
    assert all(algorithm in line and line.endswith("xf32>") for line in found)


@pytest.mark.parametrize(("name", "algorithm"), [("pretrain", "muon"), ("dpo", "adamw")])
def test_bfloat16_leaves_state_and_metrics_as_they_are_in_float32(traced, name, algorithm):
    (state, metrics), whole = (
        traced(name, algorithm=algorithm, dtype=dtype).out_info for dtype in ("bfloat16", "float32")
    )
    assert (state, metrics) == whole
    floats = [x.dtype for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(dtype == jnp.float32 for dtype in floats) and len(floats) > len(metrics)


def test_what_is_read_from_a_model_is_float32_however_it_was_trained(half_subject, mini_subject):
    assert half_subject.training.apply.keywords["config"].compute_dtype == "bfloat16"
    # The same static configuration is the same program.
    for half, whole in (
        (half_subject.model, mini_subject.model),
        (half_subject.analysed, mini_subject.analysed),
        (half_subject.judge.args[0], mini_subject.judge.args[0]),
    ):
        assert half.apply.keywords == whole.apply.keywords


def test_dpo_in_bfloat16_starts_at_log_2(half_subject, key, params, draw_pairs):
    loss = bound("dpo", half_subject.training, reference=params)
    value, metrics = jax.jit(loss)(params, draw_pairs(key))
    # A reference in float32 would leave margins of the size of bfloat16's rounding.
    assert float(value) == pytest.approx(math.log(2), rel=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], 0, atol=1e-5)


@pytest.fixture(scope="module")
def trials(mini_recipe, mini_subject, tiny_world):
    """The table's safe prompts, those of the learning curves, and plain draws of the steps they should come from."""

    def draw(key):
        stream = keys.stream(key, "evaluate")
        config = mini_recipe.evaluate
        return {
            "table": lanes.prompts(mini_subject, config, condition="safe", key=stream, late_probability=0.1),
            "readout": lanes.readout_prompts(mini_subject, READ_OUT, count=config.probe_prompts, key=key),
        }

    root = keys.root(0)
    plain = jax.jit(lambda key, step: world.batch_at(tiny_world, "safe", key=key, batch_size=4, step=step))
    drawn = [plain(keys.stream(root, "evaluate"), step) for step in (0, 1, 1 << 20)]
    return jax.device_get(jax.jit(draw)(root) | {"plain": drawn})


def test_the_curves_read_what_is_to_be_complied_with_and_what_is_to_be_refused(mini_recipe):
    assert mini_recipe.read_out == READ_OUT


def test_the_table_and_the_curves_draw_from_steps_of_the_evaluation_stream_that_never_meet(mini_recipe, trials):
    for i, expected in enumerate(trials["plain"][:2]):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, i=i: leaf[i], trials["table"]), expected)
    first = jax.tree.map(lambda leaf: leaf[0], trials["readout"])
    jax.tree.map(np.testing.assert_array_equal, first, trials["plain"][2])
    np.testing.assert_array_equal(trials["readout"].unsafe, [[False] * 4, [True] * 4])
    assert mini_recipe.evaluate.prompts // mini_recipe.evaluate.batch_size < 1 << 20


@pytest.fixture(scope="module")
def judged(mini_subject, params, trials):
    """The table's rates of a model of large random weights, which is right now and then, and its verdicts by batch."""
    params = jax.tree.map(lambda leaf: 20 * np.asarray(leaf), params)
    trials = trials["table"]
    rates = jax.jit(partial(lanes.evaluate, mini_subject))(params, trials)
    verdicts = jax.jit(partial(judge.judge, mini_subject.model))
    per_batch = [verdicts(params, jax.tree.map(lambda leaf, i=i: leaf[i], trials)) for i in range(2)]
    return jax.device_get((rates, per_batch))


def test_evaluation_is_the_mean_over_all_prompts(judged):
    rates, per_batch = judged
    for name, value in rates.items():
        np.testing.assert_allclose(value, np.mean([np.mean(part[name]) for part in per_batch]), rtol=RTOL, atol=1e-7)
    np.testing.assert_allclose(rates["complied"] + rates["refused"] + rates["other"], 1, rtol=RTOL)
    assert rates["token_accuracy_block1"] > 0


def test_the_curves_show_each_condition_by_name(mini_subject, params, trials):
    got = jax.jit(partial(lanes.readout, mini_subject, READ_OUT))(params, trials["readout"])
    names = ("exact_match", "complied", "refused")
    assert set(got) == {f"{condition}/{name}" for condition in READ_OUT for name in names}
    rates = jax.device_get(jax.jit(partial(lanes.judge, mini_subject))(params, trials["readout"]))
    for i, condition in enumerate(READ_OUT):
        for name in names:
            assert got[f"{condition}/{name}"] == rates[name][i]
