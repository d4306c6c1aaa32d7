"""Whole models: round trips bit for bit, types, devices, and the memory that loading takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from jaxsafety.engine.sharding import fsdp
from jaxsafety.formats import hf, hf_checkpoint, hf_names, safetensors_file
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.tree import flatten

MODELS = {
    "llama": {},
    "tied": {"tied": True},
    "all biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True},
    "mistral": {"window": 5},
    "one layer": {"layers": 1, "kv_heads": 4},
}


def bits(params):
    return {path: (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in flatten(params).items()}


def rule():
    return fsdp(jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,)), axis="x")


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_a_model_comes_back_bit_for_bit(saved, config, fields, shard_bytes):
    directory, params = saved(shard_bytes=shard_bytes, **fields)
    loaded, back = hf.load(directory, dtype="float32")
    assert loaded == replace(config, **fields)
    assert bits(back) == bits(params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_stored_type_comes_back_bit_for_bit(saved, tmp_path, config, dtype):
    directory, params = saved(dtype=dtype)
    _, back = hf.load(directory, dtype=dtype)
    assert bits(back) == bits(jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    hf.save(tmp_path / "again", back, config, dtype=dtype)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_are_converted_as_numpy_does(saved, stored, dtype):
    directory, params = saved(dtype=stored)
    _, back = hf.load(directory, dtype=dtype)
    assert bits(back) == bits(jax.tree.map(lambda leaf: np.asarray(leaf).astype(stored).astype(dtype), params))


def test_names_and_orientation_are_hugging_face_s(saved, config):
    directory, params = saved(qkv_bias=True)
    found = load_file(directory / "model.safetensors")
    blocks = params["blocks"]
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], params["embed"])
    np.testing.assert_array_equal(found["lm_head.weight"], params["unembed"].T)
    np.testing.assert_array_equal(found["model.layers.2.self_attn.k_proj.weight"], blocks["attn"]["k"][2].T)
    np.testing.assert_array_equal(found["model.layers.2.self_attn.k_proj.bias"], blocks["attn"]["k_bias"][2])
    np.testing.assert_array_equal(found["model.layers.0.self_attn.o_proj.weight"], blocks["attn"]["o"][0].T)
    np.testing.assert_array_equal(found["model.layers.1.mlp.down_proj.weight"], blocks["mlp"]["down"][1].T)
    np.testing.assert_array_equal(found["model.layers.1.input_layernorm.weight"], blocks["norm_attn"]["scale"][1])
    np.testing.assert_array_equal(
        found["model.layers.1.post_attention_layernorm.weight"], blocks["norm_mlp"]["scale"][1]
    )
    assert len(found) == len(hf_names.slots(replace(config, qkv_bias=True))) == 3 + 12 * config.layers


def test_leaves_are_jax_arrays_on_the_default_device_and_uncommitted(saved):
    _, params = hf.load(saved()[0], dtype="float32")
    for leaf in jax.tree.leaves(params):
        assert isinstance(leaf, jax.Array)
        assert leaf.devices() == {jax.devices()[0]}
        assert not leaf.committed


def test_on_several_devices_each_holds_its_part(saved):
    directory, params = saved(qkv_bias=True)
    _, split = hf.load(directory, dtype="float32", shardings=rule())
    assert bits(split) == bits(params)
    assert {shard.data.shape for shard in split["blocks"]["mlp"]["up"].addressable_shards} == {(3, 16, 6)}
    assert {shard.data.shape for shard in split["embed"].addressable_shards} == {(12, 16)}
    tree = jax.tree.map(lambda leaf: leaf.sharding, split)
    _, again = hf.load(directory, dtype="float32", shardings=tree)
    assert bits(again) == bits(params)
    assert jax.tree.map(lambda leaf: leaf.sharding, again) == tree


def test_each_device_reads_only_its_part(saved, monkeypatch):
    directory, _ = saved()
    read = []

    def blocks(tensor, *, start=0, stop=None):
        read.append((tensor.name, start, stop))
        return original(tensor, start=start, stop=stop)

    original = safetensors_file.blocks
    monkeypatch.setattr(hf_checkpoint.safetensors_file, "blocks", blocks)
    hf.load(directory, dtype="float32", shardings=rule())
    for name, rows in (("model.layers.1.mlp.up_proj.weight", 6), ("lm_head.weight", 12)):
        parts = sorted((start, stop) for other, start, stop in read if other == name)
        assert parts == [(rows * part, rows * (part + 1)) for part in range(4)]


def test_shardings_of_another_model_are_refused(saved):
    directory, _ = saved()
    tree = jax.tree.map(lambda leaf: leaf.sharding, hf.load(saved(name="other", tied=True)[0], dtype="float32")[1])
    with pytest.raises(ValueError, match="unembed is in the model but not in shardings: expected a sharding for every"):
        hf.load(directory, dtype="float32", shardings=tree)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(saved, value):
    directory, _ = saved()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight holds values that are not finite in"):
        hf.load(directory, dtype="bfloat16")


def test_a_model_that_does_not_fit_is_never_loaded_in_part(saved, monkeypatch):
    directory, _ = saved()
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 4}))
    monkeypatch.setattr(hf_checkpoint.safetensors_file, "blocks", None)
    with pytest.raises(ValueError, match=r"lack model.layers.3.input_layernorm.weight, .* and 6 more"):
        hf.load(directory, dtype="float32")


_MEASURE = """
import re, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import AxisType
from jaxsafety.formats import hf
from jaxsafety.engine.sharding import fsdp
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
shardings = fsdp(mesh, axis="x") if sys.argv[2] == "split" else None
# Not getrusage: its maximum begins with that of the process that this one was started by.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
jax.devices()
before = peak()
_, params = hf.load(Path(sys.argv[1]), dtype=sys.argv[3], shardings=shardings)
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 295 MiB in bfloat16, in three files, of which one leaf is 64 MiB."""
    config = LlamaConfig(
        vocab_size=16_000, max_tokens=64, layers=8, heads=16, kv_heads=4, width=1024, mlp_width=4096, head_width=64
    )
    shapes = hf_names.leaf_shapes(config)
    block = np.random.default_rng(0).normal(size=2**20).astype(ml_dtypes.bfloat16)
    directory = tmp_path_factory.mktemp("large") / "model"

    def read(path, layer):
        return np.resize(block, shapes[path] if layer is None else shapes[path][1:])

    hf.write_checkpoint(directory, read, config=config, dtype="bfloat16", shard_bytes=110 * 2**20)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("where", "dtype"), [("split", "bfloat16"), ("whole", "bfloat16"), ("whole", "float32")])
def test_loading_takes_little_more_memory_than_the_model(large, where, dtype):
    """The bound of the project is 1.2; here it is tighter, as nothing but a few megabytes should come on top."""
    root = str(Path(hf.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(large), where, dtype],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr
    # Below 0.9 the measure would not see the model.
    assert 0.9 < float(done.stdout) < 1.1, done.stdout


def test_a_parameter_that_was_loaded_is_a_value(saved):
    """Taken over from the reader's memory without a copy: nothing may write there later."""
    directory, params = saved()
    _, first = hf.load(directory, dtype="float32")
    _, second = hf.load(directory, dtype="float32")
    moved = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), tree), donate_argnums=0)(first)
    assert bits(second) == bits(params)
    assert bits(moved) == bits(jax.tree.map(lambda leaf: leaf + 1, params))
