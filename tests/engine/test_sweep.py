"""A grid of lanes is its single runs: vmapped, mapped and sharded; and what the strategies resolve to."""

import re
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, tree
from jaxsafety.engine import sweep
from jaxsafety.models import gpt
from jaxsafety.study import lanes, pipeline, train
from jaxsafety.training import answers, optim, stepping
from jaxsafety.types import Batch

# Batched and single matrix products add in another order (1e-7), and five Adam steps divide by small gradients.
ATOL = 2e-5
SEEDS, LRS = (0, 3, 7, 9), (1e-3, 1e-2)
COLLECTIVES = r"all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
CONFIG = gpt.GPTConfig(vocab_size=7, max_tokens=8, layers=1, heads=2, width=16)


def run(state, key, peak_lr):
    """Five real steps of one lane on cheap batches."""

    def draw(step):
        tokens = jax.random.randint(keys.at_step(key, step), (4, 9), 0, 7)
        return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], mask=jnp.ones((4, 8), bool))

    totals = partial(answers.next_token, gpt.model(CONFIG))
    gradient = stepping.make_gradient(lambda p, b, aux, **_: totals(p, b), key=key, total_steps=5)
    step = stepping.make_step(gradient, optimizer(peak_lr))
    return stepping.run_steps(step, draw, state, steps=5)


def optimizer(peak_lr):
    return optim.make_optimizer(optim.OptimConfig(warmup=0.0), peak_lr=peak_lr, total_steps=5)


def start(key):
    return stepping.init_state(gpt.init(CONFIG, key=key), optimizer(0.1))


@pytest.fixture(scope="module")
def inputs():
    roots = jax.vmap(keys.root)(jnp.asarray(SEEDS, jnp.uint32))
    states = jax.jit(jax.vmap(start))(roots)
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * len(LRS)), states), roots, jnp.asarray(LRS)


@pytest.fixture(scope="module")
def grid(inputs):
    """The grid run under a strategy."""
    return cache(lambda strategy: jax.device_get(jax.jit(sweep.over_lanes(run, strategy, seeds=len(SEEDS)))(*inputs)))


@pytest.fixture(scope="module")
def singles(inputs):
    """Every lane alone, from its state and learning rate, through the same program without a grid."""
    states, roots, _ = inputs
    single = jax.jit(run)
    return {
        (h, s): jax.device_get(single(tree.lane(states, h, s), roots[s], lr))
        for h, lr in enumerate(LRS)
        for s in range(len(SEEDS))
    }


@pytest.mark.slow
def test_a_lane_is_the_single_run_bit_for_bit_as_users_compile_it(inputs, singles, grid):
    """`make test-slow` optimises as they do."""
    test_a_mapped_lane_is_the_single_run_bit_for_bit(grid, singles)
    test_sharding_does_not_change_a_bit(grid)


def test_a_mapped_lane_is_the_single_run_bit_for_bit(grid, singles):
    for (h, s), single in singles.items():
        jax.tree.map(np.testing.assert_array_equal, tree.lane(grid("map"), h, s), single)


def test_sharding_does_not_change_a_bit(grid):
    jax.tree.map(np.testing.assert_array_equal, grid("sharded"), grid("map"))


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_lanes_batched_by_parts_are_those_batched_at_once_within_rounding(inputs, grid, at_once):
    split = jax.jit(sweep.over_lanes(run, "vmap", seeds=len(SEEDS), at_once=at_once))(*inputs)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=ATOL), jax.device_get(split), grid("vmap"))


def test_only_batched_lanes_are_split_in_halves(monkeypatch):
    assert sweep.shares("vmap", seeds=12) == (12, 6, 3, 2, 1)
    assert sweep.shares("vmap", seeds=31) == (31, 16, 8, 4, 2, 1)
    assert sweep.shares("vmap", seeds=1) == (1,)
    assert sweep.shares("map", seeds=12) == sweep.shares("sharded", seeds=12) == ()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sweep.shares("sharded", seeds=12) == (3, 2, 1)


