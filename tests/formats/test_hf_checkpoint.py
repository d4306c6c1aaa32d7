"""Opening a checkpoint: single tensors on demand, and every way in which its files may not fit its configuration."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsafety.formats import hf
from jaxsafety.tree import flatten

UP = "model.layers.1.mlp.up_proj.weight"


def edit(directory, *, drop=(), add=None, file="model.safetensors"):
    """Rewrites a weights file with the format's own library."""
    tensors = load_file(directory / file)
    tensors = {name: array for name, array in tensors.items() if name not in drop} | (add or {})
    save_file(tensors, directory / file, metadata={"format": "pt"})


def edit_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_a_matrix_of_one_layer(saved, config, shard_bytes):
    directory, params = saved(shard_bytes=shard_bytes, mlp_bias=True)
    assert (len(list(directory.glob("*.safetensors"))) == 1) == (shard_bytes == 10**9)
    checkpoint = hf.open_checkpoint(directory)
    for name in ("mlp/up", "mlp/down", "mlp/gate", "attn/q", "attn/k", "attn/o"):
        for layer in range(config.layers):
            expected = np.asarray(flatten(params)[f"blocks/{name}"][layer])
            np.testing.assert_array_equal(checkpoint.matrix(layer, name), expected, strict=True)
    half = checkpoint.matrix(1, "mlp/up", dtype="bfloat16")
    assert half.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(half, np.asarray(params["blocks"]["mlp"]["up"][1]).astype(ml_dtypes.bfloat16))


def test_only_its_own_tensor_is_read(saved):
    """Values that are not finite in another layer show that nothing else was."""
    directory, _ = saved()
    edit(directory, add={UP: np.full((24, 16), np.nan, np.float32)})
    checkpoint = hf.open_checkpoint(directory)
    assert np.isfinite(checkpoint.matrix(0, "mlp/up")).all()
    with pytest.raises(ValueError, match=rf"{UP} holds values that are not finite in .*model.safetensors: expected"):
        checkpoint.matrix(1, "mlp/up")


@pytest.mark.parametrize(
    "index", [np.s_[:, :, :], np.s_[1:3, :, :], np.s_[:, 3:7, :], np.s_[:, :, 5:24], np.s_[2:3, 0:1, 23:24]]
)
def test_a_part_of_a_leaf(saved, index):
    directory, params = saved()
    part = hf.open_checkpoint(directory).leaf("blocks/mlp/up", index=index, dtype="float32")
    np.testing.assert_array_equal(part, np.asarray(params["blocks"]["mlp"]["up"])[index], strict=True)


def test_parts_of_leaves_outside_the_layers(saved):
    directory, params = saved()
    checkpoint = hf.open_checkpoint(directory)
    for path, index in (("embed", np.s_[5:9, 2:]), ("unembed", np.s_[2:, 5:9]), ("norm/scale", np.s_[3:,])):
        expected = np.asarray(flatten(params)[path])[index]
        np.testing.assert_array_equal(checkpoint.leaf(path, index=index, dtype="float32"), expected, strict=True)


def test_unknown_matrices_and_layers_are_refused(saved):
    checkpoint = hf.open_checkpoint(saved(qkv_bias=True)[0])
    with pytest.raises(
        ValueError, match=r"unknown matrix 'mlp/ups': expected one of attn/q, .*; did you mean 'mlp/up'"
    ):
        checkpoint.matrix(0, "mlp/ups")
    with pytest.raises(ValueError, match="unknown matrix 'attn/q_bias'"):
        checkpoint.matrix(0, "attn/q_bias")
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer: got {layer}, expected 0 to 2"):
            checkpoint.matrix(layer, "mlp/up")


def test_an_unknown_leaf_is_refused(saved):
    checkpoint = hf.open_checkpoint(saved(tied=True)[0])
    with pytest.raises(
        ValueError, match=r"unknown parameter 'unembed': expected one of embed, .*; did you mean 'embed'"
    ):
        checkpoint.leaf("unembed", index=np.s_[:, :], dtype="float32")


def test_values_that_the_wanted_type_cannot_hold_are_refused(saved):
    directory, _ = saved()
    edit(directory, add={UP: np.full((24, 16), 1e6, np.float32)})
    with pytest.raises(ValueError, match=f"{UP} holds values that are not finite once it is float16"):
        hf.open_checkpoint(directory).matrix(1, "mlp/up", dtype="float16")


def test_missing_and_extra_tensors_are_refused_together(saved):
    directory, _ = saved()
    misnamed = UP.replace("up_proj", "upproj")
    edit(directory, drop=[UP], add={misnamed: np.ones((24, 16), np.float32)})
    message = (
        f"lack {UP}, which config.json asks for and hold {misnamed}, which it does not .* did you mean '{misnamed}'"
    )
    with pytest.raises(ValueError, match=message):
        hf.open_checkpoint(directory)


def test_missing_tensors_are_refused(saved):
    directory, _ = saved()
    names = [name for name in load_file(directory / "model.safetensors") if "layers.2." in name]
    edit(directory, drop=names)
    with pytest.raises(
        ValueError, match=r"lack model.layers.2.input_layernorm.weight, .* and 6 more, which config.json"
    ):
        hf.open_checkpoint(directory)


def test_extra_tensors_are_refused(saved):
    directory, _ = saved()
    edit(directory, add={"model.layers.1.self_attn.q_proj.bias": np.ones(24, np.float32)})
    with pytest.raises(ValueError, match=r"hold model.layers.1.self_attn.q_proj.bias, which it does not ask for; did"):
        hf.open_checkpoint(directory)


