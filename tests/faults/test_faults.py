"""Full and read-only disks, damaged files, second processes, clock jumps and signals: nothing saved is lost."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from jaxsafety.rundir import checkpoint
from tests.disturbed import LEAPING, TOY, assert_same_toy, behind, finish, launch, progress, send, wait_until

STEPS = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A toy that ran undisturbed."""
    directory = tmp_path_factory.mktemp("toy") / "whole"
    finish(TOY, directory, STEPS)
    return directory


def folder(directory):
    return directory / "checkpoints" / "toy"


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


DAMAGE = {
    "truncated file": lambda path, rng: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)]),
    "flipped bit": flip,
    "deleted file": lambda path, _: path.unlink(),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_advice_restores_the_run(whole, tmp_path, fault, kind):
    torn, rng = tmp_path / "torn", random.Random(kind)
    process = launch(TOY, torn, STEPS)
    send(process, lambda process: wait_until(lambda: (checkpoint.latest(folder(torn)) or 0) >= 8, process))
    process.communicate()
    step = checkpoint.latest(folder(torn))
    damaged = folder(torn) / f"{step:08d}"
    DAMAGE[kind](rng.choice(sorted(path for path in damaged.rglob("*") if path.is_file() and path.stat().st_size)), rng)
    fault(kind)
    _, sentence = finish(TOY, torn, STEPS, code=2)
    assert f"checkpoint {damaged} is damaged" in sentence and "remove it to continue from step" in sentence
    shutil.rmtree(damaged)
    finish(TOY, torn, STEPS)
    assert_same_toy(torn, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_chunk_and_saves_it(whole, tmp_path, fault, number, code):
    torn = tmp_path / "torn"
    process = launch(TOY, torn, STEPS)
    assert send(process, lambda process: wait_until(lambda: checkpoint.latest(folder(torn)), process), number)
    before = progress(torn)
    process.communicate(timeout=120)
    fault(number.name)
    assert process.returncode == code and not behind(before, progress(torn))
    rows = (torn / "metrics.jsonl").read_text().splitlines()
    assert f'"step": {checkpoint.latest(folder(torn))},' in rows[-1]
    finish(TOY, torn, STEPS)
    assert_same_toy(torn, whole)


@pytest.mark.faults
def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(whole, tmp_path, fault):
    torn = tmp_path / "torn"
    process = launch(TOY, torn, STEPS)
    wait_until(lambda: checkpoint.latest(folder(torn)), process)
    process.send_signal(signal.SIGSTOP)
    _, sentence = finish(TOY, torn, STEPS, code=2)
    fault("second process")
    assert f"is in use by another process ({process.pid})" in sentence
    process.kill()
    process.communicate()
    finish(TOY, torn, STEPS)
    assert_same_toy(torn, whole)


@pytest.mark.faults
def test_the_wall_clock_may_leap(whole, tmp_path, fault):
    """In every save the clock leaps by months, and between two starts every file is years older or younger."""
    torn, rng = tmp_path / "torn", random.Random(0)
    process = launch(TOY, torn, STEPS)
    send(process, lambda process: wait_until(lambda: (checkpoint.latest(folder(torn)) or 0) >= 8, process))
    process.communicate()
    for path in torn.rglob("*"):
        seconds = time.time() + rng.uniform(-1e9, 1e9)
        subprocess.run(["touch", "-h", "-d", f"@{seconds:.0f}", path], check=True)
    fault("clock jump between starts")
    finish(LEAPING + TOY, torn, STEPS)
    fault("clock jumps in saves")
    assert_same_toy(torn, whole)


# A file system of its own, so that a full and a read-only one are the kernel's own, for root too.
MOUNTED = """
set -e
mount -t tmpfs -o size="$1" tmpfs "$2"
"$3" -c "$4" "$2/torn" 8
mount -o remount,"$5" "$2"
"$3" -c "$4" "$2/torn" "$6" && exit 9
mount -o remount,rw,size=64m "$2"
"$3" -c "$4" "$2/torn" "$6"
cp -r "$2/torn" "$7"
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "option", "sentence"),
    [
        ("full disk", "size=300k", "No space left on device"),
        ("read-only disk", "ro", "Read-only file system"),
    ],
)
def test_a_run_continues_after_a_full_or_a_read_only_disk(whole, tmp_path, fault, kind, option, sentence):
    unshare = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own")
    (tmp_path / "disk").mkdir()
    words = ["64m", tmp_path / "disk", sys.executable, TOY, option, STEPS, tmp_path / "torn"]
    command = [*unshare, "sh", "-c", MOUNTED, "sh", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    fault(kind)
    assert done.returncode == 0, done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert_same_toy(tmp_path / "torn", whole)
