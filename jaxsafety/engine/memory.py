"""What a compiled program needs of a device's memory, and what is there: estimates that lanes are split by, and what
does not fit is refused by."""

import math
import os
from pathlib import Path
from typing import Any

import jax

# XLA's plan leaves out what its libraries take for themselves while they run.
_USABLE = 0.9


def need(program: Any) -> int:
    """Returns the bytes that a compiled program takes on one device beside its arguments, as XLA plans them."""
    plan = program.memory_analysis()
    # What is donated is an output already.
    return plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes


def size(tree: Any) -> int:
    """Returns the bytes of arrays, or of what has their shapes, on the device that holds most of them.

    Leaves with a ``sharding`` count with their part on one device.
    """
    return sum(math.prod(_part(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def free() -> int:
    """Returns the bytes that a program may take on the fullest device of this process.

    A CPU's devices share the machine's memory, and are taken to have equal parts of all that this process may have of
    it, whatever else runs: the same on every start.
    """
    return int(_USABLE * min(_free(device, _machine()) for device in jax.local_devices()))


def available() -> int:
    """Returns the bytes that a program may take now: :func:`free`, on a CPU without what is in use."""
    unused = min(_machine(), _meminfo("MemAvailable"))
    return int(_USABLE * min(_free(device, unused) for device in jax.local_devices()))


def _free(device: jax.Device, machine: int) -> int:
    known = device.memory_stats()
    if known and "bytes_limit" in known:
        return known["bytes_limit"] - known["bytes_in_use"]
    return machine // jax.local_device_count()


def _machine() -> int:
    """The bytes of the machine, or of the container that this process is in."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *cgroup_limits(Path("/")))


def cgroup_limits(root: Path) -> list[int]:
    """Returns the limits in bytes of the control groups of this process, version 2 or 1; 2**63 where there is none.

    ``root`` is that of the file system, ``/``.
    """
    groups = root / "sys" / "fs" / "cgroup"
    found = [groups / "memory" / "memory.limit_in_bytes", groups / "memory.max"]
    own = root / "proc" / "self" / "cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, kinds, place = line.split(":", 2)
        folder, file = (groups, "memory.max") if not kinds else (groups / "memory", "memory.limit_in_bytes")
        if not kinds or "memory" in kinds.split(","):
            inner = folder / place.strip("/")
            found += [level / file for level in (inner, *inner.parents) if level.is_relative_to(folder)]
    texts = [path.read_text().strip() for path in found if path.is_file()]
    return [2**63, *(int(text) for text in texts if text.isdigit())]


def _meminfo(name: str) -> int:
    """A line of Linux's ``/proc/meminfo`` in bytes; 2**63 elsewhere."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else ()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 2**63)
