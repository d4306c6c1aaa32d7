"""The lanes of a grid: one pure function of a single run, mapped over axes ``[h, s]`` (hyper-parameters, seeds).

The strategy is one static knob and one code path: ``vmap`` batches the lanes (accelerators), ``map`` runs them one
after the other in one program (a CPU core), ``sharded`` splits the seeds over devices and does the backend's better
one inside each. Lanes never communicate, so a sharded program has no collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsafety.config.names import check_name
from jaxsafety.types import Strategy


def resolve(strategy: Strategy, *, seeds: int) -> Strategy:
    """Returns the strategy that ``auto`` means here: sharded where several devices help, else vmap, or map on CPU.

    Raises:
        ValueError: unknown strategy; several processes, and a strategy or number of seeds that they cannot share,
            or devices that are not as many in each.
    """
    check_name("strategy", strategy, get_args(Strategy))
    if (processes := jax.process_count()) > 1:
        if strategy not in ("auto", "sharded"):
            raise ValueError(f"strategy must be sharded or auto on {processes} processes, got {strategy!r}")
        counts = [sum(device.process_index == process for device in jax.devices()) for process in range(processes)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"every process must have as many devices, got {counts}: leave the same number to each, such as with "
                "CUDA_VISIBLE_DEVICES, or taskset for the cores of a CPU"
            )
        if seeds % processes:
            raise ValueError(f"seeds must be a multiple of the {processes} processes, got {seeds}: add or drop some")
        return "sharded"
    if strategy != "auto":
        return strategy
    if len(devices_of(seeds)) > 1:
        return "sharded"
    return "map" if jax.default_backend() == "cpu" else "vmap"


def shard_count(seeds: int, devices: int) -> int:
    """Returns the most devices that seeds can be split over evenly (a device without a full share stays idle)."""
    return max(n for n in range(1, min(seeds, devices) + 1) if seeds % n == 0)


def devices_of(seeds: int) -> list[jax.Device]:
    """Returns the devices that seeds are split over evenly, as many of every process, in the order of the shares."""
    processes = range(jax.process_count())
    own = [[device for device in jax.devices() if device.process_index == process] for process in processes]
    count = shard_count(seeds // len(own), min(map(len, own)))
    return [device for devices in own for device in devices[:count]]


def seed_sharding(strategy: Strategy, *, seeds: int, axis: int | None) -> jax.sharding.Sharding:
    """Returns how an array is placed under a resolved strategy whose ``axis`` runs over seeds, or none of its axes."""
    return NamedSharding(_mesh(strategy, seeds), P() if axis is None else P(*[None] * axis, "seeds"))


def shares(strategy: Strategy, *, seeds: int) -> tuple[int, ...]:
    """Returns how many seeds a program may batch on a device under a resolved strategy, the most first.

    All that lie there, then half as many each time, rounded up, down to one. Nothing where lanes run one by one.
    """
    if not _is_batched(strategy):
        return ()
    here = seeds // len(_mesh(strategy, seeds).devices)
    return tuple(dict.fromkeys(-(-here // 2**halving) for halving in range(here.bit_length() + 1)))


def _mesh(strategy: Strategy, seeds: int) -> Mesh:
    devices = devices_of(seeds) if strategy == "sharded" else jax.local_devices()[:1]
    return Mesh(np.asarray(devices), ("seeds",), axis_types=(AxisType.Auto,))


def over_lanes(
    run: Callable[..., Any], strategy: Strategy, *, seeds: int, at_once: int | None = None, per_lane: int = 1
) -> Callable[..., Any]:
    """Maps a single run, under a resolved strategy, over the grid of points and so many seeds.

    ``run`` is pure, ``(*lane, per_seed, per_point, *shared) -> lane outputs`` for one hyper-parameter point and one
    seed, with ``per_lane`` arguments of the lane's own. With ``at_once``, such as one of :func:`shares`, only so many
    seeds of one point are a batch, and these run one after the other, the rest last; None is for all lanes that the
    strategy batches.

    Returns:
        The same on ``(*lanes[h, s, ...], per_seed[s, ...], per_point[h, ...], *shared) -> outputs[h, s, ...]``. What is
        shared is the same for all lanes and not mapped, so that a loop bound or a branch index stays one.
    """
    whole = _is_batched(strategy) and at_once is None
    mapped = _vmap_lanes(run) if whole else _loop_lanes(run, at_once=at_once)
    if strategy == "sharded":
        mapped = jax.shard_map(
            mapped,
            mesh=_mesh(strategy, seeds),
            in_specs=(P(None, "seeds"), P("seeds"), P(), P()),
            out_specs=P(None, "seeds"),
            check_vma=False,
        )

    def call(*arguments: Any) -> Any:
        per_seed, points, *shared = arguments[per_lane:]
        return mapped(arguments[:per_lane], per_seed, points, tuple(shared))

    # What profiles and logs of the compiler call the program.
    call.__name__ = getattr(getattr(run, "func", run), "__name__", "call")
    return call


def _is_batched(strategy: Strategy) -> bool:
    return strategy == "vmap" or (strategy == "sharded" and jax.default_backend() != "cpu")


def _vmap_lanes(run: Callable[..., Any]) -> Callable[[Any, Any, Any, tuple[Any, ...]], Any]:
    def one(lane: tuple[Any, ...], per_seed: Any, point: Any, shared: tuple[Any, ...]) -> Any:
        return run(*lane, per_seed, point, *shared)

    return jax.vmap(jax.vmap(one, in_axes=(0, 0, None, None)), in_axes=(0, None, 0, None))


def _loop_lanes(run: Callable[..., Any], *, at_once: int | None) -> Callable[[Any, Any, Any, tuple[Any, ...]], Any]:
    def over_grid(lanes: tuple[Any, ...], per_seed: Any, points: Any, shared: tuple[Any, ...]) -> Any:
        def over_seeds(row: tuple[Any, ...], point: Any) -> Any:
            return jax.lax.map(lambda xs: run(*xs[0], xs[1], point, *shared), (row, per_seed), batch_size=at_once)

        return jax.lax.map(lambda xs: over_seeds(*xs), (lanes, points))

    return over_grid