@pytest.mark.parametrize("name", [UP, "lm_head.weight"])
def test_misshapen_tensors_are_refused(saved, name):
    directory, _ = saved(tied=name == "lm_head.weight")
    edit(directory, add={name: np.ones((16, 24), np.float32)})
    message = rf"{name} is \[16, 24\] in .*model.safetensors, expected \[(24|48), 16\] by config.json"
    with pytest.raises(ValueError, match=message):
        hf.open_checkpoint(directory)


def test_other_types_are_refused(saved):
    directory, _ = saved()
    edit(directory, add={UP: np.ones((24, 16), np.int8)})
    with pytest.raises(ValueError, match=f"{UP} is stored as I8 in .*, expected one of F32, BF16, F16"):
        hf.open_checkpoint(directory)


def test_old_tables_of_angles_are_ignored(saved):
    directory, _ = saved()
    names = ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")
    edit(directory, add={name: np.ones(3, np.float64) for name in names})
    assert hf.open_checkpoint(directory).matrix(0, "mlp/up").shape == (16, 24)
    edit(directory, add={"model.layers.0.mlp.rotary_emb.inv_freq": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"hold model.layers.0.mlp.rotary_emb.inv_freq"):
        hf.open_checkpoint(directory)


def test_a_head_beside_the_embeddings_that_it_is_tied_to(saved):
    directory, params = saved(tied=True)
    embed = np.array(params["embed"])
    edit(directory, add={"lm_head.weight": embed})
    assert "unembed" not in hf.load(directory, dtype="float32")[1]
    embed[-1, -1] += 1
    edit(directory, add={"lm_head.weight": embed})
    with pytest.raises(ValueError, match=r"lm_head.weight in .* differs from model.embed_tokens.weight, but"):
        hf.load(directory, dtype="float32")


def test_an_untied_model_needs_its_head(saved):
    directory, _ = saved()
    edit(directory, drop=["lm_head.weight"])
    with pytest.raises(ValueError, match=r"lack lm_head.weight, which config.json asks for"):
        hf.open_checkpoint(directory)


SHARD = "model-00002-of-00018.safetensors"


def test_damaged_files_are_refused_before_a_value_is_read(saved):
    directory, _ = saved(shard_bytes=3000)
    whole = (directory / SHARD).read_bytes()
    (directory / SHARD).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{SHARD} is cut off: got {len(whole) - 1} bytes, expected {len(whole)}"):
        hf.open_checkpoint(directory)
    (directory / SHARD).rename(directory / "model-00002-of-0018.safetensors")
    with pytest.raises(
        FileNotFoundError, match=f"names {SHARD}, which is not there; did you mean 'model-00002-of-0018"
    ):
        hf.open_checkpoint(directory)


def test_an_index_that_contradicts_its_files_is_refused(saved):
    directory, _ = saved(shard_bytes=8000)
    first = min(directory.glob("*.safetensors")).name
    edit_index(directory, lambda placed: placed.update({UP: first}))
    with pytest.raises(
        ValueError, match=rf"{UP} is in model-0000[2-9]-of-\d+.safetensors, but {first} by .*index.json"
    ):
        hf.open_checkpoint(directory)
    edit_index(directory, lambda placed: placed.pop(UP))
    with pytest.raises(ValueError, match=rf"{UP} is in model.*, but nowhere by"):
        hf.open_checkpoint(directory)
    edit(directory, file=first, add={UP: np.ones((24, 16), np.float32)})
    with pytest.raises(ValueError, match=f"{UP} is in both .*{first} and .*: expected it once"):
        hf.open_checkpoint(directory)


def test_an_index_names_files_that_hold_what_it_says(saved):
    directory, _ = saved(shard_bytes=3000)
    edit_index(directory, lambda placed: placed.update(nothing=SHARD))
    with pytest.raises(ValueError, match=f"nothing is in no file, but {SHARD} by"):
        hf.open_checkpoint(directory)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}']
)
def test_what_is_not_an_index_is_refused(saved, content):
    directory, _ = saved(shard_bytes=3000)
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json is not an index: expected a weight_map"):
        hf.open_checkpoint(directory)


def test_directories_without_weights_here(saved):
    directory, _ = saved()
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"holds no weights: expected model.safetensors or .*, found adapter_model"
    ):
        hf.open_checkpoint(directory)
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt"):
        (directory / name).write_bytes(b"\x80\x04.")
        message = rf"holds pickled weights \({re.escape(name)}\), .*save_pretrained\(path, safe_serialization=True\)"
        with pytest.raises(ValueError, match=message):
            hf.open_checkpoint(directory)
        (directory / name).unlink()
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no weights: expected model.safetensors or .*index.json$"):
        hf.open_checkpoint(directory)


def test_one_file_and_an_index_are_refused(saved):
    directory, _ = saved()
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds both model.safetensors and model.safetensors.index.json: expected one"
    ):
        hf.open_checkpoint(directory)


def test_files_that_an_index_does_not_name_are_nobody_s_business(saved):
    directory, params = saved(shard_bytes=3000)
    (directory / "consolidated.safetensors").write_bytes(b"other software's")
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    up = hf.open_checkpoint(directory).matrix(0, "mlp/up")
    np.testing.assert_array_equal(up, np.asarray(params["blocks"]["mlp"]["up"][0]))
