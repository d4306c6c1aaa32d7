"""Small random checkpoints, and a small tokenizer."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import llama_world
from jaxsafety.formats import hf, hf_names, prompts
from jaxsafety.models.llama import LlamaConfig
from jaxsafety.tree import unflatten

CONFIG = LlamaConfig(
    vocab_size=48, max_tokens=64, layers=3, heads=4, kv_heads=2, width=16, mlp_width=24, head_width=6, norm_eps=1e-5
)


@pytest.fixture
def config():
    """Three layers, grouped queries, a head width of its own, sizes all different."""
    return CONFIG


@pytest.fixture
def make_params():
    """From a configuration to random parameters of float32."""

    def make(config, seed=0):
        rng = np.random.default_rng(seed)
        shapes = hf_names.leaf_shapes(config)
        return unflatten({path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in shapes.items()})

    return make


@pytest.fixture
def params(make_params, config):
    """Those of ``config``."""
    return make_params(config)


@pytest.fixture
def saved(tmp_path, make_params):
    """Saves random parameters of ``config`` with some fields replaced; returns the directory and the parameters."""

    def save(*, dtype="float32", shard_bytes=10**9, name="model", **fields):
        changed = replace(CONFIG, **fields)
        params = make_params(changed)
        hf.save(tmp_path / name, params, changed, dtype=dtype, shard_bytes=shard_bytes)
        return tmp_path / name, params

    return save


@pytest.fixture(scope="session")
def encoder():
    """Byte-level BPE with roles as special tokens, which adds a BOS by itself."""
    return llama_world.tokenizer([prompt.messages[0].content for prompt in prompts.own()], 400)


@pytest.fixture
def tell(tmp_path, encoder):
    """Writes a tokenizer's directory anew: its configuration from some fields, and other files by name; returns it."""
    bos = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}
    tokens = {"bos_token": bos | {"single_word": False}, "eos_token": "</s>"}

    def write(*, files=None, **config):
        encoder.save(str(tmp_path / "tokenizer.json"))
        told = {"tokenizer_config.json": tokens | config} | (files or {})
        for name, content in told.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write
