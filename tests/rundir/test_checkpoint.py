"""Checkpoints come back bit for bit or not at all, whatever happens to the process, the disk or the files."""

import importlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsafety.rundir import checkpoint
from jaxsafety.types import TrainState

_SEEDS = 3
_LEAF = 5_000  # values in the largest leaf: Orbax writes it to a file of its own, as it does real ones


def _state(fill: float = 0.0) -> TrainState:
    """A stacked training state with optax's namedtuples and EmptyState, and values that equality would let pass."""
    values = jax.random.normal(jax.random.key(0), (_SEEDS, _LEAF)) + fill
    params = {
        "embed": values.at[0, :3].set(jnp.array([jnp.nan, -0.0, jnp.inf])),
        "blocks": {"norm": jnp.full((_SEEDS, 2, 4), 1 / 3, jnp.bfloat16), "none": jnp.zeros((_SEEDS, 0, 4))},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return TrainState(
        step=jnp.full((_SEEDS,), 7, jnp.int32),
        params=params,
        opt_state=(jax.vmap(tx.init)(params), None),
        finite=jnp.array([True, False, True]),
    )


def _same_bits(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in pairs
    )


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = _state()
    checkpoint.save(tmp_path, state, step=7)
    loaded, step = checkpoint.load(tmp_path, _state(fill=1.0))
    assert step == 7
    assert _same_bits(loaded, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_shapes_and_paths_are_enough_to_load(tmp_path):
    fields = vars(_state())
    checkpoint.save(tmp_path, _state(), step=7)
    loaded, _ = checkpoint.load(tmp_path, jax.eval_shape(lambda: fields))
    assert _same_bits(loaded, fields)


def test_scalars_keep_their_dtype(tmp_path):
    tree = {"count": jnp.int32(3), "finite": jnp.bool_(True), "scale": jnp.bfloat16(0.1), "host": np.float32(2.5)}
    checkpoint.save(tmp_path, tree, step=0)
    loaded, _ = checkpoint.load(tmp_path, tree)
    assert _same_bits(loaded, tree)


def test_leaves_go_where_like_says(tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ("seeds",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("seeds"))
    tree = {"sharded": jnp.arange(8.0), "plain": jnp.arange(3.0)}
    checkpoint.save(tmp_path, tree, step=1)
    like = {"sharded": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding), "plain": tree["plain"]}
    loaded, _ = checkpoint.load(tmp_path, like)
    assert loaded["sharded"].sharding == sharding
    assert not loaded["plain"].committed
    assert _same_bits(loaded, tree)
    checkpoint.save(tmp_path, loaded, step=2)
    assert _same_bits(checkpoint.load(tmp_path, tree)[0], tree)


def test_a_loaded_state_can_be_donated(tmp_path):
    state = _state()
    checkpoint.save(tmp_path, state, step=7)
    loaded, _ = checkpoint.load(tmp_path, state)
    advance = jax.jit(lambda state: state.replace(step=state.step + 1), donate_argnums=0)
    assert _same_bits(advance(advance(loaded)), state.replace(step=state.step + 2))


def test_only_the_newest_are_kept(tmp_path):
    assert checkpoint.steps(tmp_path / "absent") == []
    assert checkpoint.latest(tmp_path) is None
    for step in (50, 100, 150, 123_456_789):
        checkpoint.save(tmp_path, {"a": jnp.full((2,), step)}, step=step, keep=3)
    assert checkpoint.steps(tmp_path) == [100, 150, 123_456_789]
    assert checkpoint.latest(tmp_path) == 123_456_789
    loaded, step = checkpoint.load(tmp_path, {"a": jnp.zeros((2,), jnp.int32)}, step=100)
    assert step == 100
    assert loaded["a"].tolist() == [100, 100]


def test_unfinished_saves_are_ignored_and_cleaned(tmp_path):
    tree = {"a": jnp.ones((2,))}
    checkpoint.save(tmp_path, tree, step=1)
    leftover = tmp_path / ".unfinished" / "new"
    shutil.copytree(tmp_path / "00000001", leftover)
    (tmp_path / "notes").mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.save(tmp_path, tree, step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002", "notes"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    checkpoint.save(tmp_path, {"a": jnp.zeros((2,))}, step=1)
    checkpoint.save(tmp_path, {"a": jnp.ones((2,))}, step=1)
    assert checkpoint.load(tmp_path, {"a": jnp.zeros((2,))})[0]["a"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.zeros((3,)), "b": jnp.zeros(())}, r"a: found float32\[2\], expected float32\[3\]$"),
        ({"a": jnp.zeros((2,), jnp.bfloat16), "b": jnp.zeros(())}, r"a: found float32\[2\], expected bfloat16\[2\]$"),
        ({"a": jnp.zeros((2,))}, r"b: found float32\[\], expected nothing$"),
        ({"a": jnp.zeros((2,)), "b": {"c": jnp.zeros(())}}, r"b: .* nothing; b/c: found nothing, expected float32\[\]"),
        ({str(i): jnp.zeros(()) for i in range(9)}, r"and 6 more$"),
    ],
)
def test_another_structure_is_refused_naming_both_sides(tmp_path, like, message):
    checkpoint.save(tmp_path, {"a": jnp.zeros((2,)), "b": jnp.zeros(())}, step=1)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path, like)


