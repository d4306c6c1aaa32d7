"""Tuning a checkpoint: what an 8B model needs of memory, from shapes alone, and steps of a small one timed.

``GB`` are what each of ``devices`` holds, as XLA plans it on this machine's backend; nothing of 8B is allocated. The
small model's programs take the same step from the same parameters; ``loss_error`` is the relative difference of its
loss from that of the first program.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, harness
from benchmarks.cases import PlanCase
from jaxsafety import keys
from jaxsafety.models import llama
from jaxsafety.recipe import graph
from jaxsafety.study.checkpoints import job, places, program, tuned
from jaxsafety.study.checkpoints.examples import Encoded
from jaxsafety.study.checkpoints.job import Job
from jaxsafety.subjects import checkpoint
from jaxsafety.types import Batch, PreferenceBatch

COLUMNS = {
    "name": "program", "devices": "devices", "trained": "tuned numbers", "weights_gb": "weights GB",
    "state_gb": "state GB",
    "step_gb": "step GB", "total_gb": "total GB", "median_ms": "median ms", "p10_ms": "p10", "p90_ms": "p90",
    "peak_mb": "peak MB", "speedup": "speed-up", "loss_error": "loss error",
}  # fmt: skip


def run() -> Iterator[dict[str, Any]]:
    """Yields a row for each plan, then one for each program of the small model."""
    for case in cases.PLANS:
        yield plan_row(case)
    yield from step_rows()


def plan_row(case: PlanCase) -> dict[str, Any]:
    """What one device holds in a step."""
    side = Batch(*(np.zeros((case.sequences, case.tokens), dtype) for dtype in (np.int32, np.int32, bool)))
    own = job_of(case.method, rank=case.rank, batch_size=case.sequences, max_tokens=case.tokens, dtype="bfloat16")
    unsafe = np.zeros(case.sequences, bool)
    encoded = Encoded(PreferenceBatch(side, side if own.how.needs.rejected else None, unsafe))
    found = tuned.plan(case.model, encoded, own, places=places.local())
    sizes = {"weights_gb": found.frozen_bytes, "state_gb": found.state_bytes, "step_gb": found.step_bytes}
    sizes["total_gb"] = sum(sizes.values()) + found.data_bytes
    kind = "all parameters" if case.rank is None else f"rank {case.rank}"
    name = f"8B, {case.method}, {kind}, {case.sequences} x {case.tokens}"
    devices = jax.local_device_count()
    return {"name": name, "devices": devices, "trained": found.trained} | {
        key: size / 1e9 for key, size in sizes.items()
    }


def job_of(method: str, *, rank: int | None, batch_size: int, accumulate: int = 1, **about: Any) -> Job:
    """A step of a model as a recipe writes it; ``rank`` is the adapter's, None for all parameters."""
    config = checkpoint.Config("nowhere", **about)
    part = {"kind": "full"} if rank is None else {"rank": rank}
    how = {"method": method, "steps": 1, "batch_size": batch_size, "accumulate": accumulate, "parametrisation": part}
    models = checkpoint.models(config, {"tuned": {"from": checkpoint.FIRST} | how})
    return job.of_lane(graph.expand(models)[-1], config, 0)


def step_rows() -> Iterator[dict[str, Any]]:
    """Races a step of all parameters against one of an adapter, with layers recomputed and not."""
    model, tokens = cases.TUNED, cases.TUNED.max_tokens
    drawn = jax.random.randint(keys.root(0), (8, tokens + 1), 0, model.vocab_size)
    side = Batch(drawn[:, :-1], drawn[:, 1:], jnp.ones((8, tokens), bool))
    data = PreferenceBatch(side, None, jnp.zeros(8, bool))
    params = llama.init(model, key=keys.root(1))
    programs = []
    for name, changed in {
        "all parameters": {"rank": None, "recompute": False},
        "rank 8": {"rank": 8, "recompute": False},
        "rank 8, recomputed": {"rank": 8, "recompute": True},
        "rank 8, in 4 parts": {"rank": 8, "recompute": False, "accumulate": 4},
    }.items():
        own = job_of("sft", batch_size=8, max_tokens=tokens, **changed)
        state, frozen = program.start(params, own)
        step = partial(program.chunk(model, own), steps=jnp.int32(1))
        programs.append(harness.compile_program(step, (state, frozen, data, program.own(own)), name=name))
    results = harness.race(programs, rounds=5)
    baseline, (_, expected) = results[0]
    for record, (_, metrics) in results:
        error = abs(float(metrics["loss"]) / float(expected["loss"]) - 1)
        yield asdict(record) | {"speedup": harness.speedup(record, over=baseline).median, "loss_error": error}
