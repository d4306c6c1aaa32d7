"""Several real processes over loopback as one run: the same bits as one process, and all end when one does."""

import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from jaxsafety.config.told import is_told
from jaxsafety.engine import hosts
from jaxsafety.rundir import checkpoint, manifest_file, signals
from tests.disturbed import MAIN, assert_same_run, assert_same_toy, finish, is_prefix, launch, wait_until

# Lanes that draw numbers, through the real loop, in as many processes as the last words say.
TOY = """
import re, sys
from contextlib import ExitStack
from pathlib import Path
import jax, jax.numpy as jnp
from jaxsafety.engine import cluster

directory, steps, coordinator, processes, process = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
place = cluster.from_flags(coordinator, int(processes), int(process))
jax.config.update("jax_num_cpu_devices", 4 // place.processes)
if place.processes > 1:
    cluster.join(place)
from jaxsafety.engine import hosts
from jaxsafety import keys
from jaxsafety.engine import loop
from jaxsafety.engine.legs import Leg
from jaxsafety.engine import programs
from jaxsafety.rundir import opening
from jaxsafety.rundir import signals
from jaxsafety.engine import sweep
from jaxsafety.types import HParams, TrainState

COLLECTIVES = r"all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
grid = programs.Grid(seeds=(4, 9, 2, 7), rows=1, strategy=sweep.resolve("sharded", seeds=4))
leg = Leg(directory, "tune", "toy", "toy", "eta_M", 0.1, steps, 2, (1, 5, 20))
one = jnp.ones(1)
points = HParams(0.1 * one)
roots = jax.vmap(keys.root)(jnp.asarray(grid.seeds))

def chunk(state, _, key, point, steps):
    def step(_, carry):
        noise = jax.random.normal(keys.at_step(key, carry.step), (200,))
        moved = {"w": carry.params["w"] + point.peak_lr * noise, "zero": -carry.params["zero"]}
        return carry.replace(step=carry.step + 1, params=moved)
    state = jax.lax.fori_loop(0, steps, step, state)
    return state, {"loss": jnp.sum(state.params["w"]), "finite": jnp.float32(1)}

def read(params, _, __):
    return {"safe/exact_match": params["w"][0], "unsafe/refused": params["w"][1]}

def start():
    # A zero with a sign is kept, too.
    state = TrainState(step=jnp.zeros((1, 4), jnp.int32), opt_state=(), finite=jnp.ones((1, 4), bool),
                       params={"w": jnp.ones((1, 4, 200)), "zero": -jnp.zeros((1, 4))})
    return programs.program(lambda lane, _, __: lane, grid=grid)(state, jnp.zeros(4), jnp.zeros(1))

def open_run(lock):
    lock.enter_context(opening.open_run(directory, {"toy": 1}))

def run():
    with signals.deferred(lambda _: None), ExitStack() as lock:
        hosts.decide(lambda: open_run(lock))
        loop.train(chunk, start, readout=(read, jnp.zeros(4)), given={}, per_seed=roots, points=points, grid=grid,
                   legs=[leg])

def main():
    try:
        run()
    except cluster.LostError as error:
        print(f"lost: {error}", file=sys.stderr)
        return 1, True
    except (ValueError, OSError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2, False
    except signals.Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.number, False
    if hosts.least(2**40 + jax.process_index()) != 2**40:
        raise SystemExit("not the least")
    mapped = sweep.over_lanes(chunk, grid.strategy, seeds=4, per_lane=2)
    program = jax.jit(mapped).lower(start(), {}, roots, points, 2).compile()
    print("collectives", re.findall(COLLECTIVES, program.as_text()))
    return 0, False

code, lost = main()
sys.stdout.flush()
cluster.leave(code, lost=lost)
sys.exit(code)
"""
STEPS = 60
ENDED_S = 60  # jax's heartbeat of 20 s, its grace, and a busy machine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script, *words, processes, flags=("", "", "")):
    """Starts the processes of one run, which words after ``words`` tell how many they are and which is which."""
    coordinator, port = "127.0.0.1", free_port()

    def one(process):
        values = (f"{coordinator}:{port}", processes, process)
        told = [word for flag, value in zip(flags, values, strict=True) for word in (flag, value) if word != ""]
        return launch(script, *words, *told, stdout=subprocess.PIPE)

    return [one(process) for process in range(processes)]


