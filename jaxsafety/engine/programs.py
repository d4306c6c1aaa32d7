"""The one place that jits: pure functions of a lane become programs over a grid that fit into the devices' memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from jaxsafety.engine import hosts, memory, sweep
from jaxsafety.rundir import progress
from jaxsafety.types import HParams, Strategy

# On a CPU, what compiles in a quarter of the time and runs several times as long; results differ by rounding at most.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@dataclass(frozen=True)
class Grid:
    """The lanes of a program: seed numbers, axis s, and how many rows of them there are, axis h.

    ``strategy`` is a resolved one.
    """

    seeds: tuple[int, ...]
    rows: int
    strategy: Strategy

    def zeros(self) -> Any:
        """``[h, s]`` zeros, for programs that need no input per lane."""
        return jnp.zeros((self.rows, len(self.seeds)))


def program(
    run: Callable[..., Any], *, grid: Grid, donate: tuple[int, ...] = (), per_lane: int = 1, quick: bool = False,
    built: dict[int | None, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Returns a single-lane function mapped over the grid and jitted; see :func:`jaxsafety.engine.sweep.over_lanes`.

    Batched lanes that do not fit into a device's memory together run in batches of as many seeds as do, which is said
    once; the first call decides. ``quick`` is for what takes longer to compile than to run. ``built`` has what was
    jitted already, by how many seeds are a batch, and takes what is; see :func:`sharing`.
    """
    seeds, kept = len(grid.seeds), {} if built is None else built
    shares, options = sweep.shares(grid.strategy, seeds=seeds), _options(quick)

    def mapped(at_once: int | None) -> Callable[..., Any]:
        return sweep.over_lanes(run, grid.strategy, seeds=seeds, at_once=at_once, per_lane=per_lane)

    def build(at_once: int | None) -> Callable[..., Any]:
        if at_once not in kept:
            given = None if shares else options
            kept[at_once] = jax.jit(mapped(at_once), donate_argnums=donate, compiler_options=given)
        return kept[at_once]

    if not shares and options is None:
        return build(None)
    fitted: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            return mapped(None)(*arguments)
        if not fitted:
            fitted.append(_fit(build, shares, arguments) if shares else build(None))
        return fitted[0](*arguments)

    return call


def sharing() -> Callable[..., Callable[..., Any]]:
    """Returns :func:`program` with a memory: of one function and grid it compiles once, for as long as it is there.

    How many lanes a program may batch is asked again for each: memory may have become less.
    """
    built: dict[Any, dict[int | None, Callable[..., Any]]] = {}

    def shared(run: Callable[..., Any], *, grid: Grid, **how: Any) -> Callable[..., Any]:
        return program(run, grid=grid, built=built.setdefault((run, grid, *sorted(how.items())), {}), **how)

    return shared


def fitted(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = (), what: str, quick: bool = False
) -> Callable[..., Any]:
    """Returns a function compiled for arguments of these shapes, once it is known to fit into a device's memory.

    The arguments are arrays, or what has their shapes and types; the memory of those in ``donate`` may be taken.
    ``what`` the pure function computes is for the message; for ``quick`` see :func:`program`.

    Raises:
        ValueError: it does not fit; the message says what it needs and what is there.
    """
    compiled, need = planned(function, *arguments, donate=donate, quick=quick)
    if need > (room := memory.available()):
        raise ValueError(
            f"{what} needs {need / 2**30:.3g} GiB, and the device has {room / 2**30:.3g} GiB free: "
            "expected a larger device, or smaller batches where there are any"
        )
    return compiled


def planned(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = (), quick: bool = False
) -> tuple[Callable[..., Any], int]:
    """Returns a function compiled for arguments of these shapes, and the bytes that it takes of a device.

    Those are what it plans and the arguments that are not on a device already. See :func:`fitted`.
    """
    jitted = jax.jit(function, donate_argnums=donate, compiler_options=_options(quick))
    compiled = jitted.lower(*arguments).compile()
    given = [leaf for leaf in jax.tree.leaves(arguments) if not isinstance(leaf, jax.Array)]
    return compiled, memory.need(compiled) + memory.size(given)


def _fit(
    build: Callable[[int | None], Callable[..., Any]], shares: Sequence[int], arguments: tuple[Any, ...]
) -> Callable[..., Any]:
    """The program that batches the most lanes which fit; the one of single lanes if none does, for XLA to refuse."""
    # Every process builds the same program, also where the devices of one are fuller.
    room, needs = hosts.least(memory.free()), []
    for at_once in (None, *shares):
        fn = build(at_once)
        needs.append(_need(fn, arguments))
        if needs[-1] <= room:
            break
    if at_once is not None:
        whole, part = (f"{need / 2**30:.3g} GiB" if need < math.inf else "more" for need in (needs[0], needs[-1]))
        progress.say(
            f"all lanes together need {whole} of a device that has {room / 2**30:.3g} GiB free: "
            f"running {at_once} seed{'s' * (at_once != 1)} at a time, {part}"
        )
    return fn


def _need(fn: Callable[..., Any], arguments: tuple[Any, ...]) -> int | float:
    """Bytes that a program needs; infinitely many where the compiler itself refuses to place it, as a TPU's does."""
    try:
        # The call that follows finds this trace and this executable.
        return memory.need(fn.lower(*arguments).compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def place(lanes: Any, per_seed: Any, points: HParams, *, grid: Grid) -> tuple[Any, Any, HParams]:
    """Puts what every chunk takes where the program wants it, once: a chunk moves nothing between devices or hosts.

    ``lanes`` are ``[h, s, ...]``, ``per_seed`` ``[s, ...]`` and ``points`` ``[h]``.
    """
    places = (sweep.seed_sharding(grid.strategy, seeds=len(grid.seeds), axis=axis) for axis in (1, 0, None))
    return _placed(*places)(lanes, per_seed, points)


@cache
def _placed(*shardings: jax.sharding.Sharding) -> Callable[..., Any]:
    return jax.jit(lambda *trees: trees, out_shardings=shardings)


def at_once(function: Callable[..., Any], *trees: Any) -> Any:
    """Returns a pure function of trees, in one program: eagerly, every operation on every leaf would be one."""
    return jax.jit(function, compiler_options=_options(quick=True))(*trees)


def _options(quick: bool) -> dict[str, Any] | None:
    return _QUICK if quick and jax.default_backend() == "cpu" else None
