"""The gradient of a tuning loss on both answers to the same prompts: whole texts, and prompts' common places read once.

Parameters are fresh ones, scaled so that the logits depend on the prompt.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from benchmarks import cases, harness
from benchmarks.cases import BranchCase
from jaxsafety import keys, methods, world
from jaxsafety.models import gpt
from jaxsafety.training import branching, objective
from jaxsafety.types import Params, PreferenceBatch

COLUMNS = {
    "name": "program", "items": "prompts", "items_per_s": "prompts/s", "median_ms": "median ms", "p10_ms": "p10",
    "p90_ms": "p90", "lower_ms": "lower ms", "compile_ms": "compile ms", "peak_mb": "peak MB",
    "gflops_per_s": "GFLOP/s", "gflop": "GFLOP", "speedup": "speed-up", "speedup_p10": "p10", "speedup_p90": "p90",
    "loss_error": "loss error", "gradient_error": "gradient error",
}  # fmt: skip

_SCALE = 3.0


def run() -> Iterator[dict[str, Any]]:
    """Yields the rows of every case: each method on whole texts, its baseline, and on what begins alike."""
    for case in cases.BRANCHES:
        for name in case.methods:
            yield from _rows(case, name)


def _rows(case: BranchCase, name: str) -> Iterator[dict[str, Any]]:
    built = world.load(case.world)
    config = gpt.preset(case.preset, vocab_size=built.vocab_size, max_tokens=built.max_tokens)
    params = jax.tree.map(lambda leaf: _SCALE * leaf, gpt.init(config, key=keys.root(0)))
    drawn = world.mixed_at(built, key=keys.root(1), step=0, batch_size=case.prompts, p_unsafe=0.5, mix="prompt")
    batch = world.preferences(drawn)
    method = methods.load(name)
    loss = objective.make_loss(method, gpt.model(config), method.Config(), reference=params, key=keys.root(2))

    def graded(params: Params, batch: PreferenceBatch) -> Any:
        return jax.value_and_grad(loss, has_aux=True)(params, batch)

    given = {"whole": branching.whole(batch), "a stem once": batch}
    programs = [
        harness.compile_program(graded, (params, own), name=f"{case.preset}, {name}: {how}", items=case.prompts)
        for how, own in given.items()
    ]
    results = harness.race(programs, rounds=case.rounds)
    baseline, ((expected, _), expected_gradient) = results[0]
    for record, ((value, _), gradient) in results:
        ratio = harness.speedup(record, over=baseline)
        yield asdict(record) | {
            "gflop": record.gflops_per_s and record.gflops_per_s * record.median_ms / 1e3,
            "speedup": ratio.median, "speedup_p10": ratio.p10, "speedup_p90": ratio.p90,
            "loss_error": harness.max_relative_error(value, expected),
            "gradient_error": harness.max_relative_error(_flat(gradient), _flat(expected_gradient)),
        }  # fmt: skip


def _flat(tree: Params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
