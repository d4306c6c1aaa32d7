"""SIGKILL at random moments, then resume: metrics, results and parameters of an undisturbed run, bit for bit."""

import os
import random
import signal
import time
from functools import cache

import pytest

from jaxsafety.rundir import checkpoint
from tests.disturbed import (
    MAIN,
    TOY,
    assert_same_run,
    assert_same_toy,
    behind,
    end_toy,
    finish,
    is_prefix,
    kill_after_every_piece,
    kill_when,
    launch,
    progress,
    start_toy,
    toys,
)

LEGS = ("pretrained", "sft.eta_M", "sft.eta_S", "dpo.eta_M", "dpo.eta_S")
FEW, MANY = {"steps": 80, "kills": 4}, {"steps": 180, "kills": 23}


@pytest.fixture(scope="module")
def whole_toy(tmp_path_factory):
    """A toy of so many steps that ran undisturbed."""

    @cache
    def ran(steps):
        directory = tmp_path_factory.mktemp("toy") / "whole"
        finish(TOY, directory, steps)
        return directory

    return ran


def is_saving(directory):
    return any((directory / place / "toy" / ".unfinished").exists() for place in ("checkpoints", "snapshots"))


def kill_toy(server, directory, rng, *, steps, saving):
    """Kills one toy a few chunks on, anywhere in a chunk or just after a save has begun; returns what it was doing."""
    folder = directory / "checkpoints" / "toy"
    target = min((checkpoint.latest(folder) or 0) + 2 * rng.randint(1, 2), steps - 4)
    toy = start_toy(server)
    limit = time.monotonic() + 120
    while (checkpoint.latest(folder) or 0) < target or (saving and not is_saving(directory)):
        assert time.monotonic() < limit
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.03 if saving else 0.15))
    before = progress(directory)
    os.kill(toy, signal.SIGKILL)
    assert end_toy(server) == -signal.SIGKILL
    assert not behind(before, progress(directory))
    return "SIGKILL in saving" if is_saving(directory) else "SIGKILL in training"


def kill_toys(whole_toy, directory, fault, *, seed, steps, kills):
    """Kills toys of one directory over and over, then lets the last one finish."""
    rng, whole = random.Random(seed), whole_toy(steps)
    with toys(directory, steps, log=directory.with_suffix(".log")) as server:
        for kill in range(kills):
            fault(kill_toy(server, directory, rng, steps=steps, saving=kill % 2 == 1))
            assert is_prefix(directory, whole)
        assert checkpoint.latest(directory / "checkpoints" / "toy") < steps
        start_toy(server)
        assert end_toy(server) == 0
    assert_same_toy(directory, whole)


def test_a_loop_killed_at_random_moments_ends_as_an_undisturbed_one(whole_toy, tmp_path, fault):
    kill_toys(whole_toy, tmp_path / "torn", fault, seed=0, **FEW)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 10))
def test_a_loop_killed_over_and_over_ends_as_an_undisturbed_one(whole_toy, tmp_path, fault, seed):
    kill_toys(whole_toy, tmp_path / "torn", fault, seed=seed, **MANY)


@pytest.fixture(scope="module")
def whole_run(mini_yaml, cache_directory, tmp_path_factory):
    """A study that ran undisturbed, in a process of its own with everything compiled, and what starts another."""
    folder = tmp_path_factory.mktemp("study")

    def words(directory):
        return ["run", mini_yaml, "--out", directory, "--compilation_cache", cache_directory]

    finish(MAIN, *words(folder / "cold"))
    duration, _ = finish(MAIN, *words(folder / "whole"))
    assert_same_run(folder / "cold", folder / "whole", LEGS)
    return folder / "whole", words, duration


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_as_an_undisturbed_one(whole_run, tmp_path, fault):
    whole, words, duration = whole_run
    rng, kills = random.Random(1), 0
    # Starting up is a good part of a run: kills much later than this find a resumed run already at its end.
    for _ in range(6):
        if kill_when(launch(MAIN, *words(tmp_path)), lambda _: time.sleep(rng.uniform(0.15, 0.5) * duration)):
            fault("SIGKILL of a study")
            kills += 1
    assert kills >= 3
    finish(MAIN, *words(tmp_path))
    assert_same_run(tmp_path, whole, LEGS)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(3))
def test_a_study_killed_after_every_piece_ends_as_an_undisturbed_one(whole_run, tmp_path, fault, seed):
    """A kill at a random moment after each new checkpoint, snapshot and file: in every stage, the report's too."""
    whole, words, _ = whole_run
    kills = kill_after_every_piece(
        words(tmp_path), tmp_path, random.Random(seed), fault, longest=1, what="SIGKILL of a study"
    )
    assert kills >= 10
    assert_same_run(tmp_path, whole, LEGS)
