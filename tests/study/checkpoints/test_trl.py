"""DPO of a checkpoint has TRL's loss and gradient on the same batch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jaxsafety import keys, tree
from jaxsafety.formats import hf, hf_names
from jaxsafety.methods import dpo
from jaxsafety.models import llama
from jaxsafety.training import objective, stepping
from jaxsafety.types import Batch, PreferenceBatch
from tests.study.checkpoints import trl_reference

GOLDEN = Path(__file__).parent / "golden" / "dpo.npz"
# Of the loss; of a gradient, relative to its norm.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ours():
    """Loss and gradients by their names."""
    config = hf.read_config(trl_reference.MODEL)

    policy, reference = (ours_from(state, config) for state in trl_reference.weights(load_file(weights_file())))
    tokens, answer = trl_reference.batch()
    whole = [Batch(*map(jnp.asarray, (ids[:, :-1], ids[:, 1:], marks[:, 1:]))) for ids, marks in halves(tokens, answer)]
    pairs = PreferenceBatch(*whole, unsafe=jnp.ones(len(whole[0].tokens), bool))
    options, model, key = dpo.Config(trl_reference.BETA, trl_reference.BETA), llama.model(config), keys.root(0)
    prepared = jax.jit(lambda q, b: objective.prepared(dpo.METHOD, model, b, options, reference=q, key=key))
    gradient = objective.make_gradient(dpo.METHOD, model, options, key=key, total_steps=1, parts=3)
    state = stepping.init_state(policy, optax.identity())
    loss, _, grads = jax.jit(gradient)(state, prepared(reference, pairs))
    return {"loss": np.asarray(loss)} | theirs_from(grads, config)


def weights_file():
    return trl_reference.MODEL / "model.safetensors"


def halves(tokens, answer):
    return zip(np.split(tokens.astype(np.int32), 2), np.split(answer, 2), strict=True)


def ours_from(state, config):
    stacked = {}
    for slot in hf_names.slots(config):
        own = state[slot.name].T if hf_names.is_transposed(slot.path) else state[slot.name]
        stacked.setdefault(slot.path, []).append(own)
    shapes = hf_names.leaf_shapes(config)
    return tree.unflatten({path: jnp.asarray(np.stack(own).reshape(shapes[path])) for path, own in stacked.items()})


def theirs_from(params, config):
    flat, found = tree.flatten(params), {}
    for slot in hf_names.slots(config):
        own = np.asarray(flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer])
        found[slot.name] = own.T if hf_names.is_transposed(slot.path) else own
    return found


def check(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=TOLERANCE)
    for name, own in theirs.items():
        if name != "loss":
            assert np.linalg.norm(ours[name] - own) <= TOLERANCE * np.linalg.norm(own), name


def test_loss_and_gradients_are_those_that_trl_gave(ours):
    with GOLDEN.open("rb") as file, np.load(file) as golden:
        check(ours, dict(golden))


@pytest.mark.filterwarnings("ignore")  # of TRL's own imports
def test_loss_and_gradients_are_those_of_trl_here(ours):
    pytest.importorskip("trl", reason="trl is not installed: pip install '.[peers,hf-test]'")
    pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf-test]'")
    check(ours, trl_reference.computed())
