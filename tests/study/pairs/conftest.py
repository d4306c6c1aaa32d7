"""A tiny Llama and what was tuned from it, as two Hugging Face directories with a tokenizer and a chat template."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from experiments import llama_world
from jaxsafety import tree
from jaxsafety.formats import hf, prompts
from jaxsafety.models import llama
from jaxsafety.models.llama import LlamaConfig

VOCABULARY = 400
CONFIG = LlamaConfig(VOCABULARY, 128, layers=3, heads=4, kv_heads=2, width=32, mlp_width=48, head_width=8)


@pytest.fixture(scope="session")
def encoder():
    return llama_world.tokenizer([prompt.messages[0].content for prompt in prompts.own()], VOCABULARY)


def drawn_params(config, *, seed):
    """Initial parameters by one program, where eager calls would compile one for every shape; in NumPy."""
    return jax.device_get(jax.jit(partial(llama.init, config))(key=jax.random.key(seed)))


def tuned_from(params):
    """Every matrix with an update of rank 3 and a little of everything else."""

    def changed(path, leaf):
        drawn = np.random.default_rng(sum(map(ord, path)))
        noise = drawn.normal(size=leaf.shape)
        if leaf.ndim == 3:
            depth, m, n = leaf.shape
            noise = 0.1 * noise + drawn.normal(size=(depth, m, 3)) @ drawn.normal(size=(depth, 3, n))
        return np.asarray(leaf + 3e-3 * noise, np.float32)

    return tree.label(params, changed)


def save(directory, params, *, config=CONFIG, encoder=None):
    hf.save(directory, params, config, dtype="float32")
    if encoder is not None:
        encoder.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(llama_world.TOKENS))
    return directory


@pytest.fixture(scope="session")
def params():
    before = drawn_params(CONFIG, seed=1)
    return before, tuned_from(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, params, encoder):
    """Directories of base and tuned."""
    folder = tmp_path_factory.mktemp("pair")
    return tuple(
        save(folder / name, side, encoder=encoder) for name, side in zip(("base", "tuned"), params, strict=True)
    )


@pytest.fixture
def another(tmp_path, encoder):
    """Saves a model of a changed configuration."""

    def make(**changed):
        config = replace(CONFIG, **changed)
        return save(tmp_path / "another", drawn_params(config, seed=2), config=config, encoder=encoder)

    return make
