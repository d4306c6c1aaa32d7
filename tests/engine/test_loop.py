"""Chunks of a toy lane: checkpoints, metrics, exact resumption, dead lanes, and one compilation per program."""

import shutil
import signal
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys
from jaxsafety.engine import loop, memory, programs, sweep
from jaxsafety.engine.legs import Leg, forget_optimizers, in_step, is_finished
from jaxsafety.engine.legs import load as load_leg
from jaxsafety.engine.programs import Grid
from jaxsafety.rundir import checkpoint, metrics_file, signals
from jaxsafety.types import HParams, TrainState
from tests.disturbed import die_before_saving

GRID = Grid(seeds=(4, 9), rows=2, strategy="sharded")
POINTS = (("eta_M", 0.1), ("eta_S", 0.01))
STEPS, CHUNK = 8, 2
# float32 sums of five numbers.
RTOL = 1e-6


def chunk(state, given, key, point, steps):
    """Noisy steps; a lane with an infinite rate dies at step 4."""

    def step(_, carry):
        noise = jax.random.normal(keys.at_step(key, carry.step), (5,))
        params = {"w": carry.params["w"] + point.peak_lr * noise}
        finite = carry.finite & ~(jnp.isinf(point.options["bound"]) & (carry.step >= 4))
        return carry.replace(step=carry.step + 1, params=params, finite=finite)

    state = jax.lax.fori_loop(0, steps, step, state)
    loss = jnp.where(state.finite, jnp.sum(state.params["w"]), jnp.nan)
    return state, {"loss": loss, "finite": state.finite.astype(jnp.float32)}


def read(params, offset, _):
    """What the curves show: the first weight plus what is given per seed."""
    return {"safe/exact_match": params["w"][0] + offset, "unsafe/refused": jnp.float32(0.25)}


@cache
def placing(grid):
    """The identity over a grid's lanes, compiled once for all tests."""
    return programs.program(lambda lane, _, __: lane, grid=grid)


def start():
    shape = (2, 2)
    state = TrainState(
        step=np.zeros(shape, np.int32),
        params={"w": np.ones((*shape, 5), np.float32)},
        opt_state=(),
        finite=np.ones(shape, bool),
    )
    return placing(GRID)(state, *np.zeros((2, 2), np.float32))


doubled = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf, state))


def another_start():
    """Of the same shapes: a run that starts again instead of resuming ends elsewhere."""
    return doubled(start())


def points(bounds=(1.0, 1.0)):
    rates, bounds = (np.asarray(given, np.float32) for given in ([0.1, 0.01], bounds))
    return HParams(*jax.device_put((rates, {"bound": bounds})))


def roots():
    return jax.vmap(keys.root)(np.asarray(GRID.seeds, np.uint32))


OFFSETS = (10.0, 20.0)


def legs_of(directory, *, label="toy", steps=STEPS, snapshots=()):
    return [
        Leg(directory, "tune", f"{label}.{point}", label, point, lr, steps, CHUNK, snapshots) for point, lr in POINTS
    ]


# Tests share the read-out's program.
SHARED = programs.sharing()


def train(
    directory, *, label="toy", steps=STEPS, start=start, chunk=chunk, bounds=(1.0, 1.0), snapshots=(), make=SHARED
):
    directory.mkdir(exist_ok=True)
    legs = legs_of(directory, label=label, steps=steps, snapshots=snapshots)
    inputs = {
        "readout": (read, jax.device_put(np.asarray(OFFSETS, np.float32))),
        "given": {},
        "per_seed": roots(),
        "points": points(bounds),
    }
    return loop.train(chunk, start, **inputs, grid=GRID, legs=legs, make=make), legs


def load(legs, step=None):
    """What both legs keep, stacked."""
    like = {"w": jax.ShapeDtypeStruct((2, 5), np.float32)}
    found = [load_leg(leg, like, grid=GRID, step=step) for leg in legs]
    return jax.tree.map(lambda *rows: np.stack(rows), *found)


