"""Adapters of PEFT merged and written, against NumPy; against PEFT itself in ``test_peft_itself``."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxsafety.formats import hf, hf_names, peft_merge, peft_write
from jaxsafety.formats.hf_names import TABLE
from jaxsafety.tree import flatten, unflatten
from tests.formats import peft_files
from tests.formats.peft_files import MODULES, PREFIX

# Products of float32 against those of float64, of numbers up to about ten.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def merged(tmp_path, saved):
    """Merges an adapter, of some tensors and fields, with a model; returns the configuration, its leaves and theirs."""

    def merge(held, fields=(), **changed):
        directory, params = saved(**changed)
        adapter = peft_files.write(tmp_path / "adapter", held, **dict(fields))
        peft_merge.write(directory, adapter, tmp_path / "merged")
        config, found = hf.load(tmp_path / "merged", dtype="float32")
        return config, flatten(found), {path: np.asarray(leaf) for path, leaf in flatten(params).items()}

    return merge


def expected(path, leaf, held, scale):
    """A leaf with what factors add to it, in float64; ``scale`` is a number, or one by the name of a module."""
    name = TABLE[path][0].removesuffix(".weight")
    leaf = leaf.astype(np.float64)
    for layer, own in enumerate(leaf if "{layer}" in name else [leaf]):
        module = name.format(layer=layer)
        count = scale(module) if callable(scale) else scale
        ends = ("lora_embedding_A", "lora_embedding_B") if path == "embed" else ("lora_A.weight", "lora_B.weight")
        if (key := f"{PREFIX}{module}.{ends[0]}") in held:
            a, b = (held[f"{PREFIX}{module}.{end}"].astype(np.float64) for end in ends)
            own += count * np.einsum("ri,or->io", a, b)
            assert key
    return leaf


def check(found, params, held, scale):
    assert found.keys() == params.keys()
    for path, leaf in params.items():
        np.testing.assert_allclose(found[path], expected(path, leaf, held, scale), **CLOSE, err_msg=path)


def test_every_matrix_has_its_product(merged, config):
    held = peft_files.tensors(config)
    model, found, params = merged(held)
    assert model == config
    check(found, params, held, 6 / 4)
    assert all(np.any(found[f"blocks/{path}"] != params[f"blocks/{path}"]) for path in ("attn/q", "mlp/down"))


def test_ranks_and_scales_are_those_of_each_module(merged, config):
    """rsLoRA; patterns as PEFT reads them: from a dot on, the first counts, a whole name begins with ^."""
    ranks = {"q_proj": 2, "^model.layers.1.mlp.up_proj": 3, "layers.2.*": 5}
    alphas = {"layers.0.self_attn.q_proj": 9, "v_proj": 0.5, "layers.0.self_attn.v_proj": 100.0, "proj": 7.0}

    def rank(module):
        if module.endswith("q_proj"):
            return 2
        if module == "model.layers.1.mlp.up_proj":
            return 3
        return 5 if ".layers.2." in module else 4

    def scale(module):
        alpha = {"model.layers.0.self_attn.q_proj": 9, "v_proj": 0.5}
        own = alpha.get(module, alpha.get(module.rpartition(".")[2], 6))
        return own / rank(module) ** 0.5

    held = peft_files.tensors(config, rank=rank)
    fields = {"use_rslora": True, "rank_pattern": ranks, "alpha_pattern": alphas}
    _, found, params = merged(held, fields)
    check(found, params, held, scale)


def test_embeddings_and_head(merged, config):
    held = peft_files.tensors(config, modules=("embed_tokens", "lm_head", "q_proj"))
    _, found, params = merged(held)
    check(found, params, held, 1.5)


@pytest.mark.parametrize("modules", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_a_tied_model_gets_a_head_of_its_own(merged, config, modules):
    held = peft_files.tensors(config, modules=modules)
    model, found, params = merged(held, tied=True)
    assert model == replace(config, tied=False)
    check(found, params | {"unembed": params["embed"].T}, held, 1.5)


def test_one_whose_head_is_adapted_as_its_embeddings_stays_tied(merged, config):
    held = peft_files.tensors(config, modules=("embed_tokens",))
    a, b = (held[f"{PREFIX}model.embed_tokens.lora_embedding_{name}"] for name in "AB")
    both = held | {f"{PREFIX}lm_head.lora_A.weight": b.T, f"{PREFIX}lm_head.lora_B.weight": a.T}
    model, found, params = merged(both, {"ensure_weight_tying": True}, tied=True)
    assert model.tied
    check(found, params, held, 1.5)


def test_whole_tensors_stand_for_those_of_the_model(merged, config):
    rng = np.random.default_rng(3)
    shapes = {"lm_head.weight": (48, 16), "model.norm.weight": (16,), "model.embed_tokens.base_layer.weight": (48, 16),
              "model.layers.2.self_attn.q_proj.base_layer.bias": (24,)}  # fmt: skip
    wholes = {PREFIX + name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    held = peft_files.tensors(config, modules=("embed_tokens", "q_proj"))
    fields = {"modules_to_save": ["lm_head", "norm"], "bias": "all"}
    _, found, params = merged(held | wholes, fields, qkv_bias=True)
    by_name = {name: wholes[PREFIX + name] for name in shapes}
    params |= {"unembed": by_name["lm_head.weight"].T, "norm/scale": by_name["model.norm.weight"]}
    params["embed"] = by_name["model.embed_tokens.base_layer.weight"]
    params["blocks/attn/q_bias"] = params["blocks/attn/q_bias"].copy()
    params["blocks/attn/q_bias"][2] = by_name["model.layers.2.self_attn.q_proj.base_layer.bias"]
    check(found, params, held, 1.5)


def test_embeddings_of_more_tokens_come_with_the_head(merged, config, saved, tmp_path):
    rng = np.random.default_rng(3)
    embed, head = (rng.normal(size=(50, 16)).astype(np.float32) for _ in "ab")
    held = {f"{PREFIX}model.embed_tokens.weight": embed, f"{PREFIX}lm_head.weight": head}
    model, found, params = merged(held, {"modules_to_save": ["embed_tokens", "lm_head"]})
    assert model == replace(config, vocab_size=50)
    check(found, params | {"embed": embed, "unembed": head.T}, {}, 0)
    alone = peft_files.write(tmp_path / "alone", {f"{PREFIX}model.embed_tokens.weight": embed})
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[50, 16\] in .*, expected \[48, 16\] by the model"):
        peft_merge.write(tmp_path / "model", alone, tmp_path / "none")


def test_weights_keep_the_type_of_the_base_unless_told(tmp_path, saved, config):
    directory, _ = saved(dtype="bfloat16")
    adapter = peft_files.write(tmp_path / "adapter", peft_files.tensors(config))
    for dtype, name in ((None, "bfloat16"), ("float32", "float32")):
        peft_merge.write(directory, adapter, tmp_path / name, dtype=dtype)
        assert hf.open_checkpoint(tmp_path / name).tensors["embed", None].dtype.name == name
    full, rounded = (hf.open_checkpoint(tmp_path / name).matrix(1, "mlp/up") for name in ("float32", "bfloat16"))
    assert np.any(full != rounded)
    np.testing.assert_array_equal(full.astype(rounded.dtype).astype("bfloat16"), rounded.astype("bfloat16"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, r"use_dora is True, expected none: DoRA scales"),
        ({"lora_bias": True}, "factors have biases"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected LORA"),
        ({"task_type": "SEQ_CLS"}, "expected CAUSAL_LM"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', of which a part may lie"),
        (
            {"use_rslra": True},
            r"unknown field use_rslra \(True\), which may change the model; did you mean 'use_rslora'",
        ),
        ({"trainable_token_indices": [1]}, "embeddings of some tokens are replaced"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected a number"),
        ({"r": 0}, "r is 0, expected an integer of at least 1"),
        ({"rank_pattern": {"(": 2}}, "is no regular expression"),
        ({"r": 8}, r"lora_A.weight is \[4, 16\] in .*, expected rank 8 first, as adapter_config.json says"),
        ({"modules_to_save": ["lm_head"]}, "holds no lm_head, which modules_to_save names"),
    ],
)
def test_what_would_change_the_model_and_is_not_followed_is_told(tmp_path, saved, config, fields, said):
    adapter = peft_files.write(tmp_path / "adapter", peft_files.tensors(config), **fields)
    refused(tmp_path, saved, adapter, said)


def test_records_are_accepted(merged, config):
    fields = {"layers_to_transform": [0, 1], "layers_pattern": "layers", "target_modules": ".*proj", "use_dora": False,
              "new_thing": None, "other_thing": {}, "eva_config": {"rho": 2.0}, "fan_in_fan_out": True}  # fmt: skip
    assert merged(peft_files.tensors(config), fields)[0] == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held, key: held | {key.replace("lora_A", "lora_C"): held[key]}, "nothing of the model's; did you mean"),
        (lambda held, key: held | {key.replace("q_proj", "x_proj"): held[key]}, "nothing of the model's; did you mean"),
        (lambda held, key: held | {f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector": held[key]},
         "lora_magnitude_vector, which is nothing"),
        (lambda held, key: {k: v for k, v in held.items() if k != key}, "lora_B.weight without .*lora_A.weight"),
        (lambda held, key: held | {key: held[key][:, :8].copy()}, r"is \[4, 8\] in .*, expected \[4, 16\] by"),
        (lambda held, key: held | {key: held[key] * np.float32(np.nan)}, "values that are not finite"),
        (lambda held, key: {}, "holds no tensors"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_told(tmp_path, saved, config, change, said):
    held = peft_files.tensors(config, modules=("q_proj",))
    held = change(held, f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight")
    refused(tmp_path, saved, peft_files.write(tmp_path / "adapter", held), said)


def refused(tmp_path, saved, adapter, said):
    with pytest.raises(ValueError, match=said):
        peft_merge.write(saved()[0], adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_what_is_no_adapter_is_told(tmp_path, saved):
    directory, _ = saved()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json: expected an adapter of PEFT"):
        peft_merge.write(directory, directory, tmp_path / "merged")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(peft_files.CONFIG))
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is not a file"):
        peft_merge.write(directory, tmp_path / "old", tmp_path / "merged")
    (tmp_path / "old" / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match="a pickled adapter"):
        peft_merge.write(directory, tmp_path / "old", tmp_path / "merged")


def test_what_is_written_is_read(tmp_path, saved, config):
    """Our factors out and in again, and what PEFT asks for by name."""
    directory, params = saved()
    rng, adapter = np.random.default_rng(5), {}
    for path, shape in hf_names.leaf_shapes(config).items():
        if path in ("embed", "unembed") or len(shape) == 3:
            *lead, m, n = shape
            adapter[f"{path}_lora_a"] = rng.normal(size=(*lead, m, 3)).astype(np.float32)
            adapter[f"{path}_lora_b"] = rng.normal(size=(*lead, 3, n)).astype(np.float32)
    out = tmp_path / "adapter"
    peft_write.write(out, unflatten(adapter), config=config, alpha=6.0, base="org/base", revision="main")
    told = json.loads((out / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["base_model_name_or_path"]) == (3, 6, "org/base")
    assert told["target_modules"] == sorted([*MODULES, "embed_tokens", "lm_head"])
    peft_merge.write(directory, out, tmp_path / "merged")
    found = flatten(hf.load(tmp_path / "merged", dtype="float32")[1])
    for path, leaf in flatten(params).items():
        product = 2.0 * (adapter[f"{path}_lora_a"] @ adapter[f"{path}_lora_b"]) if f"{path}_lora_a" in adapter else 0
        np.testing.assert_allclose(found[path], np.asarray(leaf) + product, **CLOSE)
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        peft_write.write(out, unflatten(adapter), config=config, alpha=6.0, base="org/base")
    bad = unflatten({path: leaf * np.float32(np.inf) for path, leaf in adapter.items()})
    with pytest.raises(ValueError, match="not finite"):
        peft_write.write(tmp_path / "bad", bad, config=config, alpha=6.0, base="org/base")
    assert not (tmp_path / "bad").exists()
