"""Processes for the fault tests: a toy lane through the real loop, whole runs of the command line, and what they leave.

``progress`` counts what is finished in a run directory; a fault may cost the running chunk and nothing of that.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from jaxsafety.rundir import checkpoint, results

# A background shell has its children ignore Ctrl-C; a terminal does not.
_TERMINAL = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
MAIN = f"{_TERMINAL}import sys\nfrom jaxsafety.cli.main import main\nsys.exit(main())"
# A toy lane through the real loop: seconds a process instead of a minute.
TOY = f"""{_TERMINAL}
import os, sys
from pathlib import Path
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 2)
from jaxsafety import keys
from jaxsafety.engine import loop
from jaxsafety.engine.legs import Leg
from jaxsafety.engine import programs
from jaxsafety.rundir import opening
from jaxsafety.rundir import signals
from jaxsafety.types import HParams, TrainState

directory, steps = Path(sys.argv[1]), int(sys.argv[2])
grid = programs.Grid(seeds=(4, 9), rows=1, strategy="sharded")
leg = Leg(directory, "tune", "toy", "toy", "eta_M", 0.1, steps, 2, (1, 5, 20))

def chunk(state, _, key, point, steps):
    def step(_, carry):
        noise = jax.random.normal(keys.at_step(key, carry.step), (200,))
        moved = {{"w": carry.params["w"] + point.peak_lr * noise}}
        return carry.replace(step=carry.step + 1, params=moved)
    state = jax.lax.fori_loop(0, steps, step, state)
    return state, {{"loss": jnp.sum(state.params["w"]), "finite": jnp.float32(1)}}

def read(params, _, __):
    return {{"safe/exact_match": params["w"][0], "unsafe/refused": params["w"][1]}}

def start():
    state = TrainState(step=jnp.zeros((1, 2), jnp.int32), params={{"w": jnp.ones((1, 2, 200))}}, opt_state=(),
                       finite=jnp.ones((1, 2), bool))
    return programs.program(lambda lane, _, __: lane, grid=grid)(state, jnp.zeros(2), jnp.zeros(1))

def run():
    one = jnp.ones(1)
    roots = jax.vmap(keys.root)(jnp.asarray(grid.seeds))
    with opening.open_run(directory, {{"toy": 1}}), signals.deferred(lambda _: None):
        loop.train(chunk, start, readout=(read, jnp.zeros(2)), given={{}}, per_seed=roots,
                   points=HParams(0.1 * one), grid=grid, legs=[leg])

def main():
    try:
        run()
    except (ValueError, OSError) as error:
        print(f"refused: {{error}}", file=sys.stderr)
        return 2
    except signals.Stopped as stop:
        return 128 + stop.number
    return 0

if sys.argv[3:] != ["forks"]:
    sys.exit(main())
# A process of its own for every line, which spares each the imports; jax starts in the child.
for _ in sys.stdin:
    child = os.fork()
    if not child:
        os._exit(main())
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# The wall clock leaps to and fro at every question, by months.
LEAPING = """
import random, time
_time, _leap = time.time, random.Random(0)
time.time = lambda: max(_time() + _leap.uniform(-1e7, 1e7), 1.0)
time.time_ns = lambda: int(time.time() * 1e9)
"""


def launch(script, *words, wrap=(), **options):
    """Starts a script; ``wrap`` are the words of a program that starts it in turn."""
    command = [*wrap, sys.executable, "-c", script, *map(str, words)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, env=env, text=True, **streams)


@contextmanager
def toys(directory, steps, *, log):
    """Yields a process that forks a toy for every line it is sent; see ``start_toy`` and ``end_toy``."""
    with log.open("w") as err, launch(
        TOY, directory, steps, "forks", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err
    ) as server:  # fmt: skip
        try:
            yield server
        finally:
            server.stdin.close()


