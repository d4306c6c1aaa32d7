"""Models that transformers has saved, and what it computes with them: parity without transformers or torch.

Written by ``tests/formats/theirs.py`` with transformers 5.24.0 and torch 2.13.0, on a CPU.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxsafety import keys
from jaxsafety.formats import hf, hf_names
from jaxsafety.models import generation, llama
from jaxsafety.tree import flatten
from tests.formats.theirs import FAMILIES, MODELS

FOLDER = Path(__file__).with_name("golden")
# Of the largest logit: two float32 programs that sum in different orders.
PARITY = 2e-5


# The model is an argument: some of them differ in their weights alone.
logits_of = jax.jit(lambda *given, config: llama.apply(*given, config=config).logits, static_argnames="config")


@partial(jax.jit, static_argnames=("config", "count"))
def continued(params, tokens, *, config, count):
    return generation.generate((params, llama.model(config)), tokens, count=count)


def compared(name):
    """Compares logits; returns the model and what else is expected of it."""
    directory = FOLDER / name.replace(" ", "_")
    config, params = hf.load(directory, dtype="float32")
    with np.load(directory / "expected.npz") as expected:
        tokens, logits, written = (expected[key] for key in ("tokens", "logits", "written"))
    found = logits_of(params, tokens, config=config)
    np.testing.assert_allclose(found, logits, rtol=0, atol=PARITY * np.abs(logits).max())
    return config, params, tokens, written


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
    compared(name)


# Four each time, all with the slow tests.
EACH = [
    name if place < 4 else pytest.param(name, marks=pytest.mark.slow) for place, name in enumerate([*MODELS, *FAMILIES])
]


@pytest.mark.parametrize("name", EACH)
def test_logits_and_continuations_are_those_of_transformers(name):
    config, params, tokens, written = compared(name)
    np.testing.assert_array_equal(continued(params, tokens, config=config, count=written.shape[1]), written)


@pytest.mark.parametrize("name", MODELS | FAMILIES)
def test_what_is_loaded_has_the_shapes_of_a_fresh_model(name):
    config = hf.read_config(FOLDER / name.replace(" ", "_"))
    fresh = jax.eval_shape(partial(llama.init, config), key=keys.root(0))
    assert {path: leaf.shape for path, leaf in flatten(fresh).items()} == hf_names.leaf_shapes(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_back_to_the_same_tensors(tmp_path, name):
    """By the names and in the parts of its own files, and as a type of its own where no file tells it."""
    config, params = hf.load(FOLDER / name, dtype="float32")
    hf.save(tmp_path / "same", params, config, dtype="float32", source=FOLDER / name)
    theirs, ours = (
        safetensors.numpy.load_file(place / "model.safetensors") for place in (FOLDER / name, tmp_path / "same")
    )
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[key], ours[key]) for key in theirs)
    hf.save(tmp_path / "own", params, config, dtype="float32")
    assert hf.read_config(tmp_path / "own") == config
    again = flatten(hf.load(tmp_path / "own", dtype="float32")[1])
    assert all(np.array_equal(leaf, again[path]) for path, leaf in flatten(params).items())


def test_a_matrix_of_a_fused_one_is_its_rows():
    """Queries lie above keys above values, and gate above up."""
    whole = safetensors.numpy.load_file(FOLDER / "phi3" / "model.safetensors")
    own = hf.open_checkpoint(FOLDER / "phi3")
    q, g, f = (own.config.heads * own.config.head_width, own.config.kv_heads * own.config.head_width, 24)
    qkv, gate_up = (whole[f"model.layers.1.{name}.weight"] for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    for name, rows in {
        "attn/q": qkv[:q],
        "attn/k": qkv[q : q + g],
        "attn/v": qkv[q + g :],
        "mlp/up": gate_up[f:],
    }.items():
        np.testing.assert_array_equal(own.matrix(1, name), rows.T)
    np.testing.assert_array_equal(own.leaf("blocks/attn/k", index=(slice(1, 2), slice(3, 9)), dtype="float32")[0],
                                  qkv[q : q + g].T[3:9])  # fmt: skip


def test_the_golden_files_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 2**20
