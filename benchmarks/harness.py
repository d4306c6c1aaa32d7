"""Times programs and compares them in one run. A comparison interleaves its programs (A B A B ...), so drift of the
machine hits all of them, and its ratio comes from neighbouring runs.

Inputs are the caller's: random keys and drawn parameters, never zeros. Times are wall-clock milliseconds of one call
until its results are ready.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from typing import Any

import jax
import numpy as np

from jaxsafety.rundir import machine

_PEERS = ("torch", "trl")  # of the extra ``peers``


@dataclass(frozen=True)
class Program:
    """Something to time.

    Attributes:
        name: what tables call it.
        call: runs it once.
        items: units of work in one call (samples, seed-steps), >= 1.
        lower_ms, compile_ms: what making it cost; None for host code.
        peak_mb: see :class:`Record`.
        gflop: floating-point work of one call, or None where nothing counts it.
    """

    name: str
    call: Callable[[], Any]
    items: int = 1
    lower_ms: float | None = None
    compile_ms: float | None = None
    peak_mb: float | None = None
    gflop: float | None = None


@dataclass(frozen=True)
class Record:
    """What one program took.

    Attributes:
        name: the program.
        items: units of work in one call.
        lower_ms, compile_ms: tracing and lowering, and XLA's compilation; None for host code.
        median_ms, p10_ms, p90_ms: one call, over the rounds.
        items_per_s: units of work a second, at the median.
        peak_mb: what XLA plans to hold on one device at once, arguments + outputs + temporaries - aliases, 1e6 bytes;
            None for host code.
        gflops_per_s: 1e9 floating-point operations a second at the median; None where nothing counts them.
        times_ms: every round, in order.
        device: the machine.
        versions: package to version.
    """

    name: str
    items: int
    lower_ms: float | None
    compile_ms: float | None
    median_ms: float
    p10_ms: float
    p90_ms: float
    items_per_s: float
    peak_mb: float | None
    gflops_per_s: float | None
    times_ms: tuple[float, ...]
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Ratio:
    """How many times faster a program is than its baseline, per unit of work.

    Attributes:
        median: ratio of the medians.
        p10, p90: spread of the ratios of neighbouring runs.
    """

    median: float
    p10: float
    p90: float


def compile_program(
    fn: Callable[..., Any], args: Sequence[Any], *, name: str, items: int = 1, gflop: float | None = None
) -> Program:
    """Lowers and compiles a traceable function for its arguments.

    Args:
        fn: the function; it is jitted here, without donation, so that every round sees the same arguments.
        args: its arguments, on the device.
        name: what tables call it.
        items: units of work in one call.
        gflop: work of one call, where the caller knows better than XLA; see :func:`count_gflop`.
    """
    started = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    compiled_at = time.perf_counter()
    return Program(
        name=name,
        call=partial(compiled, *args),
        items=items,
        lower_ms=1e3 * (lowered_at - started),
        compile_ms=1e3 * (compiled_at - lowered_at),
        peak_mb=_peak_mb(compiled.memory_analysis()),
        gflop=_count(lowered) if gflop is None else gflop,
    )


def count_gflop(fn: Callable[..., Any], args: Sequence[Any]) -> float | None:
    """Returns XLA's count of one call's floating-point operations, in 1e9.

    XLA counts a multiply-add as 2 and an element-wise operation as 1 before any optimisation, and the body of a loop
    once, however often it runs. So a program with a loop has no count (None): count its body and multiply.

    Args:
        fn: the function.
        args: its arguments, or what ``jax.eval_shape`` returns for them.
    """
    return _count(jax.jit(fn).lower(*args))


def measure(fn: Callable[..., Any], args: Sequence[Any], *, name: str = "", items: int = 1, rounds: int = 20) -> Record:
    """Compiles and times one traceable function; see :func:`compile_program` and :func:`race`."""
    return race([compile_program(fn, args, name=name, items=items)], rounds=rounds)[0][0]


def race(programs: Sequence[Program], *, rounds: int, warmups: int = 1) -> list[tuple[Record, Any]]:
    """Runs programs in turn, ``rounds`` times each, and returns the record and last output of each.

    Args:
        programs: what to run, in the order of every round.
        rounds: timed calls of each, at least 1.
        warmups: untimed calls of each, before.
    """
    for program in programs:
        for _ in range(warmups):
            jax.block_until_ready(program.call())
    times: list[list[float]] = [[] for _ in programs]
    outputs: list[Any] = [None for _ in programs]
    for _ in range(rounds):
        for i, program in enumerate(programs):
            outputs[i] = None  # so that two generations of results are never held at once
            started = time.perf_counter()
            outputs[i] = jax.block_until_ready(program.call())
            times[i].append(1e3 * (time.perf_counter() - started))
    return [(_record(p, t), out) for p, t, out in zip(programs, times, outputs, strict=True)]


def speedup(record: Record, *, over: Record) -> Ratio:
    """Returns how many times faster ``record`` is than ``over``, both from one :func:`race`."""
    mine, baseline = (np.asarray(r.times_ms) / r.items for r in (record, over))
    paired = baseline / mine
    low, high = np.percentile(paired, (10, 90))
    return Ratio(median=float(np.median(baseline) / np.median(mine)), p10=float(low), p90=float(high))


def max_relative_error(result: Any, reference: Any) -> float:
    """Returns the largest difference of two pytrees, relative to the largest magnitude of its leaf in ``reference``."""

    def error(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = np.abs(b).max(initial=0.0)
        return float(np.abs(a - b).max(initial=0.0) / (scale if scale else 1.0))

    return max(jax.tree.leaves(jax.tree.map(error, result, reference)), default=0.0)


def has(package: str) -> bool:
    """Returns whether an optional package is installed."""
    return importlib.util.find_spec(package) is not None


def say_missing(*packages: str) -> None:
    """Says on standard error which optional packages' rows are left out."""
    for package in packages:
        if not has(package):
            how = 'pip install ".[peers]" in a checkout'
            print(f"{package} is not installed, its rows are left out: {how}", file=sys.stderr)


