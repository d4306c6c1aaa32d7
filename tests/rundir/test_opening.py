"""The run directory survives kills, full disks and second processes, and says what is wrong in one sentence."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxsafety.config import yaml12
from jaxsafety.rundir import atomic, flock, machine, manifest_file, metrics_file, opening

_CONFIG = {
    "seeds": [0, 1],
    "train": {"steps": 100, "peak_lr": 3e-4, "bound": math.inf, "clip": None},
    "methods": [{"name": "sft"}, {"name": "dpo", "beta": 0.1}],
    "safe": True,
}
_YAML = yaml.safe_dump(_CONFIG, sort_keys=False)


def _open(directory: Path, config: dict) -> None:
    with opening.open_run(directory, config):
        pass


def _edited(**fields) -> dict:
    return {**_CONFIG, "train": {**_CONFIG["train"], **fields}}


def test_opening_creates_the_directory_and_records_the_configuration(tmp_path):
    run = tmp_path / "a" / "b"
    with opening.open_run(run, _CONFIG) as directory:
        assert directory == run
        assert (run / "config.yaml").read_text() == _YAML
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.yaml"]


@pytest.mark.parametrize(
    "recorded",
    [
        _YAML,
        "# by hand\n" + yaml.safe_dump(_CONFIG, default_flow_style=True),
        _YAML.replace("0.0003", "3e-4"),
        _YAML.replace("  clip: null\n", ""),
    ],
)
def test_the_same_configuration_is_accepted_in_any_notation(tmp_path, recorded):
    (tmp_path / "config.yaml").write_text(recorded)
    _open(tmp_path, {**_CONFIG, "seeds": (0, 1)})
    assert (tmp_path / "config.yaml").read_text() == recorded


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (_edited(steps=200), "train.steps is 100 there and 200 here"),
        (_edited(peak_lr=1e-3), "train.peak_lr is 0.0003 there and 0.001 here"),
        (_edited(bound=None), "train.bound is inf there and None here"),
        (_edited(extra="x"), "train.extra is None there and 'x' here"),
        ({**_CONFIG, "seeds": [0, 1, 2]}, "seeds is [0, 1] there and [0, 1, 2] here"),
        ({**_CONFIG, "safe": 1}, "safe is True there and 1 here"),
        ({**_CONFIG, "methods": [{"name": "sft"}]}, "methods.1.beta is 0.1 there and None here; methods.1.name is"),
    ],
)
def test_another_configuration_is_refused_naming_both_sides(tmp_path, config, difference):
    _open(tmp_path, _CONFIG)
    with pytest.raises(ValueError) as error:
        _open(tmp_path, config)
    assert difference in str(error.value)
    assert "choose another output directory (--out)" in str(error.value)
    assert (tmp_path / "config.yaml").read_text() == _YAML
    _open(tmp_path, _CONFIG)


def test_what_is_free_may_change_and_what_grows_may_only_be_added(tmp_path):
    def record(**config):
        return opening.record_config(tmp_path / "c.yaml", config, grows="a|b", free="f|g")

    assert [record(a=0, f=1, n=2), record(a=0, f=1, n=2)] == [False, False]
    assert record(a=3, f=[4], b=False, n=2) and yaml12.load((tmp_path / "c.yaml").read_text())["f"] == [4]
    for changed in ({"a": 5}, {"b": True}, {"n": 3}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            record(**{"a": 3, "f": [4], "b": False, "n": 2} | changed)


def test_a_command_that_began_nothing_leaves_nothing(tmp_path):
    def run(directory, *, begun):
        with opening.unused_dropped(directory, ("one", "below/two"), begun=lambda: begun):
            (directory / "below").mkdir(parents=True)
            for name in ("one", "below/two"):
                (directory / name).touch()
            raise ValueError("bad input")

    for begun in (False, True):
        with pytest.raises(ValueError, match="bad input"):
            run(tmp_path / "new", begun=begun)
        assert (tmp_path / "new").exists() == begun
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "one").write_text("kept")
    with pytest.raises(ValueError, match="bad input"):
        run(tmp_path / "old", begun=False)
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["one"]


def test_at_most_five_differences_are_named(tmp_path):
    _open(tmp_path, {f"field_{i}": 0 for i in range(8)})
    with pytest.raises(ValueError, match=r"field_4 is 0 there and 1 here; and 3 more\)"):
        _open(tmp_path, {f"field_{i}": 1 for i in range(8)})


@pytest.mark.parametrize("recorded", ["- a\n- b\n", "a: [", ""])
def test_a_config_file_that_is_none_is_refused(tmp_path, recorded):
    (tmp_path / "config.yaml").write_text(recorded)
    with pytest.raises(ValueError, match=r"config\.yaml is not (YAML|a configuration): remove it if .*, else choose"):
        _open(tmp_path, _CONFIG)


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"cannot write to the run directory .*{name} \(.*\): choose another$"):
        _open(tmp_path / name, _CONFIG)


_HOLD = """
import sys, time
from pathlib import Path
from jaxsafety.rundir import opening

