"""A tiny Llama and what was tuned from it, as two Hugging Face directories with a tokenizer, and files to read."""

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
from jaxsafety.study.checkpoints.opened import Looked
from jaxsafety.subjects.checkpoint import Config

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


# What the rows of one model have in common.
LABELS = {"run": "r", "revision": "v", "device": "cpu"} | {"method": "tuned", "lr_name": "a", "lr": 1e-3, "seed": 3}
LABELS |= {"step": 7}


@pytest.fixture(scope="session")
def looked(checkpoints):
    """Returns the tuned model as an analysis is given it, or, without a base, the one that it was tuned from."""

    def make(folder, *, based=True, **more):
        base, tuned = (hf.open_checkpoint(place) for place in checkpoints)
        labels = LABELS if based else LABELS | {"method": "pretrained"}
        own = tuned if based else base
        about = more.pop("about", Config(str(base.directory)))
        return Looked(labels["method"], own, base if based else None, folder, labels, about, **more)

    return make


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A file of six prompts of every label."""
    own = prompts.own()
    chosen = [one for label in dict.fromkeys(one.label for one in own)
              for one in [other for other in own if other.label == label][:6]]  # fmt: skip
    path = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    path.write_text(prompts.to_jsonl(chosen))
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file of eight prompts with two answers each."""
    chosen = [prompt.messages[0].content for prompt in prompts.own()][::90][:8]
    rows = ({"prompt": prompt, "chosen": "I cannot.", "rejected": "Here it is."} for prompt in chosen)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def another(tmp_path, encoder):
    """Saves a model of a changed configuration."""

    def make(**changed):
        config = replace(CONFIG, **changed)
        return save(tmp_path / "another", drawn_params(config, seed=2), config=config, encoder=encoder)

    return make