def test_a_vmapped_lane_is_the_single_run_within_rounding(grid, singles):
    near = partial(np.testing.assert_allclose, rtol=1e-4, atol=ATOL)
    for (h, s), single in singles.items():
        jax.tree.map(near, tree.lane(grid("vmap"), h, s), single)


def test_lanes_differ_by_seed_and_by_learning_rate(grid):
    embed = grid("vmap")[0].params["embed"].reshape(len(LRS) * len(SEEDS), -1)
    assert len(np.unique(embed, axis=0)) == len(embed)


@pytest.mark.parametrize(
    ("seeds", "devices", "count"), [(4, 1, 1), (4, 4, 4), (4, 3, 2), (5, 4, 1), (6, 4, 3), (1, 8, 1), (12, 8, 6)]
)
def test_seeds_are_split_evenly_over_as_many_devices_as_can_be(seeds, devices, count):
    assert sweep.shard_count(seeds, devices) == count


def test_auto_shards_where_devices_help_and_maps_on_one_cpu_otherwise():
    assert sweep.resolve("auto", seeds=4) == "sharded"
    assert sweep.resolve("auto", seeds=1) == "map"
    # Five seeds cannot be split over four devices.
    assert sweep.resolve("auto", seeds=5) == "map"
    assert [sweep.resolve(name, seeds=4) for name in ("vmap", "map", "sharded")] == ["vmap", "map", "sharded"]


def test_processes_share_seeds_and_have_as_many_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"every process must have as many devices, got \[4, 0\]: leave the same"):
        sweep.resolve("auto", seeds=4)
    here = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [here, SimpleNamespace(process_index=1)])
    with pytest.raises(ValueError, match="seeds must be a multiple of the 2 processes, got 3: add or drop some"):
        sweep.resolve("auto", seeds=3)
    with pytest.raises(ValueError, match="strategy must be sharded or auto on 2 processes, got 'vmap'"):
        sweep.resolve("vmap", seeds=4)
    assert sweep.resolve("auto", seeds=4) == "sharded"


def test_auto_vmaps_on_one_accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sweep.resolve("auto", seeds=1) == "vmap"


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match=r"unknown strategy 'shard'.*did you mean 'sharded'"):
        sweep.resolve("shard", seeds=2)


@pytest.mark.parametrize(("strategy", "devices"), [("sharded", 2), ("map", 1), ("vmap", 1)])
def test_seeds_lie_on_the_devices_of_their_strategy(strategy, devices):
    sharding = sweep.seed_sharding(strategy, seeds=2, axis=1)
    placed = jax.device_put(jnp.zeros((3, 2, 5)), sharding)
    assert len(placed.sharding.device_set) == devices
    assert {shard.data.shape for shard in placed.addressable_shards} == {(3, 2 // devices, 5)}


def test_a_sharded_pretraining_chunk_has_no_collectives(mini_recipe, tmp_path):
    ready = pipeline.prepare(mini_recipe, tmp_path)
    assert ready.strategy == "sharded"
    root = mini_recipe.lanes[:1]
    chunk = lanes.train_chunk(ready.of_seed, root[0])
    program = sweep.over_lanes(chunk, ready.strategy, seeds=len(mini_recipe.seeds), per_lane=2)
    states, points = train.shapes(ready, root), train.points(root)
    arguments = states, {}, train.seeds(ready, root[0]), points, jnp.int32(2)
    compiled = jax.jit(program, donate_argnums=0).lower(*arguments).compile()
    assert not re.search(COLLECTIVES, compiled.as_text())
    # The search can find one.
    mesh = jax.make_mesh((2,), ("seeds",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("seeds")
    summed = jax.shard_map(
        lambda x: jax.lax.psum(x, "seeds"), mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec()
    )
    assert re.search(COLLECTIVES, jax.jit(summed).lower(jnp.zeros(2)).compile().as_text())