def kept(state):
    """What finished legs keep of a state."""
    return {"finite": state.finite, "params": state.params}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its state and its legs, which tests only look at."""
    return train(tmp_path_factory.mktemp("whole"))


def metrics_of(legs):
    return (legs[0].directory / "metrics.jsonl").read_bytes()


def test_a_chunk_is_written_while_the_next_one_computes(tmp_path, monkeypatch):
    order, save = [], checkpoint.save

    def noted(run, **how):
        program = programs.program(run, **how)

        def call(*arguments):
            if run is chunk:
                order.append("computes")
            return program(*arguments)

        return call

    def saved(*given, step, **how):
        order.append(step)
        save(*given, step=step, **how)

    monkeypatch.setattr(checkpoint, "save", saved)
    train(tmp_path / "run", make=noted)
    assert order == ["computes", "computes", 2, 2, "computes", 4, 4, "computes", 6, 6, 8, 8]


def test_every_chunk_leaves_a_row_per_lane_and_a_checkpoint(whole):
    state, legs = whole
    assert all(is_finished(leg) and checkpoint.steps(leg.checkpoints) == [6, 8] for leg in legs)
    assert legs[0].checkpoints == legs[0].directory / "checkpoints" / "toy.eta_M"
    rows = metrics_file.read_metrics(legs[0].directory)
    labels = [(row["step"], row["lr_name"], row["lr"], row["seed"]) for row in rows]
    assert labels == [(t, *point, seed) for t in (2, 4, 6, 8) for point in POINTS for seed in GRID.seeds]
    assert {(row["stage"], row["method"], row["unsafe/refused"]) for row in rows} == {("tune", "toy", 0.25)}
    weights = np.asarray(state.params["w"])
    np.testing.assert_allclose([row["loss"] for row in rows[-4:]], weights.sum(-1).ravel(), rtol=RTOL)
    shown = (weights[..., 0] + np.asarray(OFFSETS)).ravel()
    np.testing.assert_allclose([row["safe/exact_match"] for row in rows[-4:]], shown, rtol=RTOL)


def test_finished_legs_keep_parameters_as_they_ended(whole, tmp_path):
    state, legs = whole
    assert bits(load(legs)) == bits(kept(state))
    placed = load_leg(legs[0], {"w": jax.ShapeDtypeStruct((2, 5), np.float32)}, grid=GRID)
    assert placed["params"]["w"].sharding == sweep.seed_sharding("sharded", seeds=2, axis=0)
    again = [replace(leg, directory=shutil.copytree(leg.directory, tmp_path / "a", dirs_exist_ok=True)) for leg in legs]
    forget_optimizers(again)
    assert [checkpoint.steps(leg.checkpoints) for leg in again] == [[8], [8]]
    assert bits(load(again)) == bits(kept(state))


def test_legs_that_a_kill_left_apart_train_together_and_others_do_not(tmp_path, whole):
    state, legs = whole
    torn = [replace(leg, directory=shutil.copytree(leg.directory, tmp_path / "a", dirs_exist_ok=True)) for leg in legs]
    assert in_step(torn) == []
    shutil.rmtree(torn[1].checkpoints / "00000008")
    assert in_step(torn) == [tuple(torn)]
    resumed, _ = train(tmp_path / "a", start=another_start)
    assert bits(resumed) == bits(state) and metrics_of(torn) == metrics_of(legs)
    shutil.rmtree(torn[1].checkpoints)
    assert in_step(torn) == [(torn[1],)]


def test_a_run_resumed_at_any_chunk_ends_as_the_uninterrupted_one(tmp_path, whole):
    state, legs = whole
    for done in (2, 4, 6):
        torn = tmp_path / f"torn_{done}"
        run_until(torn, done)
        resumed, _ = train(torn, start=another_start)
        assert bits(resumed) == bits(state)
        assert (torn / "metrics.jsonl").read_bytes() == metrics_of(legs)


def run_until(directory, done, **how):
    """A run killed once the metrics of the next chunk, and its snapshots, were written, but no checkpoint of it."""
    end = Leg.chunk_end(legs_of(directory, snapshots=how.get("snapshots", ()))[0], done)
    die_before_saving(lambda: train(directory, **how), "toy.eta_M", end)


def test_snapshots_end_chunks_of_their_own_and_change_no_step(tmp_path, whole):
    state, _ = whole
    found, (leg, other) = train(tmp_path / "kept", snapshots=(1, 2, 5))
    assert bits(found) == bits(state)
    assert [leg.chunk_end(done) for done in (0, 1, 2, 4, 5, 6)] == [1, 2, 4, 5, 6, 8]
    assert {row["step"] for row in metrics_file.read_metrics(tmp_path / "kept")} == {1, 2, 4, 5, 6, 8}
    for step in leg.snapshots:
        short, _ = train(tmp_path / f"to_{step}", steps=step)
        assert bits(load((leg, other), step)) == bits(kept(short))


def test_a_run_killed_between_snapshot_and_checkpoint_ends_as_the_uninterrupted_one(tmp_path):
    whole, legs = train(tmp_path / "whole", snapshots=(3, 5))
    torn = legs_of(tmp_path / "torn", snapshots=(3, 5))
    run_until(tmp_path / "torn", 4, snapshots=(3, 5))
    assert [checkpoint.steps(leg.snapshot_folder) for leg in torn] == [[3, 5], [3]]
    resumed, _ = train(tmp_path / "torn", start=another_start, snapshots=(3, 5))
    assert bits(resumed) == bits(whole)
    for step in (3, 5):
        assert bits(load(legs, step)) == bits(load(torn, step))


def test_a_signal_ends_the_run_after_the_chunk_that_it_came_in(tmp_path, monkeypatch, whole):
    state, legs = whole
    save = checkpoint.save

    def interrupted(folder, *arguments, step, **options):
        # Written while the chunk to step 6 computes. A second signal would end the process.
        if step == 4 and folder.name == "toy.eta_M":
            signal.raise_signal(signal.SIGTERM)
        save(folder, *arguments, step=step, **options)

    with monkeypatch.context() as patch, signals.deferred(lambda _: None):
        patch.setattr(checkpoint, "save", interrupted)
        with pytest.raises(signals.Stopped, match=r"^stopped by SIGTERM after step 6 of tune toy$"):
            train(tmp_path / "torn")
    assert checkpoint.latest(tmp_path / "torn" / "checkpoints" / "toy.eta_M") == 6
    resumed, _ = train(tmp_path / "torn", start=another_start)
    assert bits(resumed) == bits(state)
    assert (tmp_path / "torn" / "metrics.jsonl").read_bytes() == metrics_of(legs)


def test_starting_again_keeps_the_rows_of_other_methods(tmp_path):
    train(tmp_path, label="first")
    train(tmp_path, label="second")
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for point, _ in POINTS:
        shutil.rmtree(tmp_path / "checkpoints" / f"second.{point}")
    train(tmp_path, label="second")
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_dead_lanes_are_reported_and_the_others_go_on(tmp_path):
    state, _ = train(tmp_path, bounds=(jnp.inf, 1.0))
    np.testing.assert_array_equal(state.finite, [[False, False], [True, True]])
    rows = metrics_file.read_metrics(tmp_path)
    dead = [row for row in rows if row["lr_name"] == "eta_M" and row["step"] > 4]
    assert all(row["finite"] == 0 and row["loss"] is None for row in dead) and len(dead) == 4
    assert all(row["finite"] == 1 for row in rows if row not in dead)


def test_a_run_fails_only_when_every_lane_is_dead(tmp_path):
    with pytest.raises(FloatingPointError, match="every lane of tune toy diverged: lower its learning rate"):
        train(tmp_path, bounds=(jnp.inf, jnp.inf))
    assert checkpoint.latest(tmp_path / "checkpoints" / "toy.eta_S") == 6


@pytest.mark.parametrize("resumed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["fresh", "resumed"])
def test_a_program_is_traced_and_compiled_once_however_many_chunks(tmp_path, caplog, resumed):
    traces, compiled = [], {}

    train(tmp_path / "warm")  # operations outside the programs compile here
    for steps in (4, 8):
        directory = tmp_path / str(steps)
        if resumed:
            run_until(directory, 2)
        traces.clear()
        caplog.clear()

        def counted(*arguments):
            traces.append(None)
            return chunk(*arguments)

        with jax.log_compiles(), caplog.at_level("WARNING"):
            train(directory, chunk=counted, steps=steps)
        compiled[steps] = sum("Compiling" in record.getMessage() for record in caplog.records)
        assert len(traces) == 1
    # The read-out's program was there; a resumed run joins the states of its lanes.
    assert compiled[4] == compiled[8] == 1 + resumed


@pytest.mark.parametrize("strategy", [pytest.param("map", marks=pytest.mark.slow), "vmap", "sharded"])
def test_a_chunk_moves_nothing_between_hosts_and_devices(tmp_path, monkeypatch, strategy):
    """Every dispatch after the first, which compiles, runs where each transfer that is not asked for raises."""
    calls, program = [], programs.program

    def guarded(run, **named):
        inner = program(run, **named)

        def call(*arguments):
            if not named.get("donate"):
                return inner(*arguments)
            calls.append(None)
            with jax.transfer_guard("disallow" if len(calls) > 1 else "allow"):
                return inner(*arguments)

        return call

    monkeypatch.setattr(f"{__name__}.GRID", replace(GRID, strategy=strategy))
    train(tmp_path / "run", make=guarded)
    assert len(calls) == STEPS // CHUNK
    # The guard would have seen a step count that comes from the host.
    monkeypatch.setattr(loop, "_everywhere", lambda value, grid: value)
    calls.clear()
    with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
        train(tmp_path / "again", make=guarded)


@pytest.mark.parametrize(("room_gib", "at_once"), [(1.0, None), (0.75, 2), (0.375, 1), (0.0, 1)])
def test_lanes_that_do_not_fit_together_run_by_parts_which_is_said(monkeypatch, capsys, room_gib, at_once):
    """Needs are made up: 3/8 GiB a lane that is batched, on one point of two seeds by two points."""
    grid, built = replace(GRID, strategy="vmap"), []

    def over_lanes(run, strategy, *, seeds, at_once, per_lane):
        built.append(at_once)
        return lambda lanes, per_seed, points: lanes

    monkeypatch.setattr(sweep, "over_lanes", over_lanes)
    monkeypatch.setattr(memory, "free", lambda: int(room_gib * 2**30))
    monkeypatch.setattr(memory, "need", lambda _: int({None: 0.9, 2: 0.7, 1: 0.375}[built[-1]] * 2**30))
    fn = programs.program(lambda *_: None, grid=grid)
    for _ in range(2):
        fn(np.zeros((2, 2)), np.zeros(2), np.zeros(2))
    assert built == {None: [None], 2: [None, 2], 1: [None, 2, 1]}[at_once]
    said = capsys.readouterr().err
    if at_once is None:
        assert not said
    else:
        assert said.startswith("jaxsafety: all lanes together need 0.9 GiB of a device that has")
        assert f"running {at_once} seed{'s' * (at_once > 1)} at a time" in said and said.count("\n") == 1


@pytest.mark.parametrize("word", ["RESOURCE_EXHAUSTED: Ran out of memory", "INTERNAL: a bug"])
def test_a_program_that_its_compiler_cannot_place_is_split_too(monkeypatch, capsys, word):
    def need(_):
        needs.append(None)
        if len(needs) == 1:
            raise jax.errors.JaxRuntimeError(word)
        return 2**20

    needs = []
    monkeypatch.setattr(memory, "need", need)
    fn = programs.program(lambda lane, *_: lane, grid=replace(GRID, strategy="vmap"))
    if "INTERNAL" in word:
        with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
            fn(jnp.zeros((2, 2)), jnp.zeros(2), jnp.zeros(2))
        return
    np.testing.assert_array_equal(fn(jnp.ones((2, 2)), jnp.zeros(2), jnp.zeros(2)), np.ones((2, 2)))
    assert "all lanes together need more of a device that has" in capsys.readouterr().err


def test_the_need_of_a_program_is_its_plan_without_its_arguments():
    lanes = jnp.zeros((4, 1000))
    compiled = jax.jit(lambda x: (x @ x.T, x + 1)).lower(lanes).compile()
    assert 4 * (16 + 4000) <= memory.need(compiled) < 4 * (16 + 4000) * 2
    assert memory.need(jax.jit(lambda x: x + 1, donate_argnums=0).lower(lanes).compile()) < 1000
    assert 2**20 < memory.available() <= memory.free()


def test_a_container_s_limit_is_the_lowest_of_its_groups(tmp_path):
    assert memory.cgroup_limits(tmp_path) == [2**63]
    groups = tmp_path / "sys" / "fs" / "cgroup"
    for place, text in {".": "max", "job": "3000", "job/step": "max", "memory/old": "2000"}.items():
        (groups / place).mkdir(parents=True, exist_ok=True)
        file = "memory.limit_in_bytes" if "old" in place else "memory.max"
        (groups / place / file).write_text(f"{text}\n")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    own = tmp_path / "proc" / "self" / "cgroup"
    own.write_text("0::/job/step\n")
    assert min(memory.cgroup_limits(tmp_path)) == 3000
    own.write_text("4:cpu,memory:/old\n2:cpuset:/job\n")
    assert min(memory.cgroup_limits(tmp_path)) == 2000


def test_a_function_is_fitted_before_it_runs(monkeypatch):
    given = jax.ShapeDtypeStruct((1000,), jnp.float32)
    assert programs.fitted(lambda x: x + 1, given, what="adding")(jnp.zeros(1000))[0] == 1
    monkeypatch.setattr(memory, "available", lambda: 7999)
    # 4 kB in, 4 kB out.
    with pytest.raises(ValueError, match=r"adding needs 7.45e-06 GiB, and the device has 7.45e-06 GiB free"):
        programs.fitted(lambda x: x + 1, given, what="adding")
    # An array that is on the device already is not counted twice.
    assert programs.fitted(lambda x: x + 1, jnp.zeros(1000), what="adding")(jnp.ones(1000))[0] == 2