def test_leaps_of_the_wall_clock_do_not_fail_a_save(tmp_path, monkeypatch):
    clock, leaps = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: max(clock() + leaps.uniform(-1e9, 3e9), 1.0))
    for step in range(5):
        checkpoint.save(tmp_path, _state(fill=step), step=step)
        assert _same_bits(checkpoint.load(tmp_path, _state())[0], _state(fill=step))


def test_bad_arguments_are_refused(tmp_path):
    tree = {"a": jnp.zeros((2,))}
    for arguments in ({"step": -1}, {"step": 1, "keep": 0}):
        with pytest.raises(ValueError, match="step >= 0 and keep >= 1"):
            checkpoint.save(tmp_path, tree, **arguments)
    with pytest.raises(ValueError, match="same path"):
        checkpoint.save(tmp_path, {"a/b": tree["a"], "a": {"b": tree["a"]}}, step=1)
    with pytest.raises(ValueError, match=r"no checkpoint in .* are none"):
        checkpoint.load(tmp_path, tree)
    checkpoint.save(tmp_path, tree, step=1)
    with pytest.raises(ValueError, match=r"no checkpoint of step 2 in .* are 1"):
        checkpoint.load(tmp_path, tree, step=2)


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(content)


_DAMAGE = {
    "first": lambda path: _flip(path, 0),
    "middle": lambda path: _flip(path, path.stat().st_size // 2),
    "last": lambda path: _flip(path, -1),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", _DAMAGE.values(), ids=_DAMAGE)
def test_damage_to_any_file_is_harmless_or_refused(tmp_path, damage):
    state = _state()
    checkpoint.save(tmp_path / "good", state, step=7)
    refused = []
    for index, file in enumerate(path for path in _files(tmp_path / "good") if path.stat().st_size):
        copy = tmp_path / str(index)
        shutil.copytree(tmp_path / "good", copy)
        damage(copy / file.relative_to(tmp_path / "good"))
        try:
            loaded, _ = checkpoint.load(copy, state)
        except ValueError as error:
            assert f"checkpoint {copy / '00000007'} is damaged" in str(error)
            assert "\n" not in str(error)
            refused.append(file)
        else:
            assert _same_bits(loaded, state)
    assert refused == [path for path in _files(tmp_path / "good") if path.stat().st_size]


def test_a_foreign_file_is_refused(tmp_path):
    checkpoint.save(tmp_path, {"a": jnp.zeros((2,))}, step=1)
    (tmp_path / "00000001" / "state" / "extra").write_text("x")
    with pytest.raises(ValueError, match="file state/extra is foreign"):
        checkpoint.load(tmp_path, {"a": jnp.zeros((2,))})


def test_values_that_orbax_reads_otherwise_are_refused(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"a": jnp.zeros((4,)), "b": jnp.zeros((4,))}, step=1)
    read = checkpoint.ocp.load
    monkeypatch.setattr(checkpoint.ocp, "load", lambda *args: read(*args) | {"b": -np.zeros((4,), np.float32)})
    with pytest.raises(ValueError, match="b has other values than were saved"):
        checkpoint.load(tmp_path, {"a": jnp.zeros((4,)), "b": jnp.zeros((4,))})


def test_an_edited_record_is_refused(tmp_path):
    checkpoint.save(tmp_path, {"a": jnp.zeros((4,))}, step=1)
    file = tmp_path / "00000001" / "digests.json"
    record = json.loads(file.read_text())
    record["types"]["a"] = "float32[5]"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"digests\.json is altered"):
        checkpoint.load(tmp_path, {"a": jnp.zeros((5,))})


