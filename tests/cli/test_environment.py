"""The command where others run it: strict warnings, no terminal, no home, 64 bits, a reader that leaves."""

import os
import subprocess
import sys

import polars as pl
import pytest

from tests.study.checkpoints.conftest import checkpoints, encoder, params  # noqa: F401

SCRIPT = "import sys\nfrom jaxsafety.cli.main import main\nsys.exit(main())"
ENVIRONMENTS = {
    "warnings": {"PYTHONWARNINGS": "error"},
    "terminal": {"TERM": "dumb", "COLUMNS": "20"},
    "home": {"HOME": "/proc/nobody", "XDG_CACHE_HOME": "/proc/nobody"},
    "wide": {"JAX_ENABLE_X64": "1"},
    "locale": {"LC_ALL": "C", "PYTHONUTF8": "0"},
}


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )  # fmt: skip


def measured(run):
    return pl.read_parquet(run / "results" / "analyze.parquet").drop("run", "revision")


@pytest.fixture(scope="module")
def plain(checkpoints, tmp_path_factory):  # noqa: F811
    run = tmp_path_factory.mktemp("plain") / "run"
    assert command("analyze", "weights", *checkpoints, "--out", run).returncode == 0
    return measured(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_same_comes_out_everywhere(checkpoints, plain, tmp_path, name):  # noqa: F811
    done = command("analyze", "weights", *checkpoints, "--out", tmp_path / "run", **ENVIRONMENTS[name])
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and ("are not kept" in done.stderr) == (name == "home")
    assert done.stdout.rstrip().endswith("report.html")
    found = measured(tmp_path / "run")
    assert found.drop("value").equals(plain.drop("value"))
    # In 64 bits only what is not in 32 anyway rounds otherwise.
    near = pytest.approx(plain["value"].to_list(), rel=1e-3, abs=1e-5, nan_ok=True)
    assert found["value"].to_list() == near if name == "wide" else found.equals(plain)


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error_of_ours():
    script = f"{sys.executable} -c '{SCRIPT}' list --format json | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "[\n" and "Traceback" not in done.stderr and "bug" not in done.stderr