@cache
def environment() -> dict[str, Any]:
    """Returns what ``jaxsafety env`` prints; read once, for it asks git."""
    return machine.environment()


def device() -> str:
    """Returns the machine in one line: processor, cores, jax's devices."""
    env = environment()
    devices = env["devices"] if isinstance(env["devices"], str) else ", ".join(env["devices"])
    return f"{env['cpu']['model']}, {env['cpu']['count']} cores; {devices}"


def versions() -> dict[str, str]:
    """Returns the versions that a time depends on."""
    env = environment()
    return {"python": env["python"], "jaxsafety": env["jaxsafety"], **env["packages"], **_peer_versions()}


@cache
def _peer_versions() -> dict[str, str]:
    installed = (name for name in _PEERS if importlib.util.find_spec(name))
    return {name: metadata.version(name) for name in installed}


def _record(program: Program, times_ms: Sequence[float]) -> Record:
    low, median, high = (float(q) for q in np.percentile(times_ms, (10, 50, 90)))
    return Record(
        name=program.name,
        items=program.items,
        lower_ms=program.lower_ms,
        compile_ms=program.compile_ms,
        median_ms=median,
        p10_ms=low,
        p90_ms=high,
        items_per_s=1e3 * program.items / median,
        peak_mb=program.peak_mb,
        gflops_per_s=None if program.gflop is None else 1e3 * program.gflop / median,
        times_ms=tuple(times_ms),
        device=device(),
        versions=versions(),
    )


def _peak_mb(stats: Any) -> float | None:
    if stats is None:
        return None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return (held - stats.alias_size_in_bytes) / 1e6


def _count(lowered: Any) -> float | None:
    if "stablehlo.while" in lowered.as_text():
        return None
    flops = (lowered.cost_analysis() or {}).get("flops", 0.0)
    return flops / 1e9 if flops > 0 else None
