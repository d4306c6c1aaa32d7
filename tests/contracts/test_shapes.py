"""Every objective with every model preset through the abstract evaluation of one step: shapes only, no compute."""

from functools import partial
from itertools import product
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from jaxsafety import keys, methods, pools
from jaxsafety.models import gpt, llama
from jaxsafety.training import objective, optim

# Those that learn from text, of models that read it.
OBJECTIVES = tuple(name for name in methods.TABLE if methods.load(name).examples in ("preferences", "text"))
BARE = {"loss", "grad_norm", "finite"}
SHARED = BARE | {"token_accuracy"}
ADVERSE = {"harmful_nll/before", "harmful_nll/after"}
PAIRED = SHARED | {"logps/chosen", "logps/rejected"}
REWARDS = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
FORGETTING = PAIRED | {"loss/forget", "loss/retain"}
METRICS = {
    "pretrain": SHARED,
    "sft": SHARED,
    "dpo": PAIRED | REWARDS | {"rewards/slope"},
    "unlearn": PAIRED,
    "ipo": PAIRED | REWARDS,
    "robust_dpo": PAIRED | REWARDS,
    "simpo": PAIRED | REWARDS,
    "npo": FORGETTING | {"rewards/rejected"},
    "simnpo": FORGETTING | {"rewards/rejected"},
    "graddiff": FORGETTING,
    "derta": SHARED,
    "deep_alignment": SHARED | {"loss/safety", "loss/utility"},
    "constrained_sft": SHARED,
    "primal_dual": SHARED | {"loss/safety", "loss/utility", "cost", "excess", "multiplier"},
    "rmu": BARE | {"loss/forget", "loss/retain"},
    "circuit_breakers": BARE | {"loss/reroute", "loss/retain", "cosine"},
    "adversarial": SHARED | ADVERSE | {"loss/safety", "loss/away", "loss/utility"},
    "tamper_resistant": SHARED | ADVERSE | {"loss/kept", "loss/resisted"},
}
LLAMA_8B = llama.LlamaConfig(
    vocab_size=128_256, max_tokens=8192, layers=32, heads=32, kv_heads=8, width=4096, mlp_width=14_336,
    head_width=128, norm_eps=1e-5, rope=llama.Rope(500_000.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def batches(paper_world):
    """The shapes of what an objective's step is given, which no model has a part in: drawn once."""
    given = {"step": 0, "total_steps": 10, "batch_size": 2}
    drawn = {
        pool.examples: jax.eval_shape(
            lambda key, pool=pool: pool.draw(paper_world, pool.Config(), key=key, **given), keys.root(0)
        )
        for pool in map(pools.load, pools.TABLE)
        if not pool.files and not (pool.conditions and pool.conditions(pool.Config()))
    }
    return {name: drawn[methods.load(name).examples] for name in OBJECTIVES}


@pytest.mark.parametrize(
    "block", [pytest.param(one, marks=() if one == "paper" else pytest.mark.slow) for one in get_args(gpt.Block)]
)
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(*one, marks=() if one[1] == "paper" else pytest.mark.slow)
        for one in product(OBJECTIVES, get_args(gpt.Preset))
    ],
)
def test_a_step_keeps_the_state_and_gives_scalar_metrics(paper_world, batches, name, preset, block):
    config = gpt.preset(
        preset, vocab_size=paper_world.vocab_size, max_tokens=paper_world.max_tokens, block=block, positions="rope"
    )
    _check_step(name, batches[name], init=partial(gpt.init, config), model=gpt.model(config))


# The others differ from one of these in a loss on what both models say alike.
_OF_LLAMA = ("pretrain", "sft", "dpo", "unlearn", "derta", "npo", "rmu")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _OF_LLAMA else pytest.mark.slow) for name in OBJECTIVES]
)
def test_a_step_of_an_8b_llama_keeps_the_state_and_gives_scalar_metrics(batches, name):
    _check_step(name, batches[name], init=partial(llama.init, LLAMA_8B), model=llama.model(LLAMA_8B))


def _check_step(name, drawn, *, init, model):
    method = methods.load(name)
    optimizer = optim.make_optimizer(optim.OptimConfig(algorithm="muon"), peak_lr=1e-3, total_steps=10)

    def start(key):
        return objective.init_state(method, init(key=key), optimizer, method.Config(), key=key)

    def step(key, state, batch):
        given = {"reference": state.params, "key": key}
        batch = objective.prepared(method, model, batch, method.Config(), **given)
        return objective.make_step(method, model, optimizer, method.Config(), key=key, total_steps=10)(state, batch)

    before = jax.eval_shape(start, keys.root(0))
    after, metrics = jax.eval_shape(step, keys.root(0), before, drawn)
    assert before == after
    assert set(metrics) == METRICS[name]
    assert all(metric.shape == () and metric.dtype == jnp.float32 for metric in metrics.values())