def start_toy(server):
    """Returns the process number of a new toy."""
    server.stdin.write("\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def end_toy(server):
    """Returns the exit code of the toy, negative for a signal."""
    return int(server.stdout.readline())


def finish(script, *words, code=0, **options):
    """Runs to the end; returns the seconds it took and the last line of standard error."""
    started = time.monotonic()
    process = launch(script, *words, **options)
    _, err = process.communicate(timeout=900)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    return time.monotonic() - started, err.strip().rpartition("\n")[2]


class Killed(BaseException):
    """Ends a run in this process as a signal does that no one can catch."""


def die_before_saving(run, leg, step):
    """Calls ``run``, which dies where a leg would save the checkpoint of a step."""
    save = checkpoint.save

    def saved(folder, tree, *, step=0, keep=2, last=step):
        if (folder.parent.name, folder.name, step) == ("checkpoints", leg, last):
            raise Killed
        save(folder, tree, step=step, keep=keep)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", saved)
        run()


def send(process, moment, number=signal.SIGKILL):
    """Sends the signal at the moment; returns whether the process was still running."""
    moment(process)
    running = process.poll() is None
    process.send_signal(number)
    return running


def kill_when(process, moment):
    """Kills the process at the moment; returns whether it was still running."""
    running = send(process, moment)
    _, err = process.communicate()
    assert running or process.returncode == 0, err
    return running


def kill_after_every_piece(words, directory, rng, fault, *, longest, what):
    """Kills a command after each new checkpoint, snapshot and file, until one ends; returns how often.

    A kill comes at a random moment, at most ``longest`` seconds later; nothing that was finished may be lost.
    """
    kills = 0
    while True:
        before, process = progress(directory), launch(MAIN, *words)
        wait_until(lambda before=before: sum(progress(directory).values()) > sum(before.values()), process)
        time.sleep(rng.uniform(0, longest))
        before = progress(directory)
        if not kill_when(process, lambda _: None):
            return kills
        fault(what)
        kills += 1
        assert not behind(before, progress(directory))


def wait_until(condition, process, poll_s=0.001):
    """Waits until the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(poll_s)


def progress(directory):
    """The newest checkpoint of every leg and the number of snapshots and of result files: none may ever fall."""
    folders = sorted((directory / "checkpoints").glob("*")) if directory.exists() else []
    found = {folder.name: checkpoint.latest(folder) or 0 for folder in folders}
    found["snapshots"] = len(list((directory / "snapshots").glob("*/[0-9]*")))
    # By suffix: what is still being written ends in .tmp.
    written = (path.suffix for path in (directory / "results").rglob("*"))
    return found | {"results": sum(suffix in (".parquet", ".json") for suffix in written)}


def behind(before, after):
    """What of ``before`` is missing in ``after``."""
    return {name: (count, after.get(name, 0)) for name, count in before.items() if after.get(name, 0) < count}


def is_prefix(directory, whole):
    """Whether the whole lines of ``metrics.jsonl`` are the first of the undisturbed run's."""
    path = directory / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return (whole / "metrics.jsonl").read_bytes().split(b"\n")[: len(lines)] == lines


def leaves(directory, leg):
    """Digests of every leaf of a leg's last checkpoint: equal if and only if the states are, bit for bit."""
    folder = directory / "checkpoints" / leg
    path = folder / f"{checkpoint.latest(folder):08d}" / "digests.json"
    return json.loads(path.read_text())["leaves"]


def assert_same_toy(directory, whole):
    """Metrics, parameters and snapshots, bit for bit, and no other file left over."""
    assert (directory / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert leaves(directory, "toy") == leaves(whole, "toy")
    digests = [sorted((where / "snapshots").rglob("digests.json")) for where in (directory, whole)]
    kept = [[json.loads(path.read_text())["leaves"] for path in paths] for paths in digests]
    assert kept[0] == kept[1] and len(kept[0]) == 3
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in whole.iterdir())


def assert_same_run(directory, whole, legs):
    """Metrics, parameters, examples and every table, bit for bit."""
    for name in ("metrics.jsonl", "results/examples.json"):
        assert (directory / name).read_bytes() == (whole / name).read_bytes()
    assert [leaves(directory, leg) for leg in legs] == [leaves(whole, leg) for leg in legs]
    names = {path.relative_to(where) for where in (directory, whole) for path in (where / "results").rglob("*.*")}
    for name in sorted(names):
        if name.parent.name == "tables" and name.suffix == ".csv":
            assert (directory / name).read_bytes() == (whole / name).read_bytes()
    for table, schema in (
        ("evaluate", results.SCHEMA),
        ("curves", results.SCHEMA),
        ("analyze", results.ANALYSIS_SCHEMA),
    ):
        paths = [where / "results" / f"{table}.parquet" for where in (directory, whole)]
        # Not the revision: the checkout may be committed to while this runs.
        torn, undisturbed = (results.read_results([path], schema=schema).drop("revision") for path in paths)
        assert torn.equals(undisturbed), table
    assert (directory / "report.html").exists()