def test_an_intact_earlier_checkpoint_is_offered(tmp_path):
    state = _state()
    for step in (100, 150, 200):
        checkpoint.save(tmp_path, state, step=step, keep=3)
    (tmp_path / "00000200" / "digests.json").unlink()
    with pytest.raises(ValueError, match=r"00000200 is damaged .*: remove it to continue from step 150 "):
        checkpoint.load(tmp_path, state)
    for step in (100, 150):
        (tmp_path / f"{step:08d}" / "digests.json").write_text("{}")
    with pytest.raises(ValueError, match=f"00000200 is damaged .*: remove {tmp_path}, .* again from the start$"):
        checkpoint.load(tmp_path, state)
    # No other step replaces the one that was asked for.
    with pytest.raises(ValueError, match=r"00000150 is damaged \(file digests.json is unreadable\)$"):
        checkpoint.load(tmp_path, state, step=150)
    assert checkpoint.steps(tmp_path) == [100, 150, 200]


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot save checkpoint .*file/run/00000001 \(Not a directory\)"):
        checkpoint.save(tmp_path / "file" / "run", {"a": jnp.zeros((2,))}, step=1)


_FULL_DISK = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from jaxsafety.rundir import checkpoint

directory, limit, reserve = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "reserve"
state = {f"w{i}": np.random.default_rng(i).normal(size=(8, 4000)) for i in range(6)}
checkpoint.save(directory, state, step=1)
if not reserve:
    checkpoint._reserve = lambda scratch, size: None
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    checkpoint.save(directory, state, step=2)
except OSError as error:
    print(error)
print(sorted(os.listdir(directory)))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
loaded = checkpoint._read(directory / "00000001", state)
assert all(np.array_equal(loaded[name], state[name]) for name in state)
checkpoint.save(directory, state, step=2)
print(checkpoint.steps(directory))
"""


@pytest.mark.parametrize(
    ("limit", "reserve"),
    [(100_000, "reserve"), *(pytest.param(n, "-", marks=pytest.mark.slow) for n in (100_000, 500))],
)
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, limit, reserve):
    result = _run(_FULL_DISK, tmp_path, limit, reserve)
    message, entries, steps = result.stdout.splitlines()
    assert message.startswith(f"cannot save checkpoint {tmp_path / '00000002'} (File too large): free some space")
    assert steps == "[1, 2]"
    if reserve == "reserve":
        assert entries == "['00000001']"
        assert result.stderr == ""
    else:  # TensorStore's threads outlive the failed save: what they write late is the next save's to delete
        assert entries in ("['00000001']", "['.unfinished', '00000001']")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["00000001", "00000002"]


_SAVE_FOREVER = """
import sys
from itertools import count
from pathlib import Path
import numpy as np
from jaxsafety.rundir import checkpoint

print("ready", flush=True)
for step in count(int(sys.argv[2])):
    checkpoint.save(Path(sys.argv[1]), {"a": np.full((50_000,), step), "b": np.full((3,), step, np.int32)}, step=step)
"""


@pytest.mark.slow
def test_kills_at_random_moments_leave_a_good_checkpoint(tmp_path):
    like = {"a": np.zeros((50_000,), np.int64), "b": np.zeros((3,), np.int32)}
    checkpoint.save(tmp_path, like, step=0)
    delays = random.Random(0)
    interrupted = 0
    for _ in range(6):
        first = checkpoint.latest(tmp_path) + 1
        command = [sys.executable, "-c", _SAVE_FOREVER, str(tmp_path), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(delays.uniform(0.05, 0.4))
            process.send_signal(signal.SIGKILL)
        interrupted += (tmp_path / ".unfinished").exists()
        for step in checkpoint.steps(tmp_path):
            loaded = checkpoint._read(tmp_path / f"{step:08d}", like)
            assert np.all(loaded["a"] == step) and np.all(loaded["b"] == step)
    assert checkpoint.latest(tmp_path) > 0
    assert interrupted > 0


def test_orbax_still_keeps_its_count_of_processes_where_one_of_several_hosts_must_change_it(monkeypatch):
    """What breaks if it does not: a save of a run of several hosts, whose other processes would be waited for."""
    multihost = importlib.import_module("orbax.checkpoint.experimental.v1._src.synchronization.multihost")
    monkeypatch.setattr(multihost, "process_count", lambda: 3)
    with checkpoint._sole():
        assert multihost.process_count() == 1
    assert multihost.process_count() == 3
    monkeypatch.setitem(sys.modules, "orbax.checkpoint.experimental.v1._src.synchronization", None)
    with pytest.raises(ImportError, match="keeps its count of processes elsewhere"), checkpoint._sole():
        pass