with opening.open_run(Path(sys.argv[1]), {"a": 1}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_is_exclusive_and_ends_with_a_killed_process(tmp_path):
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by another process \({process.pid}\)"):
            _open(tmp_path, {"a": 1})
        process.send_signal(signal.SIGKILL)
    _open(tmp_path, {"a": 1})


def test_an_error_inside_releases_the_lock(tmp_path):
    with pytest.raises(KeyError), opening.open_run(tmp_path, _CONFIG):
        raise KeyError
    _open(tmp_path, _CONFIG)


def test_atomic_write_replaces_or_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    atomic.atomic_write(path, "old")
    atomic.atomic_write(path, b"new")
    assert path.read_text() == "new"
    (tmp_path / "taken").mkdir()
    for target in (tmp_path / "taken", path / "below", tmp_path / "absent" / "file"):
        with pytest.raises(OSError, match=rf"cannot write {target} \("):
            atomic.atomic_write(target, "x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "taken"]


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "link").symlink_to("file")
    atomic.atomic_write(tmp_path / "link", "a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "a"
    end, other = os.pipe()
    atomic.atomic_write(Path(f"/dev/fd/{other}"), "b")
    assert os.read(end, 9) == b"b"
    os.close(end)
    os.close(other)


_KILLED_IN_A_WRITE = """
import os, signal, sys
from pathlib import Path
from jaxsafety.rundir import atomic

atomic.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
atomic.atomic_write(Path(sys.argv[1]), "new")
"""


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_what_a_kill_leaves_of_a_write_goes_with_the_next_one(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / ".foreign.tmp").touch()
    for _ in range(2):
        command = [sys.executable, "-c", _KILLED_IN_A_WRITE, str(tmp_path / "a")]
        assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    leftovers = set(_names(tmp_path)) - {"a", ".foreign.tmp"}
    assert len(leftovers) == 1 and (tmp_path / "a").read_text() == "old"
    atomic.atomic_write(tmp_path / "b", "b")
    assert _names(tmp_path) == [".foreign.tmp", "a", "b"]


@pytest.mark.parametrize("moment", ["flock", "fsync"])
def test_a_file_that_is_being_written_is_not_a_leftover(tmp_path, monkeypatch, moment):
    """Another process writes to the directory, before and after the new file is locked."""
    module, name = {"flock": (flock.fcntl, "flock"), "fsync": (atomic.os, "fsync")}[moment]
    call, others = getattr(module, name), iter(["b", "c"])

    def meanwhile(*arguments):
        if other := next(others, None):
            atomic.atomic_write(tmp_path / other, other)
        return call(*arguments)

    monkeypatch.setattr(module, name, meanwhile)
    atomic.atomic_write(tmp_path / "a", "a")
    assert [(name, (tmp_path / name).read_text()) for name in _names(tmp_path)] == [("a", "a"), ("b", "b"), ("c", "c")]


def test_a_file_system_without_locks_can_be_written_to(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(flock.fcntl, "flock", no_locks)
    (tmp_path / ".jaxsafety-0.tmp").touch()  # whose, nobody can tell
    atomic.atomic_write(tmp_path / "a", "a")
    assert _names(tmp_path) == [".jaxsafety-0.tmp", "a"] and (tmp_path / "a").read_text() == "a"


def test_a_system_without_locks_is_told_so_before_anything_is_written(main, mini_yaml, tmp_path, monkeypatch, capsys):
    """As on Windows, where there is no module of that name."""
    monkeypatch.setattr(flock, "fcntl", None)
    assert main("run", mini_yaml, "--out", tmp_path / "run") == 2
    assert "this system has no locks of the kind" in capsys.readouterr().err
    assert _names(tmp_path) == []


def test_what_needs_no_run_directory_is_imported_without_locks():
    script = (
        "import sys; sys.modules['fcntl'] = None; import jaxsafety.cli.main, jaxsafety.methods, jaxsafety.rundir.locks"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from jaxsafety.rundir import atomic
from jaxsafety.rundir import metrics_file

directory = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for write in (
    lambda: atomic.atomic_write(directory / "file", "x" * 1000),
    lambda: metrics_file.append_metrics(directory, [{"step": step} for step in range(1000)]),
):
    try:
        write()
    except OSError as error:
        print(error)
"""


def test_a_full_disk_keeps_the_old_file_and_every_whole_row(tmp_path):
    (tmp_path / "file").write_text("old")
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    sentences = result.stdout.splitlines()
    assert [sentence.partition(" (File too large): free some space")[0] for sentence in sentences] == [
        f"cannot write {tmp_path / 'file'}",
        f"cannot write {tmp_path / 'metrics.jsonl'}",
    ]
    assert result.stderr == ""
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "metrics.jsonl"]
    rows = metrics_file.read_metrics(tmp_path)
    assert rows == [{"step": step} for step in range(len(rows))]
    assert rows


def test_manifest_fields_are_merged(tmp_path):
    manifest_file.write_manifest(tmp_path, {"seconds": {"pretrain": 1.5}, "seeds": [1], "path": Path("a")})
    manifest_file.write_manifest(tmp_path, {"seconds": {"tune": np.float32(2.5), "bad": math.nan}, "seeds": [2]})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "seconds": {"pretrain": 1.5, "tune": 2.5, "bad": None},
        "seeds": [2],
        "path": "a",
    }
    for content, what in (("{", "JSON"), ("[]", "a manifest")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=rf"manifest\.json is not {what}: move it away"):
            manifest_file.write_manifest(tmp_path, {})


def test_environment_is_plain_data_with_every_version():
    facts = json.loads(json.dumps(machine.environment()))
    assert set(facts) == {"jaxsafety", "revision", "python", "packages", "platform", "cpu", "devices"}
    assert set(facts["packages"]) == {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert all(facts["packages"].values())
    assert facts["cpu"]["count"] >= 1
    assert facts["cpu"]["model"]
    assert facts["devices"][0].startswith("cpu:0")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_revision_is_only_that_of_a_checkout_that_tracks_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    file = tmp_path / "module.py"
    file.write_text("a = 1\n")
    assert machine._revision(file) is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "empty")
    assert machine._revision(file) is None
    git("add", "module.py")
    git("commit", "-q", "-m", "module")
    git("tag", "-a", "v1", "-m", "v1")
    assert machine._revision(file) == git("rev-parse", "HEAD")
    file.write_text("a = 2\n")
    assert machine._revision(file) == git("rev-parse", "HEAD") + "-dirty"


def test_metrics_are_json_lines_with_null_for_what_is_not_finite(tmp_path):
    assert metrics_file.read_metrics(tmp_path) == []
    metrics_file.append_metrics(
        tmp_path, [{"step": 1, "loss": math.inf}, {"step": np.int32(2), "loss": np.float32("nan")}]
    )
    metrics_file.append_metrics(tmp_path, ({"step": 3, "loss": np.array([0.5, -math.inf])} for _ in range(1)))
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": null}\n{"step": 2, "loss": null}\n{"step": 3, "loss": [0.5, null]}\n'
    )
    assert [row["step"] for row in metrics_file.read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("torn", ['{"step": 2', '{"step": 2}', '{"a": "\xc3'])
def test_a_torn_last_line_is_ignored_and_overwritten(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn.encode("latin-1"))
    assert metrics_file.read_metrics(tmp_path) == [{"step": 1}]
    metrics_file.append_metrics(tmp_path, [{"step": 3}])
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    path.write_bytes(torn.encode("latin-1"))
    metrics_file.append_metrics(tmp_path, [{"step": 4}])
    assert path.read_text() == '{"step": 4}\n'


@pytest.mark.parametrize("line", ["{", "[1]"])
def test_a_bad_line_in_the_middle_is_refused(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is not"):
        metrics_file.read_metrics(tmp_path)


def _rows(stage: str, method: str | None, steps: range) -> list[dict]:
    return [{"stage": stage, "method": method, "step": step, "loss": 1 / (step + 1)} for step in steps]


@pytest.mark.parametrize("method", ["dpo", None])
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path, method):
    path = tmp_path / "metrics.jsonl"
    before = [*_rows("pretrain", None, range(9)), {"stage": "tune", "note": "no step"}]
    if method is not None:
        before += _rows("tune", "sft", range(9))
    metrics_file.append_metrics(tmp_path, before + _rows("tune", method, range(9)))
    uninterrupted = path.read_bytes()
    path.write_bytes(uninterrupted[:-30])
    metrics_file.truncate_metrics(tmp_path, of=[{"stage": "tune", "method": method}], after_step=4)
    assert metrics_file.read_metrics(tmp_path) == before + _rows("tune", method, range(5))
    metrics_file.append_metrics(tmp_path, _rows("tune", method, range(5, 9)))
    assert path.read_bytes() == uninterrupted


def test_truncating_nothing_is_no_error(tmp_path):
    metrics_file.truncate_metrics(tmp_path, of=[{"stage": "tune"}], after_step=4)
    assert list(tmp_path.iterdir()) == []


def test_importing_does_not_import_jax():
    script = "import sys, jaxsafety.rundir.opening; print(sorted({'jax', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "[]\n"


def test_an_edited_input_file_is_noticed(tmp_path):
    opening.keep_files(tmp_path / "grammars", {"safe.pcfg": "v -> 'a' [1.0]"})
    opening.keep_files(tmp_path / "grammars", {"safe.pcfg": "v -> 'a' [1.0]"})
    with pytest.raises(ValueError, match=r"safe\.pcfg has changed since this run began: choose another directory"):
        opening.keep_files(tmp_path / "grammars", {"safe.pcfg": "v -> 'b' [1.0]"})
    assert (tmp_path / "grammars" / "safe.pcfg").read_text() == "v -> 'a' [1.0]"


def test_a_damaged_copy_of_an_input_file_may_be_removed(tmp_path):
    kept = tmp_path / "safe.pcfg"
    kept.write_bytes(b"v -> '\xff")
    with pytest.raises(ValueError, match=r"safe\.pcfg has changed .*; or if that copy is damaged, remove it$"):
        opening.keep_files(tmp_path, {"safe.pcfg": "v -> 'a' [1.0]"})
    kept.unlink()
    opening.keep_files(tmp_path, {"safe.pcfg": "v -> 'a' [1.0]"})
    assert kept.read_text() == "v -> 'a' [1.0]"
