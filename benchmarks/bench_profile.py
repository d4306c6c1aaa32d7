"""Where the time of a chunk of pretraining goes: parts timed one by one, then operations by kind from a trace.

The floor is the work of the loss and its gradient, as XLA counts it, at the rate of the fastest matrix product of this
run. A part's ``added_ms`` is what it takes beyond the part before it. Kinds are of one traced chunk and sum, with
``no operation``, to its whole time. Everything is one seed on one of jax's devices, which may use every core.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench_train_step, cases, gemm, harness, hlo
from benchmarks.cases import TrainCase
from benchmarks.harness import Program
from jaxsafety import keys
from jaxsafety.study import lanes
from jaxsafety.training import optim, stepping
from jaxsafety.types import Terms

COLUMNS = {
    "name": "what", "case": "case", "ms_per_step": "ms a step", "p10": "p10", "p90": "p90", "added_ms": "adds ms",
    "share": "share of chunk", "gflop": "GFLOP", "rate": "GFLOP/s", "floor_ms": "floor ms", "over_floor": "over floor",
}  # fmt: skip

SAMPLER, OPTIMISER = "sampler", "optimiser, norms, state"
_MODEL_KINDS = (hlo.WEIGHTS, hlo.ATTENTION, hlo.SOFTMAX, hlo.REST)


def run() -> Iterator[dict[str, Any]]:
    """Yields the ceiling's rows, then for each case its parts and its kinds."""
    peak = 0.0
    for row in gemm_rows():
        peak = max(peak, row["rate"])
        yield row
    for case in cases.PROFILE:
        yield from case_rows(case, peak=peak)


def gemm_rows() -> Iterator[dict[str, Any]]:
    """Times float32 matrix products alone."""
    for program, record in gemm.records():
        yield _timed(record, steps=1) | {"gflop": program.gflop, "rate": record.gflops_per_s}


def case_rows(case: TrainCase, *, peak: float) -> Iterator[dict[str, Any]]:
    """Yields a case's rows.

    Args:
        case: model, batch and steps of a chunk.
        peak: rate of the fastest matrix product, in 1e9 operations a second.
    """
    programs, chunk, text, tokens = _programs(case)
    records = [record for record, _ in harness.race([*programs, chunk], rounds=case.rounds)]
    whole = records[-1].median_ms / case.steps
    gradient = next(p.gflop for p in programs if p.name == "forward, backward")
    before = 0.0
    for program, record in zip([*programs, chunk], records, strict=True):
        row = _timed(record, steps=case.steps if program is chunk else 1) | {"case": case.name}
        row["share"] = row["ms_per_step"] / whole
        if program.gflop:
            row |= _against_floor(program.gflop, row["ms_per_step"], peak=peak)
        if program.name != SAMPLER:
            row["added_ms"] = row["ms_per_step"] - before
            before = row["ms_per_step"]
        yield row
    floor = gradient / peak * 1e3
    yield {"name": "floor of the step", "case": case.name, "median_ms": floor, "ms_per_step": floor,
           "share": floor / whole, "gflop": gradient, "rate": peak}  # fmt: skip
    yield from _kind_rows(case, chunk.call, text, tokens=tokens, peak=peak)


def _kind_rows(
    case: TrainCase, call: Callable[[], Any], text: str, *, tokens: int, peak: float
) -> Iterator[dict[str, Any]]:
    kind_of = hlo.kinds(text, tokens=tokens, scopes=(SAMPLER,), default=OPTIMISER)
    work = hlo.dot_gflop(text, kind_of)
    samples = defaultdict(list)
    for _ in range(case.rounds):
        ran, took = hlo.trace(call, text=text)
        spent = hlo.shares([(start, end, kind_of[name]) for start, end, name in ran if name in kind_of])
        for kind in (*_MODEL_KINDS, OPTIMISER, SAMPLER):
            samples[kind].append(spent.get(kind, 0.0) / case.steps)
        samples["no operation"].append((took - sum(spent.values())) / case.steps)
        samples["traced chunk"].append(took / case.steps)
    whole = float(np.median(samples["traced chunk"]))
    for kind, times in samples.items():
        low, middle, high = (float(q) for q in np.percentile(times, (10, 50, 90)))
        row = {"name": f"in the chunk: {kind}", "case": case.name, "median_ms": middle * case.steps,
               "ms_per_step": middle, "p10": low, "p90": high, "share": middle / whole}  # fmt: skip
        if kind in (hlo.WEIGHTS, hlo.ATTENTION):
            row |= _against_floor(work[kind], middle, peak=peak)
        yield row


def _timed(record: harness.Record, *, steps: int) -> dict[str, Any]:
    return asdict(record) | {
        "ms_per_step": record.median_ms / steps, "p10": record.p10_ms / steps, "p90": record.p90_ms / steps,
    }  # fmt: skip


def _against_floor(gflop: float, ms: float, *, peak: float) -> dict[str, float]:
    floor = gflop / peak * 1e3
    return {"gflop": gflop, "rate": gflop / ms * 1e3, "floor_ms": floor, "over_floor": ms / floor}


def _programs(case: TrainCase) -> tuple[list[Program], Program, str, int]:
    """Returns the parts, the chunk, the chunk's compiled text and ``t``."""
    recipe = bench_train_step.recipe_of(case)
    subject = bench_train_step.opened(recipe)
    training = recipe.lanes[0].training
    sample = partial(bench_train_step.draw_batch, recipe, subject, key=keys.root(1))
    optimizer = optim.make_optimizer(training.optim, peak_lr=training.lr, total_steps=training.steps)
    unnamed = bench_train_step.totals_of(subject.model)

    def totals(*given: Any, **named: Any) -> tuple[Terms, Terms]:
        with jax.named_scope(hlo.MODEL):
            return unnamed(*given, **named)

    loss = bench_train_step.mean_loss(totals)
    gradient = stepping.make_gradient(totals, key=keys.root(1), total_steps=training.steps)
    step = stepping.make_step(gradient, optimizer)
    state = stepping.init_state(lanes.init_params(subject, key=keys.root(0)), optimizer)
    batch = jax.jit(lambda step: sample(step=step))(0)

    def draw(step: jax.Array) -> Any:
        with jax.named_scope(SAMPLER):
            return sample(step=step)

    def chunk(state: Any, steps: jax.Array) -> Any:
        return stepping.run_steps(step, draw, state, steps=steps)

    given = (state.params, batch)
    parts = [
        harness.compile_program(draw, (jnp.int32(0),), name=SAMPLER),
        harness.compile_program(lambda *args: loss(*args)[0], given, name="forward"),
        harness.compile_program(jax.value_and_grad(loss, has_aux=True), given, name="forward, backward"),
        harness.compile_program(step, (state, batch), name="step, batch given"),
    ]
    compiled = jax.jit(chunk).lower(state, jnp.int32(1)).compile()
    whole = Program("chunk, batch drawn inside", partial(compiled, state, jnp.int32(case.steps)))
    return parts, whole, compiled.as_text(), batch.tokens.shape[1]
