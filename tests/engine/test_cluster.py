"""Where a process stands among those of its run: from flags, and from what launchers set."""

import socket
import sys

import pytest

from jaxsafety.engine import cluster
from jaxsafety.engine.cluster import Place
from tests.disturbed import MAIN, launch

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, Place("slurm", 4, 1)),
        # A batch script without srun, and a task of an array job.
        (SLURM | {"SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Place("ompi", 2, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, Place("k8s", None, None)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "many", "SLURM_PROCID": "0"}, None),
    ],
)
def test_a_launcher_tells_where_a_process_stands(environment, place):
    assert cluster.from_environment(environment) == place


def test_flags_tell_it_where_no_launcher_does():
    assert cluster.from_flags(None, None, None) is None
    assert cluster.from_flags("node1:5000", 2, 1) == Place("flags", 2, 1, "node1:5000")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("node1:5000", 2, None), "--coordinator, --processes, --process go together, and --process is missing"),
        ((None, 2, None), "--coordinator and --process is missing"),
        (("node1", 2, 0), "--coordinator must be HOST:PORT of process 0, such as node1:5000, got 'node1'"),
        (("node1:0", 2, 0), "must be HOST:PORT"),
        (("node1:70000", 2, 0), "must be HOST:PORT"),
        (("node1:5000", 2, 2), r"--process must be in \[0, --processes\), got 2 of 2"),
        (("node1:5000", 0, 0), "got 0 of 0"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message):
    with pytest.raises(ValueError, match=message):
        cluster.from_flags(*flags)


def test_a_pod_without_the_kubernetes_package_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ImportError, match=r'pip install "jax\[k8s\]", or name --coordinator'):
        cluster.join(Place("k8s", None, None))


# Joins in seconds what waits for minutes.
ALONE = """
import sys
from jaxsafety.cli.main import main
from jaxsafety.engine import cluster
cluster._START_S = 2
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_whose_others_do_not_come_ends_and_says_so(mini_yaml, tmp_path, process):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    words = ("--out", tmp_path / "out", "--coordinator", coordinator, "--processes", 2, "--process", process)
    alone = launch(ALONE, "pretrain", mini_yaml, "--strategy", "auto", *words)
    _, err = alone.communicate(timeout=120)
    assert alone.returncode != 0
    assert f"process {process} of 2 of this run was ended before all had met" in err
    assert f"see that process 0 can be reached at {coordinator}" in err and "nothing that was saved" not in err


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_MCA_orte_hnp_uri"),
        pytest.param({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_JOB_ID", marks=pytest.mark.slow),
    ],
)
def test_a_launcher_that_tells_too_little_is_one_sentence(mini_yaml, tmp_path, monkeypatch, environment, missing):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process = launch(MAIN, "pretrain", mini_yaml, "--out", tmp_path / "out")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err and "was ended" not in err
    assert f"{missing}, by which jax finds the others, is not set: name --coordinator" in err


def test_a_process_by_itself_just_goes_on():
    cluster.leave(3, lost=False)
