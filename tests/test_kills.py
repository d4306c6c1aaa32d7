"""SIGKILL at random moments, then resume: metrics, results and parameters of an undisturbed run, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxsafety import checkpoint
from jaxsafety.report import results

MAIN = "import sys\nfrom jaxsafety.cli import main\nsys.exit(main())"
# A toy lane through the real loop: seconds a process instead of a minute.
TOY = """
import sys, time
from pathlib import Path
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 2)
from jaxsafety import keys, loop, runlog
from jaxsafety.types import HParams, TrainState

directory = Path(sys.argv[1])
grid = loop.Grid(seeds=(4, 9), points=(("eta_M", 0.1),), strategy="sharded")
leg = loop.Leg(directory, "tune", "toy", 60, 2, (1, 5, 20))

def chunk(state, key, point, steps):
    def step(_, carry):
        noise = jax.random.normal(keys.at_step(key, carry.step), (200,))
        moved = {"w": carry.params["w"] + point.peak_lr * noise}
        return carry.replace(step=carry.step + 1, params=moved)
    state = jax.lax.fori_loop(0, steps, step, state)
    return state, {"loss": jnp.sum(state.params["w"]), "finite": jnp.float32(1)}

def read(params, _, __):
    return {"safe/exact_match": params["w"][0], "unsafe/refused": params["w"][1]}

def start():
    state = TrainState(step=jnp.zeros((1, 2), jnp.int32), params={"w": jnp.ones((1, 2, 200))}, opt_state=(),
                       finite=jnp.ones((1, 2), bool))
    return loop.program(lambda lane, _, __: lane, grid=grid)(state, jnp.zeros(2), jnp.zeros(1))

one = jnp.ones(1)
with runlog.open_run(directory, {"toy": 1}, resolved_yaml="toy: 1\\n"):
    loop.train(chunk, start, readout=(read, jnp.zeros(2)), per_seed=jax.vmap(keys.root)(jnp.asarray(grid.seeds)),
               points=HParams(0.1 * one, one, one, one, one), grid=grid, legs=[leg])
"""


def launch(script, *words):
    command = [sys.executable, "-c", script, *map(str, words)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(script, *words):
    """Runs to the end; returns the seconds it took."""
    started = time.monotonic()
    process = launch(script, *words)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return time.monotonic() - started


def kill_when(process, moment):
    """Kills the process at the moment; returns whether it was still running."""
    moment(process)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


def leaves(directory, leg):
    """Digests of every leaf of a leg's last checkpoint: equal if and only if the states are, bit for bit."""
    folder = directory / "checkpoints" / leg
    path = folder / f"{checkpoint.latest(folder):08d}" / "digests.json"
    return json.loads(path.read_text())["leaves"]


def test_a_loop_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    finish(TOY, whole)
    rng, kills = random.Random(0), 0
    folder = torn / "checkpoints" / "toy"
    for _ in range(3):
        done = checkpoint.latest(folder) or 0
        target = min(done + 2 * rng.randint(1, 8), 58)

        def after_some_chunks(process, target=target):
            while process.poll() is None and (checkpoint.latest(folder) or 0) < target:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))  # anywhere in the chunk: training, metrics, checkpoint

        kills += kill_when(launch(TOY, torn), after_some_chunks)
    assert kills == 3 and checkpoint.latest(folder) < 60
    finish(TOY, torn)
    assert (torn / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert leaves(torn, "toy") == leaves(whole, "toy")


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_as_an_undisturbed_one(mini_yaml, cache_directory, tmp_path):
    def words(name):
        return ["run", mini_yaml, "--out", tmp_path / name, "--compilation_cache", cache_directory]

    finish(MAIN, *words("cold"))
    duration = finish(MAIN, *words("whole"))  # everything is compiled: how long a resumed run takes at most
    rng, kills = random.Random(1), 0
    # Starting up is a good part of a run: kills much later than this find a resumed run already at its end.
    for _ in range(6):
        kills += kill_when(launch(MAIN, *words("torn")), lambda _: time.sleep(rng.uniform(0.15, 0.5) * duration))
    assert kills >= 3
    finish(MAIN, *words("torn"))
    for name in ("cold", "torn"):
        directory, whole = tmp_path / name, tmp_path / "whole"
        assert (directory / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        assert [leaves(directory, leg) for leg in ("pretrained", "sft", "dpo")] == [
            leaves(whole, leg) for leg in ("pretrained", "sft", "dpo")
        ]
        for table in ("evaluate", "curves"):
            paths = [where / "results" / f"{table}.parquet" for where in (directory, whole)]
            # Not the revision: the checkout may be committed to while this runs.
            torn, undisturbed = (results.read_results([path]).drop("revision") for path in paths)
            assert torn.equals(undisturbed)
        assert (directory / "report.html").exists()
