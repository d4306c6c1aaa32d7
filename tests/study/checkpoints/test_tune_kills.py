"""``jaxsafety tune`` killed at random moments, then resumed: metrics and model of an undisturbed run, bit for bit."""

import json
import random
import signal
import time

import pytest

from jaxsafety.rundir import checkpoint
from tests.disturbed import MAIN, finish, is_prefix, kill_when, launch, send, wait_until

# A state is saved after every chunk, not every minute.
EAGER = f"from jaxsafety.study.checkpoints import tuned\ntuned._SAVE_EVERY_S = 0.0\n{MAIN}"
STEPS, KILLS = 300, 6
MODEL = "models/tuned/seed_0"


@pytest.fixture(scope="module")
def start(checkpoints, cache_directory, tmp_path_factory):
    """Starts tuning into a directory."""
    data = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = ({"prompt": f"Say {i}.", "chosen": f"{i}, as you wish.", "rejected": f"No {i} here."} for i in range(8))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def go(how, out, **options):
        sizes = ("--steps", STEPS, "--batch_size", "4", "--lora_rank", "2", "--max_tokens", "64", "--chunk_steps", "2")
        words = ("tune", checkpoints[0], "--data", data, "--method", "dpo", "--out", out, *sizes)
        return how(EAGER, *words, "--compilation_cache", cache_directory, **options)

    return go


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run undisturbed."""
    directory = tmp_path_factory.mktemp("tune") / "whole"
    start(finish, directory)
    return directory


def newest_of(directory):
    """The step of the newest state, None without one."""
    return checkpoint.latest(directory / "checkpoints" / "tuned" / "seed_0")


def assert_same(directory, whole):
    for name in ("metrics.jsonl", f"{MODEL}/model.safetensors", f"{MODEL}/tokenizer.json"):
        assert (directory / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in directory.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_tuning_killed_at_random_moments_ends_as_if_undisturbed(start, whole, tmp_path, fault, seed):
    rng, kills, torn, newest = random.Random(seed), 0, tmp_path / "torn", 0
    for kill in range(KILLS):
        # In turn: somewhere before the first chunk, and within or after a later one's save.
        further = kill % 2 * rng.randint(2, 6)

        def moment(process, further=further, newest=newest):
            if not further:
                time.sleep(rng.uniform(1, 5))
            wait_until(lambda: (newest_of(torn) or 0) >= newest + further, process)
            time.sleep(rng.uniform(0, 0.05))

        if kill_when(start(launch, torn), moment):
            fault("SIGKILL of tune")
            kills += 1
        assert not (torn / MODEL).exists() or (torn / MODEL / "model.safetensors").exists()
        assert is_prefix(torn, whole)
        newest, before = newest_of(torn) or 0, newest
        assert newest >= before
    assert kills >= KILLS - 1
    start(finish, torn)
    assert_same(torn, whole)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_continues(start, whole, tmp_path, fault):
    torn = tmp_path / "torn"
    process = start(launch, torn)
    assert send(process, lambda process: wait_until(lambda: newest_of(torn), process),
                signal.SIGTERM)  # fmt: skip
    _, told = process.communicate(timeout=120)
    fault("SIGTERM of tune")
    assert process.returncode == 143 and "the same command continues" in told
    assert 0 < newest_of(torn) < STEPS
    start(finish, torn)
    assert_same(torn, whole)
