"""The ceiling that the work of a model is measured against: the fastest float32 matrix product of a run."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks import cases, harness
from benchmarks.harness import Program, Record
from jaxsafety import keys


def records() -> Iterator[tuple[Program, Record]]:
    """Times float32 matrix products alone."""
    programs = []
    for case in cases.GEMMS:
        left, right = (
            jax.random.normal(keys.root(0), (case.m, case.k)),
            jax.random.normal(keys.root(1), (case.k, case.n)),
        )
        programs.append(harness.compile_program(jnp.matmul, (left, right), name=f"GEMM {case.m} x {case.k} x {case.n}"))
    for program, (record, _) in zip(programs, harness.race(programs, rounds=cases.GEMM_ROUNDS), strict=True):
        yield program, record