def end(started):
    """Waits for all; returns their exit codes, and what they said on either stream."""
    with ThreadPoolExecutor() as readers:  # side by side, or the pipe of one fills up and holds all back
        said = list(readers.map(lambda process: process.communicate(timeout=600), started))
    return [process.returncode for process in started], said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The toy in one process, undisturbed."""
    directory = tmp_path_factory.mktemp("toy") / "whole"
    finish(TOY, directory, STEPS, "127.0.0.1:1", 1, 0)
    return directory


def checkpointed(directory):
    return checkpoint.latest(directory / "checkpoints" / "toy") or 0


def disturb(directory, number, *, victim, processes, at):
    """Sends one process of a toy a signal once a step is saved; returns exit codes, words and seconds to the end."""
    started = start(TOY, directory, STEPS, processes=processes)
    wait_until(lambda: checkpointed(directory) >= at, started[victim], poll_s=0.01)
    started[victim].send_signal(number)
    since = time.monotonic()
    codes, said = end(started)
    return codes, [err for _, err in said], time.monotonic() - since


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_leave_the_bits_of_one_and_exchange_nothing_inside_a_chunk(whole, tmp_path, processes):
    codes, said = end(start(TOY, tmp_path / "out", STEPS, processes=processes))
    assert codes == [0] * processes, said
    assert_same_toy(tmp_path / "out", whole)
    assert all("collectives []" in out for out, _ in said)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "victim"), [(2, 0), (2, 1), (4, 2)])
def test_all_end_with_a_sentence_when_one_is_killed_and_a_restart_resumes(whole, tmp_path, fault, processes, victim):
    directory = tmp_path / "out"
    codes, said, seconds = disturb(directory, signal.SIGKILL, victim=victim, processes=processes, at=STEPS // 3)
    fault(f"SIGKILL of one of {processes} processes")
    assert codes[victim] == -signal.SIGKILL and 0 not in codes and seconds < ENDED_S, (codes, seconds, said)
    for err in said:
        assert "nothing that was saved is lost, and the same command, started on all hosts again, continues" in err
    assert STEPS // 3 <= checkpointed(directory) < STEPS and is_prefix(directory, whole)
    codes, said = end(start(TOY, directory, STEPS, processes=processes))
    assert codes == [0] * processes, said
    assert_same_toy(directory, whole)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_chunk(whole, tmp_path, fault):
    directory = tmp_path / "out"
    codes, said, _ = disturb(directory, signal.SIGTERM, victim=1, processes=2, at=STEPS // 3)
    fault("SIGTERM to one of 2 processes")
    assert codes == [143, 143], said
    assert all(f"stopped by SIGTERM after step {checkpointed(directory)} of tune toy" in err for err in said)
    # What was saved by two goes on in one.
    finish(TOY, directory, STEPS, "127.0.0.1:1", 1, 0)
    assert_same_toy(directory, whole)


def test_an_error_of_the_one_that_writes_ends_all_with_its_words(tmp_path):
    (tmp_path / "out").write_text("in the way of the run directory")
    codes, said = end(start(TOY, tmp_path / "out", STEPS, processes=2))
    assert codes == [2, 2]
    assert all("refused: cannot write to the run directory" in err for _, err in said)


FLAGS = ("--coordinator", "--processes", "--process")


@pytest.mark.slow
def test_seeds_that_processes_cannot_share_are_refused(mini_yaml, tmp_path):
    words = ("pretrain", mini_yaml, "--out", tmp_path / "out", "--seeds", "[1,2,3]")
    codes, said = end(start(MAIN, *words, processes=2, flags=FLAGS))
    assert codes == [2, 2]
    assert all("seeds must be a multiple of the 2 processes, got 3" in err for _, err in said)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_that_were_not_started_alike_are_refused(mini_yaml, tmp_path):
    """Else one would train its seeds at a learning rate that the run directory does not tell."""
    port, words = free_port(), ("pretrain", mini_yaml, "--out", tmp_path / "out", "--strategy", "sharded")
    others = [[], ["--models.pretrained.lr", "0.5"]]
    told = [[f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={i}", *others[i]] for i in range(2)]
    codes, said = end([launch(MAIN, *words, *flags, stdout=subprocess.PIPE) for flags in told])
    assert codes == [2, 2], said
    assert "models.pretrained.lr is 0.5 here and 0.001 in process 0" in said[1][1]
    assert "process 1 has another recipe, command or version than process 0" in said[0][1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_processes_with_unequal_devices_are_refused(mini_yaml, tmp_path):
    port, words = free_port(), ("pretrain", mini_yaml, "--out", tmp_path / "out")
    one_core = f"import os\nos.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})\n{MAIN}"
    told = [[f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={i}"] for i in range(2)]
    pairs = zip((MAIN, one_core), told, strict=True)
    started = [launch(script, *words, "--seeds", "[1,2,3,4]", *flags) for script, flags in pairs]
    codes, said = end(started)
    assert codes == [2, 2], said
    assert all("every process must have as many devices, got [2, 1]" in err for _, err in said)


@pytest.mark.slow
def test_a_whole_run_in_two_processes_is_that_of_one(finished_run, mini_yaml, tmp_path, cache_directory):
    words = ("run", mini_yaml, "--out", tmp_path / "out", "--compilation_cache", cache_directory)
    codes, said = end(start(MAIN, *words, processes=2, flags=FLAGS))
    assert codes == [0, 0], said
    assert_same_run(tmp_path / "out", finished_run, ("pretrained", "sft.eta_M", "dpo.eta_S"))
    assert said[0][0] and not said[1][0], "one of them speaks"
    assert manifest_file.read_manifest(tmp_path / "out")["tune"]["processes"] == 2


@pytest.mark.parametrize(("error", "kind"), [(json.JSONDecodeError("torn", "{", 1), RuntimeError), (None, ValueError)])
def test_what_is_a_bug_of_the_first_is_no_sentence_on_the_others(monkeypatch, tmp_path, error, kind):
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_tell", lambda value: told.append(value) or value)

    def make():
        if error:
            raise error
        (tmp_path / "manifest.json").write_text("{")
        manifest_file.read_manifest(tmp_path)

    with pytest.raises(ValueError, match=r"torn|is not JSON"):
        hosts.decide(make)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(hosts, "_tell", lambda _: told[0])
    with pytest.raises(kind, match=r"torn|is not JSON") as raised:
        hosts.decide(make)
    assert is_told(raised.value) == (error is None)


def test_alone_every_function_is_the_plain_thing(tmp_path):
    tree = {"a": np.float32(-0.0), "b": np.arange(3)}
    assert hosts.is_first() and hosts.fetch(tree) == tree
    assert hosts.decide(lambda: (1, tmp_path)) == (1, tmp_path)
    assert hosts.load(lambda like: like, tree) is tree
    assert hosts.least(2**40) == 2**40 and hosts.agree({"a": 1}) is None
    with pytest.raises(KeyError):
        hosts.decide(lambda: {}["a"])
    hosts.check("here")
    with signals.deferred(lambda _: None), pytest.raises(signals.Stopped, match="stopped by SIGTERM here"):
        signal.raise_signal(signal.SIGTERM)
        hosts.check("here")
