"""Writing: all or nothing, whatever happens, and what goes along."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxsafety.formats import hf, hf_names, hf_write, safetensors_file


def test_one_file_or_several_with_an_index(tmp_path, params, config):
    hf.save(tmp_path / "one", params, config, dtype="float32")
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    hf.save(tmp_path / "many", params, config, dtype="float32", shard_bytes=8000)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    found = {}
    for file in files:
        with safe_open(tmp_path / "many" / file, "numpy") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118, not a dict
        assert all(index["weight_map"][name] == file for name in tensors)
        assert sum(array.nbytes for array in tensors.values()) <= 8000
        found |= tensors
    assert found.keys() == index["weight_map"].keys() == {slot.name for slot in hf_names.slots(config)}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())


def test_a_tensor_larger_than_a_file_may_be_gets_one_of_its_own(tmp_path, params, config):
    hf.save(tmp_path / "out", params, config, dtype="bfloat16", shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(hf_names.slots(config))
    with pytest.raises(ValueError, match="shard_bytes: got 0, expected at least 1"):
        hf.save(tmp_path / "other", params, config, dtype="bfloat16", shard_bytes=0)


def test_an_empty_directory_may_be_there_but_nothing_is_overwritten(tmp_path, params, config):
    (tmp_path / "out").mkdir()
    hf.save(tmp_path / "out", params, config, dtype="float32")
    with pytest.raises(ValueError, match="out exists and is not an empty directory: choose another"):
        hf.save(tmp_path / "out", params, config, dtype="float32")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file exists and is not an empty directory"):
        hf.save(tmp_path / "file", params, config, dtype="float32")
    hf.save(tmp_path / "new/parents/out", params, config, dtype="float32")
    assert hf.read_config(tmp_path / "new/parents/out") == config


def test_a_relative_path_will_do(tmp_path, params, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf.save(Path("out"), params, config, dtype="float32")
    assert hf.load(Path("out"), dtype="float32")[0] == config


def test_the_tokenizer_of_the_source_goes_along(tmp_path, params, config):
    source = tmp_path / "source"
    hf.save(source, params, config, dtype="float32")
    names = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"]
    names += ["merges.txt", "chat_template.jinja", "generation_config.json", "added_tokens.json"]
    for name in [*names, "README.md", "training_args.bin"]:
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("tools")
    hf.save(tmp_path / "out", params, config, dtype="float32", source=source)
    copied = {file.name for file in (tmp_path / "out").iterdir()}
    assert copied == {*names, "additional_chat_templates", "config.json", "model.safetensors"}
    assert (tmp_path / "out/tokenizer.model").read_text() == "tokenizer.model"
    assert (tmp_path / "out/additional_chat_templates/tools.jinja").read_text() == "tools"
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("other")
    (other / "generation_config.json").write_text("other")
    assert hf_write.companions(source, tokenizer=other) == [other / "tokenizer.json", source / "generation_config.json"]


def test_a_source_that_is_no_checkpoint_is_refused_before_anything_is_written(tmp_path, params, config):
    with pytest.raises(FileNotFoundError, match="source is not a directory: expected a Hugging Face checkpoint"):
        hf.save(tmp_path / "out", params, config, dtype="float32", source=tmp_path / "source")
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_refused_naming_both_sides(tmp_path, params, config):
    with pytest.raises(ValueError, match="unembed is in params but not in config: expected the same model"):
        hf.save(tmp_path / "out", params, replace(config, tied=True), dtype="float32")
    with pytest.raises(ValueError, match="blocks/attn/k_bias is in config but not in params"):
        hf.save(tmp_path / "out", params, replace(config, qkv_bias=True), dtype="float32")
    with pytest.raises(
        ValueError, match=r"blocks/mlp/gate has shape \(3, 16, 24\) in params and \(3, 16, 25\) by config"
    ):
        hf.save(tmp_path / "out", params, replace(config, mlp_width=25), dtype="float32")
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_another_shape_leaves_nothing(tmp_path, config):
    with pytest.raises(ValueError, match=r"embed_tokens.weight would be \[3, 2\], expected \[48, 16\] by config"):
        hf.write_checkpoint(tmp_path / "out", lambda *_: np.zeros((3, 2)), config=config, dtype="float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (1e6, "float16")])
def test_values_that_are_not_finite_are_not_written(tmp_path, params, config, value, dtype):
    params["blocks"]["mlp"]["up"] = params["blocks"]["mlp"]["up"].at[2, 3, 4].set(value)
    with pytest.raises(ValueError, match=f"blocks/mlp/up, layer 2, is not finite as {dtype}"):
        hf.save(tmp_path / "out", params, config, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_numpy_and_transposed_arrays_are_written_by_value(tmp_path, params, config):
    params["embed"] = np.asarray(params["embed"]).T.copy().T
    params["unembed"] = np.asfortranarray(params["unembed"])
    hf.save(tmp_path / "out", params, config, dtype="float32")
    _, back = hf.load(tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(back["embed"], params["embed"])
    np.testing.assert_array_equal(back["unembed"], params["unembed"])


@pytest.mark.parametrize("shards_before", [0, 3])
def test_a_full_disk_leaves_nothing(tmp_path, params, config, monkeypatch, shards_before):
    written = []

    def write(file, *arguments, **options):
        if len(written) == shards_before:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(file)
        original(file, *arguments, **options)

    original = safetensors_file.write
    monkeypatch.setattr(safetensors_file, "write", write)
    with pytest.raises(OSError, match=r"cannot write .*out \(No space left on device\): free some space"):
        hf.save(tmp_path / "out", params, config, dtype="float32", shard_bytes=3000)
    assert len(written) == shards_before
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_one_sentence_says_so(tmp_path, params, config):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/out \(.*\): free some space there or choose another"):
        hf.save(tmp_path / "file/out", params, config, dtype="float32")


_KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from jaxsafety.formats import hf
from jaxsafety.formats import hf_names
source, out, at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config = hf.read_config(source)
shapes = hf_names.leaf_shapes(config)
calls = 0
def read(path, layer):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.ones(shapes[path] if layer is None else shapes[path][1:], np.float32)
hf.write_checkpoint(out, read, config=config, dtype="float32", shard_bytes=3000)
"""


@pytest.mark.parametrize("at", [1, 20])
def test_what_a_killed_writer_leaves_is_no_checkpoint_and_is_cleared(tmp_path, params, config, at):
    hf.save(tmp_path / "source", params, config, dtype="float32")
    root = str(Path(hf.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "source"), str(tmp_path / "out"), str(at)]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (leftover,) = tmp_path.glob(".out.unfinished-*")
    hf.save(tmp_path / "out", params, config, dtype="float32")
    assert not leftover.exists()
    assert hf.open_checkpoint(tmp_path / "out").config == config


def test_a_writer_at_work_is_left_alone(tmp_path, params, config):
    seen = []

    def read(path, layer):
        if not seen:
            seen.extend(tmp_path.glob(".out.unfinished-*"))
            hf.save(tmp_path / "out", params, config, dtype="float32")
            assert seen[0].exists()
        leaf = params
        for key in path.split("/"):
            leaf = leaf[key]
        return jnp.zeros_like(leaf if layer is None else leaf[layer])

    with pytest.raises(OSError, match=r"cannot write .*out \(Directory not empty\)"):
        hf.write_checkpoint(tmp_path / "out", read, config=config, dtype="float32")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    np.testing.assert_array_equal(hf.load(tmp_path / "out", dtype="float32")[1]["embed"], params["embed"])
